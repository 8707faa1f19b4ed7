"""What decoding keeps between calls of a model whose core runs several times."""

from collections.abc import Iterator

from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.mixers import States


class DepthCache(RiverrunCache):
    """States of the prelude's and the coda's layers, and slots of states of the core's.

    Iteration t has a slot of its own, as in the full forward; or slot t mod `slots`, if that is given (Huginn's sharing
    of keys and values, arXiv 2502.05171): it starts from that slot's states of the tokens before the call, and replaces
    them, so that the slot holds those of the last such iteration. Of attention these are keys and values, of recurrent
    layers the state at the boundary of the call; a call of all tokens at once computes the same either way.

    Args:
        outside: layers of prelude and coda.
        core: layers of the core.
        slots: see above; None: every iteration has its own.

    Attributes:
        layers: the prelude's, the coda's, then the core's, slot t after slot t − 1; slots are added as they are needed.

    Raises:
        ValueError: `slots` below 1.
    """

    def __init__(self, outside: int, core: int, slots: int | None = None):
        if slots is not None and slots < 1:
            raise ValueError(f"slots={slots} must be at least 1 for the core's iterations to share, or None")
        super().__init__(outside)
        self.outside, self.core, self.slots = outside, core, slots
        self.num_steps: int | None = None  # of the calls so far

    def iterations(self, num_steps: int) -> Iterator[list[States]]:
        """The core's states for each iteration of a call, which writes those after its tokens into them.

        Raises:
            ValueError: the cache was filled by another number of iterations, or has more slots than iterations.
        """
        if self.slots is None and self.num_steps not in (None, num_steps):
            raise ValueError(
                f"num_steps={num_steps} cannot go on from a cache of num_steps={self.num_steps}, which has states for "
                "each iteration: keep to one number, or let iterations share slots (make_cache(slots=1))"
            )
        if self.slots is not None and num_steps < self.slots:
            raise ValueError(
                f"num_steps={num_steps} would leave some of the {self.slots} slots without these tokens: make a cache "
                f"of at most {num_steps} slots, or run the core at least {self.slots} times"
            )
        self.num_steps = num_steps
        slots = self.slots or num_steps
        while len(self.layers) < self.outside + slots * self.core:
            self.layers.append({})
        return self._iterations(num_steps, slots)

    def _iterations(self, num_steps: int, slots: int) -> Iterator[list[States]]:
        before = [dict(states) for states in self.layers[self.outside :]]
        for t in range(num_steps):
            first = t % slots * self.core
            states = [dict(before[i]) for i in range(first, first + self.core)]
            self.layers[self.outside + first : self.outside + first + self.core] = states
            yield states
