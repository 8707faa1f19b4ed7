"""How the rows of a global batch are shared by however many ranks a run is started on."""

from math import gcd, isqrt
from typing import NamedTuple

SHOWN = 6  # possible numbers of ranks on either side of the one that is not


class MicroBatches(NamedTuple):
    """What each data-parallel rank computes a step.

    Attributes:
        rows: of one micro batch.
        accumulation: micro batches a step.
        note: for the user, if the micro batches are smaller than was asked for; "" otherwise.
    """

    rows: int
    accumulation: int
    note: str = ""


def plan_micro_batches(
    global_rows: int, micro_rows: int, dp: int, *, tp: int = 1, cp: int = 1, seq_len: int | None = None
) -> MicroBatches:
    """The largest micro batches that a rank's share of the global batch divides into.

    The global batch is what decides the training; the micro batch is bounded by memory alone. So a run goes on with
    another number of ranks as it is: fewer ranks accumulate more micro batches, and of ranks that are so many that one
    micro batch is more than their share, each takes its share at once.

    Args:
        global_rows: `train.global_batch_size`.
        micro_rows: `train.micro_batch_size`: the most rows that a rank computes at once.
        dp: data-parallel ranks, each of which has tp × cp ranks.
        seq_len: tokens of a row. Of a micro batch, each of the cp ranks has a share that the tp ranks must be able to
            divide among them; None: they are.

    Raises:
        ValueError: the global batch does not divide among so many ranks; says which numbers of ranks would do.
    """
    assert min(global_rows, micro_rows, dp, tp, cp) >= 1
    unit = 1 if seq_len is None else tp // gcd(seq_len // cp, tp)  # a micro batch has a multiple of so many rows
    share, rest = divmod(global_rows, dp)
    fitting = [rows for rows in _divisors(share, unit) if rows <= micro_rows] if share and not rest else []
    if not fitting:
        raise ValueError(_impossible(global_rows, micro_rows, dp, tp, cp, unit))
    rows, note = fitting[-1], ""
    if rows < micro_rows:
        note = (
            f"micro batches of {rows} rows instead of train.micro_batch_size={micro_rows}: on {_ranks(dp, tp, cp)} "
            f"each has {share} of the {global_rows} rows of train.global_batch_size"
        )
    return MicroBatches(rows, share // rows, note)


def _impossible(global_rows: int, micro_rows: int, dp: int, tp: int, cp: int, unit: int) -> str:
    possible = [global_rows // rows for rows in reversed(_divisors(global_rows, unit))] if unit <= micro_rows else []
    whole = f" in micro batches of a multiple of {unit} rows, whose tokens parallel.tp={tp} ranks share" * (unit > 1)
    text = f"train.global_batch_size={global_rows} does not divide among {_ranks(dp, tp, cp)}{whole}: "
    if not possible:
        multiple = -(-max(global_rows, 1) // (dp * unit)) * dp * unit
        least = f" and train.micro_batch_size={unit} or more" * (unit > micro_rows)
        return f"{text}set train.global_batch_size={multiple}{least}"
    fewer, more = [d for d in possible if d < dp], [d for d in possible if d > dp]
    near, known = fewer[-1:] + more[:1], fewer[-SHOWN:] + more[:SHOWN]
    text += f"start {' or '.join(str(d * tp * cp) for d in near)} ranks"
    if tp * cp > 1:
        text += f", each {tp * cp} of which are one data-parallel rank"
    every = ", ".join(str(d * tp * cp) for d in known) + (" …" if len(known) < len(possible) else "")
    return f"{text} (possible are {every}), or set train.global_batch_size to a multiple of {dp * unit}"


def _ranks(dp: int, tp: int, cp: int) -> str:
    layout = " × ".join(f"parallel.{name}={size}" for name, size in (("tp", tp), ("cp", cp)) if size > 1)
    return f"{dp} data-parallel ranks" + (f" ({dp * tp * cp} ranks, {layout})" if layout else "")


def _divisors(number: int, unit: int) -> list[int]:
    """Those that are multiples of `unit`, rising."""
    if number % unit:
        return []
    number //= unit
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return [unit * d for d in sorted({*low, *(number // d for d in low)})]
