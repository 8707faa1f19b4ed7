"""The order of truncated backpropagation: each row of a batch goes on where that in its place a step before ended."""

from collections.abc import Sequence

from riverrun.train.data.mixture import Mixture
from riverrun.train.data.packing import PackedRows, Row


class Segments:
    """A store's rows in segments of `length` neighbours; the last ones, less than a segment, are left out.

    Raises:
        ValueError: a store shorter than one segment.
    """

    def __init__(self, rows: PackedRows, length: int):
        self.rows, self.length = rows, length
        if len(rows) < length:
            raise ValueError(
                f"{rows.store.folder} holds {len(rows)} rows of data.seq_len={rows.seq_len}, less than one segment of "
                f"train.state_passing.segment_rows={length}: lower it, or prepare a larger corpus"
            )

    def __len__(self) -> int:
        return len(self.rows) // self.length

    def row(self, segment: int, offset: int) -> Row:
        return self.rows[segment * self.length + offset]

    def pairs(self, segment: int, offset: int) -> int:
        return self.rows.pairs(segment * self.length + offset)


class Streams:
    """An endless sequence of rows for global batches of `places` rows: place p of step s is sample s · places + p.

    Each place reads segments of `length` rows of the text, one after the other, and the places begin theirs at
    different steps, so that every batch has rows from all parts of segments. The segments come from a `Mixture`: of the
    stores in proportion to their weights, in random order, without repeats until a store is used up. Everything is a
    pure function of (seed, places, i).

    Raises:
        ValueError: a store shorter than one segment, or a weight below 1/1000 of the total.
    """

    def __init__(self, sources: Sequence[PackedRows], weights: Sequence[float], seed: int, *, places: int, length: int):
        self.sources = [Segments(rows, length) for rows in sources]
        self.order = Mixture(self.sources, weights, seed)  # type: ignore[arg-type]  # only their lengths count
        self.places, self.length = places, length

    def locate(self, i: int) -> tuple[int, int, int]:
        """The store, its segment, and the row in that of sample `i`."""
        step, place = divmod(i, self.places)
        nth, offset = divmod(step + place * self.length // self.places, self.length)
        return *self.order.locate(nth * self.places + place), offset

    def continues(self, i: int) -> bool:
        """Whether sample `i` is the row of the text after that of sample i − places."""
        return i >= self.places and self.locate(i)[2] > 0

    def __getitem__(self, i: int) -> Row:
        source, segment, offset = self.locate(i)
        return self.sources[source].row(segment, offset)

    def pairs(self, i: int) -> int:
        """See `PackedRows.pairs`; of sample `i`."""
        source, segment, offset = self.locate(i)
        return self.sources[source].pairs(segment, offset)
