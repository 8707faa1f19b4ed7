"""Nonlinear recurrences without mixing of channels, h_t = f(h_{t−1}, u_t): solved in parallel over time by shooting.

Forward (multiple shooting). Every chunk of a sequence steps through its tokens from a guess g_s of the state at its
start, all chunks at once; with Φ_s its end state and A_s = ∏_t ∂h_t/∂h_{t−1} its linearisation, the guesses become

    g_{s+1} ← Φ_s + A_s (g_s − old g_s),    g_0 the initial state,

a short scan over the chunks. This is Newton's method on the chunk boundaries alone: inside a chunk the propagation is
exact, which makes it far more robust than Newton on every state (ParaRNN, arXiv 2510.21450) where a cell is not
contractive. Each pass makes one more chunk exact, whatever A is. Where a cell is not contractive, a guess that hardly
moves proves nothing: its error may grow inside its chunk and over those after it. So once the guesses rest, one more
pass, with A uncut, must leave every state where it was. A solve that has not passed this test after the allowed passes
is finished step by step from there: what is returned is never an unconverged trajectory.

Backward. The adjoint μ_{t−1} = g_{t−1} + J_tᵀ μ_t at the stored trajectory is linear: one exact reverse scan.

Where the sequences alone fill the device there is nothing to gain from cutting them: see `plan`.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from riverrun.kernels.common.chunks import Chunks, chunk_layout, sequence_bounds
from riverrun.kernels.common.operator import operator

# Independent recurrences (sequences × channels) from which stepping all sequences through time beats shooting, which
# evaluates the cell three or four times and its Jacobian two or three. Measured on one core of a CPU, and on an H100.
SEQUENTIAL_LANES = {"cpu": 512, "cuda": 200_000}

# elements of a tensor that is linearised at a time on a CPU: the temporaries then stay in its cache
CPU_SLAB = 1 << 16

Jacobian = list[list[torch.Tensor]]
"""∂(new state i)/∂(old state j), each (…, D): K × K diagonal blocks of channels, for K state vectors."""


States = tuple[torch.Tensor, ...]


class Cell(Protocol):
    """A recurrence of K state vectors (…, D) each, driven by gate pre-activations (…, G, D); weight (P, D)."""

    num_states: int

    def run(self, start: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor, states: States) -> None:
        """From `start` (M, K, D) through all steps of `gates` (M, L, G, D); writes the K `states` (M, L, D)."""

    def linearise(
        self, before: States, gates: torch.Tensor, after: States, weight: torch.Tensor
    ) -> tuple[Jacobian, torch.Tensor, torch.Tensor]:
        """The Jacobian of each step, its derivatives by the gates (…, G, D), and one more factor (…, D) of the cell's.

        `before` and `after` are the states around the step, (…, D) each.
        """

    def gradients(
        self, adjoint: States, before: States, after: States, by_gates: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the gates (N, G, D), in place of `by_gates`, and of the weight (P, D).

        `adjoint` is dL/d(state after the step), (N, D) each; the rest as `linearise` took and gave it.
        """


@dataclass
class SolveStatistics:
    """What the forward solves of one op did since the last `take_statistics`.

    A solve is judged in pieces: as a whole in torch, one row's block of channels at a time in Triton.

    Attributes:
        pieces: pieces that were solved in parallel over time.
        passes: the most shooting passes that one of them took.
        change: the largest change that the last pass of a piece that converged made to a state (in Triton: to first
            order, would make). The error that is left is of second order in it.
        fallbacks: pieces that did not converge and were finished step by step.
        sequential: pieces that were evaluated step by step from the outset, because that is faster.
    """

    pieces: int = 0
    passes: int = 0
    change: float = 0.0
    fallbacks: int = 0
    sequential: int = 0

    def __add__(self, other: "SolveStatistics") -> "SolveStatistics":
        return SolveStatistics(
            self.pieces + other.pieces,
            max(self.passes, other.passes),
            max(self.change, other.change),
            self.fallbacks + other.fallbacks,
            self.sequential + other.sequential,
        )


_statistics: dict[str, SolveStatistics] = {}
_on_device: dict[tuple[str, torch.device], torch.Tensor] = {}


def statistics_of(name: str) -> SolveStatistics:
    """The running count of an op, to be added to."""
    return _statistics.setdefault(name, SolveStatistics())


