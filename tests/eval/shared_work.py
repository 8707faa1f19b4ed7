"""What ranks share, for the tests of evaluations on several of them."""

from pathlib import Path

from riverrun.eval.documents import open_documents
from riverrun.eval.harness import ReportedElsewhere, Timer, write_results
from riverrun.eval.models import load_model
from riverrun.eval.ranks import running
from riverrun.eval.samples import collect
from riverrun.eval.tasks import length, perplexity

KEYS = [("even" if number < 13 else "odd", number) for number in range(23)]


class Killed(Exception):
    pass


def squares(folder: Path, die_after: int | None = None) -> tuple[list[dict] | None, list[int]]:
    """The records of KEYS, None if killed after so many batches, and the numbers that this rank worked on."""
    worked: list[list[int]] = []

    def work(keys):
        if die_after is not None and len(worked) == die_after:
            raise Killed
        assert len({kind for kind, _ in keys}) == 1
        worked.append([number for _, number in keys])
        return [{"square": number**2, "third": number / 3} for _, number in keys]

    try:
        records = collect(folder, {"a": 1}, KEYS, work, batch_size=2, group=lambda key: key[0])
    except Killed:
        records = None
    return records, [number for numbers in worked for number in numbers]


def refused(folder: Path) -> str:
    """What every rank is told of a folder of another configuration."""
    try:
        collect(folder, {"a": 2}, KEYS, lambda keys: [{} for _ in keys], batch_size=2)
    except ValueError as error:
        return str(error)
    return "nothing"


def evaluated(model: Path, store: Path, folder: Path) -> tuple[dict, dict, bool]:
    """Both tasks on documents, one document at a time: their metrics, and whether this rank writes the results."""
    loaded, timer = load_model(model), Timer()
    documents = open_documents(store, loaded)
    _, streamed = perplexity.run(loaded, documents, folder / "p", seq_len=16, batch_size=1, streaming=True)
    _, curve = length.run(
        loaded, documents, folder / "l", max_length=60, train_length=8, chunk_len=16, batch_size=1, concatenate=True
    )  # fmt: skip
    try:
        write_results(folder, [streamed, curve], loaded, seed=0, batch_size=1, timer=timer)
    except ReportedElsewhere:
        assert running().rank > 0
        return streamed.metrics, curve.metrics | {"by_position": curve.details["by_position"]}, False
    return streamed.metrics, curve.metrics | {"by_position": curve.details["by_position"]}, True
