"""The check of accesses itself."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _copy(x, y, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < SIZE, other=0.0), mask=at < SIZE)


def test_an_access_outside_is_an_error():
    memory = torch.zeros(64)
    x, y = memory[:20], memory[32:52]
    _copy[(1,)](x, y, SIZE=20, BLOCK=32)
    with pytest.raises(Exception, match="_copy: 1 of 21 accesses lie outside"):
        _copy[(1,)](x, y, SIZE=21, BLOCK=32)
