'''Bring your own nonlinear RNN cell: one step in plain torch, trained in parallel over time.

A cell whose channels do not mix, h_t = f(h_{t−1}, u_t) channel by channel with a few state vectors, needs no kernel to
be trained in parallel. Write the step:

    from riverrun.kernels.parallel_rnn import ParallelCell

    @ParallelCell
    def light_cell(state, u, weight):
        """f = σ(a h + u_f), h ← (1 − f) h + f tanh(u_c)"""
        (h,), (u_f, u_c), (a,) = state, u.unbind(1), weight
        f = torch.sigmoid(a * h + u_f)
        return ((1 - f) * h + f * torch.tanh(u_c),)

    (h,), final_state = light_cell(gates, weight)  # gates (B, T, 2, D), weight (1, D) → h (B, T, D)

and Riverrun derives the Jacobian and both gradients. docs/bring-your-own-cell.md has a whole example, a mixer around
the cell and its training.
'''

from collections.abc import Callable

import torch

from riverrun.kernels.common.backend import check_shape, resolve_backend
from riverrun.kernels.common.shooting import check_solver, final_state, plan, state_dtype
from riverrun.kernels.parallel_rnn.chunked import parallel_rnn_chunked
from riverrun.kernels.parallel_rnn.probe import check_step
from riverrun.kernels.parallel_rnn.reference import parallel_rnn_reference

Step = Callable[[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
"""(K states (N, D), pre-activations u (N, G, D), weight (P, D)) → the K new states (N, D)."""


class ParallelCell:
    """A recurrence given by its step, to be called like the other ops; a decorator for cells of one state.

    The step sees N independent tokens at a time, of different places and sequences, and must treat every row and every
    channel alone: arithmetic, activations, `where`, anything among the G pre-activations, the P weights and the K
    states of one channel, but no matrix product, norm, softmax, cumulative sum or shift over N or D. Put those before
    the cell (what they take from the inputs) or after it. It must not draw random numbers or change its arguments in
    place. It is called in float32 (float64 for float64 gates), without autocast, and is tried out when it first meets
    a shape.

    How it is solved: `riverrun.kernels.common.shooting`, with K × K Jacobians a channel by reverse-mode
    differentiation of the step. The more contractive the cell (keep recurrent weights small), the fewer passes; one
    that is chaotic comes out right, step by step. `take_statistics` there tells, under the cell's name.
    The gradient is exact at the trajectory that the forward pass found. torch.compile does not look inside.

    Args:
        step: see `Step`.
        num_states: K. Solving costs about K² as much memory as the states themselves.
        name: in statistics and messages; the step's own by default.
    """

    def __init__(self, step: Step, num_states: int = 1, name: str | None = None):
        self.step = step
        self.num_states = num_states
        self.name: str = name or str(getattr(step, "__name__", type(step).__name__))
        self.__doc__ = step.__doc__ or type(self).__doc__
        if num_states < 1:
            raise ValueError(f"{self.name}: num_states must be at least 1, got {num_states}")
        self._checked: set[tuple] = set()

    @torch.compiler.disable
    def __call__(
        self,
        gates: torch.Tensor,
        weight: torch.Tensor,
        *,
        initial_state: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        backend: str = "auto",
        chunk_size: int | None = None,
        tolerance: float = 1e-5,
        max_passes: int = 8,
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Run the cell over sequences.

        Args:
            gates: (B, T, G, D), what drives the cell, in any floating type.
            weight: (P, D), the recurrent weights.
            initial_state: (S, K, D), zeros if None. S is the batch size, or the number of documents.
            cu_seqlens: (S + 1,) integers rising strictly from 0 to T: the bounds of documents packed into a batch of
                one row.
            backend: "reference" (a loop that autograd records), "chunked" (the parallel solver) or "auto": the loop
                for a single step, else the solver.
            chunk_size: tokens a chunk of the solver; T steps through time. Default: what is faster for a simple cell.
            tolerance: how much the last pass may change a state for the solve to have converged.
            max_passes: after so many, a solve that has not converged is finished step by step, exact but slow.

        Returns:
            The K states after every token, (B, T, D) each, in the dtype of `gates`; and the final state (S, K, D) in
            float32 (float64 if `gates` is float64).

        Raises:
            ValueError: an argument of the wrong shape, bad `cu_seqlens`, a chunk size or number of passes below 1, a
                tolerance that is not positive, a backend that there is not, or a step that breaks the rules above.
        """
        op = self.name
        if gates.dim() != 4 or 0 in gates.shape:
            raise ValueError(f"{op}: gates must have shape (B, T, G, D), all at least 1, got {tuple(gates.shape)}")
        B, T, G, D = gates.shape
        if weight.dim() != 2:
            raise ValueError(f"{op}: weight must have shape (P, {D}), got {tuple(weight.shape)}")
        check_shape(op, "weight", weight, (len(weight), D), "(P, D)")
        S = B if cu_seqlens is None else len(cu_seqlens) - 1
        dtype = state_dtype(gates)
        if initial_state is None:
            initial_state = gates.new_zeros(S, self.num_states, D, dtype=dtype)
        check_shape(op, "initial_state", initial_state, (S, self.num_states, D), "(S, num_states, D)")
        check_solver(op, chunk_size, tolerance, max_passes)
        chosen = resolve_backend(op, backend, gates, T)

        case = (G, D, len(weight), dtype, gates.device)
        initial_state = initial_state.to(dtype)
        with torch.autocast(gates.device.type, enabled=False):  # it would run products among the K states in bfloat16
            if case not in self._checked:
                check_step(op, self.step, self.num_states, gates.detach().to(dtype), weight.detach().to(dtype))
                self._checked.add(case)
            if chosen == "reference":
                states = parallel_rnn_reference(self.step, gates, weight, initial_state, cu_seqlens)
            else:
                chunk_size, max_passes = plan(gates, cu_seqlens, chunk_size, max_passes)
                states = parallel_rnn_chunked(
                    op, self.step, gates, weight, initial_state, cu_seqlens, chunk_size, tolerance, max_passes
                )
        return tuple(s.to(gates.dtype) for s in states.unbind(0)), final_state(states, cu_seqlens)
