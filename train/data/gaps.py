"""Data that a run leaves out: which part of it the steps then read."""

from collections.abc import Sequence

Gap = tuple[int, int]  # the places from the first one on, up to but without the second one


def place_of(step: int, gaps: Sequence[Gap]) -> int:
    """The place in the order of data (a global batch each) that optimiser step `step` reads, both counted from 0.

    Args:
        gaps: in ascending order, apart from each other.
    """
    place = step
    for start, end in gaps:
        if place >= start:
            place += end - start
    return place


def with_gap(gaps: Sequence[Gap], start: int, end: int) -> list[Gap]:
    """`gaps` and one more, joined where they touch."""
    assert start < end
    joined: list[Gap] = []
    for first, last in sorted([*gaps, (start, end)]):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return joined