def statistics_on(name: str, device: torch.device) -> torch.Tensor:
    """The part that kernels count on the device, without the host waiting: (3,) int32, the most passes, the bits of
    the largest (float32) change, the number of fallbacks."""
    if (name, device) not in _on_device:
        _on_device[name, device] = torch.zeros(3, dtype=torch.int32, device=device)
    return _on_device[name, device]


def take_statistics() -> dict[str, SolveStatistics]:
    """The statistics of every op that ran since the last call, by the op's name; counting starts again at zero.

    Waits for the device if there are Triton solves.
    """
    for (name, _), counts in _on_device.items():
        passes, _, fallbacks = counts.tolist()
        change = counts[1:2].view(torch.float32).item()
        if name in _statistics:
            _statistics[name] += SolveStatistics(0, passes, change, fallbacks)
        counts.zero_()
    taken = dict(_statistics)
    _statistics.clear()
    return taken


def define_op(name: str, cell: Cell) -> Callable[..., torch.Tensor]:
    """Register the solver of `cell` as a torch operator with a gradient, opaque to torch.compile.

    The operator is `(gates (B, T, G, D), weight (P, D), initial_state (S, K, D), cu_seqlens, chunk_size, tolerance,
    max_passes) → states (K, B, T, D)`; arithmetic, states and the gradient of the weight are float32, or float64 for
    float64 gates. `max_passes = 0` steps through time.
    """

    @operator(name)
    def forward(
        gates: torch.Tensor,
        weight: torch.Tensor,
        initial_state: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        chunk_size: int,
        tolerance: float,
        max_passes: int,
    ) -> torch.Tensor:
        chunks = chunk_layout(gates, chunk_size, cu_seqlens)
        return solve(name, cell, gates, weight, initial_state, chunks, tolerance, max_passes)

    @forward.register_fake
    def _(gates, weight, initial_state, cu_seqlens, chunk_size, tolerance, max_passes):
        B, T, _, D = gates.shape
        return gates.new_empty(cell.num_states, B, T, D, dtype=state_dtype(gates))

    @operator(f"{name}_backward")
    def backward(
        grad: torch.Tensor,
        states: torch.Tensor,
        gates: torch.Tensor,
        weight: torch.Tensor,
        initial_state: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        chunk_size: int,
        parallel: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chunks = chunk_layout(gates, chunk_size, cu_seqlens)
        first = sequence_bounds(gates, cu_seqlens)[:-1].to(gates.device)
        return solve_backward(cell, grad, states, gates, weight, initial_state, first, chunks, parallel)

    @backward.register_fake
    def _(grad, states, gates, weight, initial_state, cu_seqlens, chunk_size, parallel):
        return torch.empty_like(gates), torch.empty_like(weight), torch.empty_like(initial_state)

    def setup_context(ctx, inputs, output):
        gates, weight, initial_state, cu_seqlens, ctx.chunk_size, _, max_passes = inputs
        ctx.save_for_backward(output, gates, weight, initial_state, cu_seqlens)
        ctx.parallel = max_passes > 0

    def gradient(ctx, grad):
        grads = backward(grad, *ctx.saved_tensors, ctx.chunk_size, ctx.parallel)
        return *grads, None, None, None, None

    forward.register_autograd(gradient, setup_context=setup_context)
    return forward


def state_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def check_solver(op: str, chunk_size: int | None, tolerance: float, max_passes: int) -> None:
    """
    Raises:
        ValueError: a chunk size or a number of passes below 1, or a tolerance that is not positive.
    """
    for name, value, fits in [
        ("chunk_size", chunk_size, chunk_size is None or chunk_size >= 1),
        ("max_passes", max_passes, max_passes >= 1),
        ("tolerance", tolerance, tolerance > 0),
    ]:
        if not fits:
            raise ValueError(f"{op}: {name} must be {'positive' if name == 'tolerance' else 'at least 1'}, got {value}")


def plan(
    gates: torch.Tensor, cu_seqlens: torch.Tensor | None, chunk_size: int | None, max_passes: int
) -> tuple[int, int]:
    """The chunk size and the number of passes to call an op with: those of the caller, or without a chunk size the
    faster of shooting, in chunks of about the root of the sequence length, and stepping through time (0 passes)."""
    B, T, _, D = gates.shape
    if chunk_size is not None:
        return min(chunk_size, T), max_passes
    sequences = B if cu_seqlens is None else max(1, len(cu_seqlens) - 1)
    length = B * T // sequences
    if length <= 32 or sequences * D >= SEQUENTIAL_LANES.get(gates.device.type, SEQUENTIAL_LANES["cuda"]):
        return (T if cu_seqlens is None else 32), 0  # short chunks waste little on the ends of documents
    return 1 << max(4, length.bit_length() // 2), max_passes


def final_state(states: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """states (K, B, T, D) → the last ones of each sequence (S, K, D)."""
    if cu_seqlens is None:
        return states[:, :, -1].transpose(0, 1).contiguous()
    return states[:, 0].index_select(1, cu_seqlens[1:].long() - 1).transpose(0, 1).contiguous()


def solve(
    name: str,
    cell: Cell,
    gates: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor,
    chunks: Chunks,
    tolerance: float,
    max_passes: int,
) -> torch.Tensor:
    """→ states (K, B, T, D). In here the chunk axis M comes first: gates (M, L, G, D), boundary states (M, K, D)."""
    dtype = state_dtype(gates)
    gates, weight, initial_state = _split(chunks, gates).to(dtype), weight.to(dtype), initial_state.to(dtype)
    M, L, _, D = gates.shape
    all_states = gates.new_empty(cell.num_states, M, L, D)
    states = all_states.unbind(0)

    passes, converged = 0, False
    if max_passes:
        passes, change = _shoot(cell, gates, weight, initial_state, states, chunks, tolerance, max_passes)
        converged = change <= tolerance
        record_solve(name, passes, change, converged)
    else:
        statistics_of(name).sequential += 1
    if not converged:
        # step through time, from the chunks on that are not exact yet
        for s in range(passes, len(chunks.active)):
            rows = chunks.step(s)
            before = [x[_previous(chunks, s), -1] for x in states] if s else None
            start = chunks.sort(initial_state) if before is None else torch.stack(before, dim=1)
            cell.run(start, gates[rows], weight, tuple(x[rows] for x in states))
    return all_states if _whole_rows(chunks) else torch.stack([chunks.join(s) for s in states])


def _shoot(
    cell: Cell,
    gates: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor,
    states: States,
    chunks: Chunks,
    tolerance: float,
    max_passes: int,
) -> tuple[int, float]:
    """Passes over all chunks, which write `states`, until none of these changes by more than `tolerance`.

    Returns:
        The number of passes, which is also the number of leading chunks of each sequence that are exact for certain,
        and how much the last pass changed any state: infinity if the pass before had not settled the chunks' starts.
    """
    start = torch.cat([chunks.sort(initial_state), _guess(cell, gates, weight, chunks)])
    settled: States | None = None
    change = math.inf
    for passes in range(1, max_passes + 1):
        cell.run(start, gates, weight, states)
        if passes == len(chunks.active):
            return passes, 0.0  # one more chunk each pass has started from an exact state: all have
        if settled is not None:
            padding = ~chunks.valid[..., None]
            change = max((x - y).masked_fill_(padding, 0).abs().max().item() for x, y in zip(states, settled))
            if change <= tolerance:
                break
        end = torch.stack([s[:, -1] for s in states], dim=1)
        A = _chunk_jacobian(cell, start, gates, states, weight)

        def correct(A: torch.Tensor, end: torch.Tensor = end, old: torch.Tensor = start) -> torch.Tensor:
            return chunks.scan(_correct, initial_state, end, A, old)[0]

        new = correct(A.nan_to_num(nan=0.0).clamp(-1, 1))  # lest far starts overshoot and overflow
        settled, change = None, math.inf
        if (new - start).abs().max().item() <= tolerance:
            settled = tuple(s.clone() for s in states)
            uncut = correct(A)
            new = torch.where(uncut.isfinite(), uncut, new)
        start = new
    return passes, change


def _correct(g: torch.Tensor, end: torch.Tensor, A: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The start (n, K, D) of the next chunks, to first order, for starts `g` of chunks that ran from `old` to `end`."""
    return end + (A * (g - old)[:, None]).sum(2)


def _previous(chunks: Chunks, s: int) -> slice:
    """The chunks before those of scan step `s`, in their sequences."""
    start = chunks.step(s - 1).start
    return slice(start, start + chunks.active[s])


def _whole_rows(chunks: Chunks) -> bool:
    """Every row of the batch is one chunk, which needs no copy."""
    return chunks.index.shape == chunks.shape


def _split(chunks: Chunks, x: torch.Tensor) -> torch.Tensor:
    return x if _whole_rows(chunks) else chunks.split(x)


def record_solve(name: str, passes: int, change: float, converged: bool) -> None:
    """Counts a solve that the host knows the outcome of, and warns of one that did not converge."""
    statistics = statistics_of(name)
    statistics.pieces += 1
    statistics.passes = max(statistics.passes, passes)
    if converged:
        statistics.change = max(statistics.change, change)
        return
    statistics.fallbacks += 1
    warnings.warn(
        f"{name}: shooting did not converge and the states were computed step by step, which is exact but slow; "
        "keep the recurrent weights small (|a| ≤ 0.5), or allow more passes",
        RuntimeWarning,
        stacklevel=2,
    )


def _guess(cell: Cell, gates: torch.Tensor, weight: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """f(0, u) of the token before each chunk but the first of every sequence."""
    previous = [gates[_previous(chunks, s), -1:] for s in range(1, len(chunks.active))]
    if not previous:
        return gates.new_empty(0, cell.num_states, gates.shape[-1])
    last = torch.cat(previous)
    states = tuple(gates.new_empty(len(last), 1, gates.shape[-1]) for _ in range(cell.num_states))
    cell.run(gates.new_zeros(len(last), cell.num_states, gates.shape[-1]), last, weight, states)
    return torch.cat(states, dim=1)


def _chunk_jacobian(
    cell: Cell, start: torch.Tensor, gates: torch.Tensor, states: States, weight: torch.Tensor
) -> torch.Tensor:
    """A (M, K, K, D) of each chunk."""
    before = tuple(torch.cat([s[:, None], x[:, :-1]], dim=1) for s, x in zip(start.unbind(1), states))
    A = []
    for rows in _slabs(gates):
        steps, *_ = cell.linearise(tuple(x[rows] for x in before), gates[rows], tuple(x[rows] for x in states), weight)
        A.append(torch.stack([torch.stack(row, dim=1) for row in _product(steps)], dim=1))
    return torch.cat(A)


def _product(steps: Jacobian) -> Jacobian:
    """The product over time, the last step leftmost, of K × K blocks (M, L, D) → (M, D): pairs, pairs of pairs, …"""
    K = range(len(steps))
    while (L := steps[0][0].shape[1]) > 1:
        early = [[x[:, 0 : L - 1 : 2] for x in row] for row in steps]
        late = [[x[:, 1:L:2] for x in row] for row in steps]
        pairs = [[_sum(late[i][k] * early[k][j] for k in K) for j in K] for i in K]
        steps = [[torch.cat([pairs[i][j], steps[i][j][:, L - L % 2 :]], dim=1) for j in K] for i in K]
    return [[x[:, 0] for x in row] for row in steps]


def solve_backward(
    cell: Cell,
    grad: torch.Tensor,
    states: torch.Tensor,
    gates: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor,
    first: torch.Tensor,
    chunks: Chunks,
    parallel: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of gates, weight and initial state. `first`: the places of the sequences' first tokens."""
    dtype = states.dtype
    B, T, G, D = gates.shape
    after = states.flatten(1, 2)  # (K, B·T, D)
    before = after.roll(1, dims=1)
    before[:, first] = initial_state.to(dtype).transpose(0, 1)
    J, by_gates, factor = _linearise(cell, before, gates.view(B * T, G, D), after, weight.to(dtype))

    # (M, L, D) each; the adjoints take the place of the gradients
    adjoint = [g.clone() if _whole_rows(chunks) else chunks.split(g) for g in grad.unbind(0)]
    split_J = [[_split(chunks, x.view(B, T, D)) for x in row] for row in J]
    carry = _chunk_carries(split_J, adjoint, chunks) if parallel and len(chunks.active) > 1 else None
    _reverse(split_J, adjoint, chunks, carry)
    if not _whole_rows(chunks):
        adjoint = [chunks.join(x) for x in adjoint]
    adjoint = [x.view(B * T, D) for x in adjoint]

    grad_weight = torch.zeros_like(weight, dtype=dtype)
    for rows in _slabs(adjoint[0]):
        mu, old, new = (tuple(x[rows] for x in states) for states in (adjoint, before, after))
        _, partial = cell.gradients(mu, old, new, by_gates[rows], factor[rows])
        grad_weight += partial
    grad_initial = _transpose_apply([[x[first] for x in row] for row in J], [x[first] for x in adjoint])
    return (
        by_gates.view(B, T, G, D).to(gates.dtype),
        grad_weight.to(weight.dtype),
        torch.stack(grad_initial, dim=1).to(initial_state.dtype),
    )


def _slabs(x: torch.Tensor) -> list[slice]:
    """Cut the first axis of `x`."""
    size = max(1, CPU_SLAB // x[0].numel()) if x.device.type == "cpu" else len(x)
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _linearise(
    cell: Cell, before: torch.Tensor, gates: torch.Tensor, after: torch.Tensor, weight: torch.Tensor
) -> tuple[Jacobian, torch.Tensor, torch.Tensor]:
    """`cell.linearise` of all N tokens, slab by slab; before, after (K, N, D), gates (N, G, D)."""
    K, like = range(cell.num_states), after[0]
    J = [[torch.empty_like(like) for _ in K] for _ in K]
    by_gates, factor = torch.empty_like(gates, dtype=like.dtype), torch.empty_like(like)
    for rows in _slabs(like):
        part, by_gates[rows], factor[rows] = cell.linearise(
            before[:, rows].unbind(0), gates[rows].to(like.dtype), after[:, rows].unbind(0), weight
        )
        for i in K:
            for j in K:
                J[i][j][rows] = part[i][j]
    return J, by_gates, factor


def _sum(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, terms)


def _transpose_apply(J: Jacobian, adjoint: list[torch.Tensor]) -> list[torch.Tensor]:
    return [_sum(J[i][j] * adjoint[i] for i in range(len(J))) for j in range(len(J))]


def _sweep_back(J: Jacobian, grad: list[torch.Tensor], carry: list[torch.Tensor]) -> list[torch.Tensor]:
    """Turn `grad` (M, L, D) of each state into its adjoint, in place, with `carry` = Jᵀμ of the step after the chunk.

    Returns:
        Jᵀμ of the chunk's first step.
    """
    J_t = [[x.unbind(1) for x in row] for row in J]
    mu = [x.unbind(1) for x in grad]
    K = range(len(J))
    for j in K:
        mu[j][-1].add_(carry[j])
    for t in range(grad[0].shape[1] - 2, -1, -1):
        for j in K:
            for i in K:
                mu[j][t].addcmul_(J_t[i][j][t + 1], mu[i][t + 1])
    return _transpose_apply([[x[0] for x in row] for row in J_t], [x[0] for x in mu])


def _reverse(J: Jacobian, grad: list[torch.Tensor], chunks: Chunks, carry: list[torch.Tensor] | None) -> None:
    """Adjoints in place of `grad`: of all chunks at once if their `carry` is known, else from the last to the first."""
    if carry is not None:
        _sweep_back(J, grad, carry)
        return
    state = [x.new_zeros(chunks.active[0], x.shape[-1]) for x in grad]
    for s in range(len(chunks.active) - 1, -1, -1):
        rows, n = chunks.step(s), chunks.active[s]
        out = _sweep_back([[x[rows] for x in row] for row in J], [x[rows] for x in grad], [x[:n] for x in state])
        for x, y in zip(state, out):
            x[:n] = y


def _chunk_carries(J: Jacobian, grad: list[torch.Tensor], chunks: Chunks) -> list[torch.Tensor]:
    """Jᵀμ of the step after each chunk, (M, D) a state: a reverse scan over the chunks' own sums and Jacobians."""
    nothing = [torch.zeros_like(x[:, 0]) for x in grad]
    own = _sweep_back(J, [x.clone() for x in grad], nothing)
    A = _product(J)
    carry = nothing
    for s in range(len(chunks.active) - 1, 0, -1):
        rows = chunks.step(s)
        for j in range(len(J)):
            out = own[j][rows]
            for i in range(len(J)):
                # a Jacobian that overflowed says nothing where there is nothing to carry
                out = out + torch.where(carry[i][rows] == 0, 0, A[i][j][rows] * carry[i][rows])
            carry[j][_previous(chunks, s)] = out
    return carry
