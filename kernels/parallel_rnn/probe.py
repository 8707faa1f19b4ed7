"""Does a user's step keep the rules that solving it in parallel rests on? Tried out on a few tokens, on first use."""

from collections.abc import Callable, Iterator

import torch

REAL = 4  # tokens of the caller's
ROWS = 8  # with random ones


def check_step(op: str, step: Callable, num_states: int, gates: torch.Tensor, weight: torch.Tensor) -> None:
    """Try `step` on tokens of `gates` (B, T, G, D) and on random ones, in the solver's type, with `weight` (P, D).

    Raises:
        ValueError: the step returns something else than `num_states` tensors like its states, changes its arguments
            in place, draws random numbers, or lets an element of another channel or another token in.
    """
    with torch.no_grad():
        _check(op, step, num_states, gates, weight)


def _check(op: str, step: Callable, num_states: int, gates: torch.Tensor, weight: torch.Tensor) -> None:
    generator = torch.Generator(gates.device).manual_seed(0)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)

    *_, G, D = gates.shape
    real = gates.flatten(0, 1)[:REAL]
    u = noise(gates.new_empty(ROWS, G, D))
    u[: len(real)] = real
    state = tuple(noise(u[:, 0]) for _ in range(num_states))
    weight = weight + 0.1 * noise(weight)  # weights may start at zero, where they hide what they multiply

    arguments = [x.clone() for x in (*state, u, weight)]
    try:
        out = step(state, u, weight)
    except Exception as error:
        error.add_note(
            f"raised by the step of {op}, with a tuple of {num_states} state(s) ({ROWS}, {D}), u ({ROWS}, {G}, {D}) "
            f"and weight ({len(weight)}, {D})"
        )
        raise
    _check_output(op, out, state)
    if not all(_same(x, y).all() for x, y in zip(arguments, (*state, u, weight))):
        raise ValueError(
            f"{op}: the step changes its arguments in place; write h = h + x, not h += x or h.add_(x), "
            "or clone the argument first"
        )
    if not all(_same(x, y).all() for x, y in zip(out, step(state, u, weight))):
        raise ValueError(
            f"{op}: the step returns something else on every call; draw random numbers (dropout) before the cell and "
            "pass them in as one of its gates"
        )
    for axis, moved in _moves(u[:, 0]):
        shifted = tuple(torch.where(moved, x + noise(x), x) for x in state)
        changed_u = torch.where(moved[:, None], u + noise(u), u)
        changed_weight = torch.where(moved[:1], weight + 0.1 * noise(weight), weight) if axis == "channel" else weight
        after = step(shifted, changed_u, changed_weight)
        if not all((_same(x, y) | moved).all() for x, y in zip(out, after)):
            if axis == "channel":
                raise ValueError(
                    f"{op}: the step mixes channels: a new state depends on another channel's inputs. Each channel "
                    "must be a recurrence of its own to be solved in parallel; mix channels in a projection before or "
                    "after the cell (a recurrent matrix needs a cell of riverrun.kernels.head_rnn)"
                )
            raise ValueError(
                f"{op}: the step mixes rows: a token's new state depends on another token's inputs. The first axis of "
                f"states (N, {D}) and u (N, {G}, {D}) holds unrelated tokens; do not reduce, normalise or unbind it"
            )


def _check_output(op: str, out: object, state: tuple[torch.Tensor, ...]) -> None:
    if not isinstance(out, tuple | list):
        hint = "write `return (h,)`, with the comma" if len(state) == 1 else "write `return c, h`"
        raise ValueError(f"{op}: the step must return a tuple of its new states ({hint}), got {type(out).__name__}")
    if len(out) != len(state):
        raise ValueError(
            f"{op}: the step returned {len(out)} states, but the cell has num_states={len(state)}; return as many as "
            f"it gets, or build the cell with ParallelCell(step, num_states={len(out)})"
        )
    for i, (new, old) in enumerate(zip(out, state)):
        if not isinstance(new, torch.Tensor):
            raise ValueError(f"{op}: new state {i} must be a tensor, got {type(new).__name__}")
        if new.shape != old.shape:
            raise ValueError(
                f"{op}: new state {i} must have the shape (N, D) = {tuple(old.shape)} of the states that the step "
                f"gets, got {tuple(new.shape)}; u is (N, G, D) and weight (P, D): take one pre-activation with u[:, g] "
                "and one weight with weight[p]"
            )
        if new.dtype != old.dtype:
            raise ValueError(f"{op}: new state {i} must stay {old.dtype}, got {new.dtype}; do not cast in the step")


def _moves(like: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Masks (N, D) of what to change, so that for any two rows and any two channels one changes and the other does not:
    the indices of two differ in some bit."""
    for axis, size in enumerate(like.shape):
        index = torch.arange(size, device=like.device)
        for bit in range((size - 1).bit_length()):
            chosen = (index >> bit & 1).bool()
            for mask in (chosen, ~chosen):
                yield ("row", "channel")[axis], (mask[:, None] if axis == 0 else mask[None]).expand(like.shape)


def _same(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x == y) | (x.isnan() & y.isnan())
