"""Programs that meet: those that hold the tiles of one head's state wait for each other's numbers, in the same kernel.

They run at the same time, for there are no more of them than the GPU takes at once (a cooperative launch: it fails
otherwise). Each counts itself into its team's counter when what it wrote may be read, and goes on when all have.
"""

import triton
import triton.language as tl


@triton.jit
def arrive(counter):
    """What this program has written may be read by the team."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def wait(counter, arrivals):
    """Until there were so many arrivals: what those wrote before may be read, past the first-level cache."""
    while tl.atomic_add(counter, 0, sem="acquire") < arrivals:
        pass
    tl.debug_barrier()
