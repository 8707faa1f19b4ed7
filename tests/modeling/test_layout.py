"""Where sequences lie in a batch."""

import torch

from riverrun.modeling.layout import Layout


def test_layout_of_documents():
    layout = Layout.of_documents((2, 4), torch.tensor([0, 1, 4, 8], dtype=torch.int32))
    assert layout.sequence.tolist() == [[0, 1, 1, 1], [2, 2, 2, 2]]
    assert layout.positions.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert layout.last(torch.arange(3)).tolist() == [1, 2]


def test_layout_of_left_padding():
    layout = Layout.of_left_padded(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert layout.cu_seqlens.tolist() == [0, 2, 4, 8]
    assert layout.positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
