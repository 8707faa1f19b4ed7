"""Batch sizes that are halved when the memory is too small."""

import pytest
import torch

from riverrun.eval.documents import open_documents
from riverrun.eval.fitting import AUTO, Fitting, in_batches
from riverrun.eval.models import load_model
from riverrun.eval.samples import collect
from riverrun.eval.tasks import perplexity


def small(limit, worked):
    """Work that no device can do on more than `limit` things at a time."""

    def work(items):
        if len(items) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        worked.append(len(items))
        return [item * 2 for item in items]

    return work


def test_what_fits_is_found_and_kept():
    worked: list[int] = []
    found = list(in_batches(range(50), AUTO, small(20, worked)))
    assert [x for part, _ in found for x in part] == list(range(50))
    assert [x for _, result in found for x in result] == list(range(0, 100, 2))
    assert worked == [16, 16, 16, 2]


def test_each_group_finds_its_own_size(tmp_path):
    worked: list[int] = []

    def work(keys):
        limit = 3 if keys[0][0] == "long" else 1000
        return [{"x": x} for x in small(limit, worked)([number for _, number in keys])]

    keys = [(kind, number) for kind in ("long", "short") for number in range(6)]
    records = collect(tmp_path, {}, keys, work, batch_size=AUTO, group=lambda key: key[0])
    assert worked == [2, 2, 2, 6] and [record["x"] for record in records] == [0, 2, 4, 6, 8, 10] * 2


def test_a_fixed_size_is_kept_to():
    assert [len(part) for part, _ in in_batches(range(5), 2, small(2, []))] == [2, 2, 1]
    with pytest.raises(ValueError, match=r"too small for --batch-size 4: lower it, or give auto"):
        list(in_batches(range(5), 4, small(2, [])))
    with pytest.raises(ValueError, match=r"too small for --batch-size 1: read shorter texts"):
        list(in_batches(range(5), AUTO, small(0, [])))
    with pytest.raises(ValueError, match="must be at least 1"):
        Fitting(0)


@pytest.mark.parametrize("streaming", [False, True])
def test_perplexity_is_the_same_in_any_batches(streaming, saved, store, tmp_path, monkeypatch):
    loaded, plain = load_model(saved), perplexity.token_losses
    documents, sizes = open_documents(store, loaded), []

    def short_of_memory(model, input_ids, *args, **kwargs):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(input_ids))
        return plain(model, input_ids, *args, **kwargs)

    def measured(name, batch_size):
        options = {"seq_len": 16, "batch_size": batch_size, "streaming": streaming}
        return perplexity.run(loaded, documents, tmp_path / name, **options)[0]

    ample = measured("ample", AUTO)
    monkeypatch.setattr(perplexity, "token_losses", short_of_memory)
    scarce = measured("scarce", AUTO)
    assert max(sizes) == 2 and scarce.tokens == ample.tokens
    assert scarce.loss == pytest.approx(ample.loss, rel=1e-6) and scarce.stderr == pytest.approx(ample.stderr, rel=1e-5)
    with pytest.raises(ValueError, match="give auto"):
        measured("fixed", 4)
