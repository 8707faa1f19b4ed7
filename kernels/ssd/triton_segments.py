"""The states between segments of a sequence, where its walk is cut (see `common/triton_segments.py`).

Each segment is a sequence to the kernels, in whole chunks: chunks, states and gradients are those of a walk in one
piece, and the kernels know nothing of segments. What they need is the state that each begins with. A segment scales a
state by one number a head, e^{Σ Δ A}, and adds something to it: `states_kernel` finds both, for all segments side by
side, walking from zeros and keeping the last state alone. `between_kernel` puts them together along each sequence,

    forwards  H' = decay · H + added        backwards, for adjoints,  dH = decay · dH' + added

from the initial state, or the adjoint of the final one, to the final state, or the initial one's adjoint. Segments end
where documents end, so that nothing is handed to the next document. All walks stay in a fixed order, and the host reads
no bounds. It costs a walk without outputs, the cheapest there is.

A program owns one sequence, one head and BLOCK numbers of the state.
"""

import triton
import triton.language as tl


@triton.jit
def between_kernel(
    added,  # (segments, H, P, N) float32
    decay,  # (segments, H) float32
    outer,  # (S, H, P, N) float32: initial states, or the adjoints of final ones
    states,  # (segments, H, P, N) float32: where each segment's walk begins
    last_state,  # (S, H, P, N) float32: after all segments
    first,  # (S + 1,) int32, the segments before each sequence
    H: tl.constexpr,
    NUMBERS: tl.constexpr,  # of a state
    BLOCK: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    KEEP_LAST: tl.constexpr,
    BACKWARD: tl.constexpr,
    STAGES: tl.constexpr,
):
    walk, block = tl.program_id(0) // tl.cdiv(NUMBERS, BLOCK), tl.program_id(0) % tl.cdiv(NUMBERS, BLOCK)
    s, h = (walk // H).to(tl.int64), walk % H
    number = block * BLOCK + tl.arange(0, BLOCK)
    here = number < NUMBERS
    begin, end = tl.load(first + s), tl.load(first + s + 1)
    if HAS_OUTER:
        state = tl.load(outer + (s * H + h) * NUMBERS + number, mask=here, other=0.0)
    else:
        state = tl.zeros([BLOCK], tl.float32)
    for done in tl.range(0, end - begin, num_stages=STAGES):
        at = (end - 1 - done if BACKWARD else begin + done).to(tl.int64) * H + h
        tl.store(states + at * NUMBERS + number, state, mask=here)
        more = tl.load(added + at * NUMBERS + number, mask=here, other=0.0)
        state = state * tl.load(decay + at) + more
    if KEEP_LAST:
        tl.store(last_state + (s * H + h) * NUMBERS + number, state, mask=here)
