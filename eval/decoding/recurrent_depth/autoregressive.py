"""Token by token, with the same number of iterations for each."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from riverrun.eval.decoding.recurrent_depth.sampler import Progress, Sampler
from riverrun.modeling.layout import Layout


@dataclass(frozen=True)
class Autoregressive(Sampler):
    """r iterations a token.

    Attributes:
        slots: that iterations share (KV sharing, arXiv 2502.05171, §6.2); None: each has its own, as in training.

    Raises:
        ValueError: slots below 1.
    """

    slots: int | None = None

    def __post_init__(self) -> None:
        check_slots("ar", self.slots)

    @property
    def shared_slots(self) -> int | None:
        return self.slots

    def check(self, num_steps: int, num_samples: int) -> None:
        check_filled("ar", self.slots, num_steps)

    def tokens(self, progress: Progress) -> Iterator[torch.Tensor]:
        cache, new, r = progress.cache, progress.first, progress.num_steps
        while True:
            layout = Layout.of_rows((len(new), 1), cache.next_position)  # type: ignore[arg-type]
            hidden = progress.body(new, layout, cache, steps=(r, 0))
            progress.calls += r
            progress.iterations += r * len(new)
            progress.had[r] += len(new)
            new = progress.choice.choose(progress.logits(hidden))[:, None]
            yield new


def check_slots(sampler: str, slots: int | None) -> None:
    """Raises ValueError for no slot at all."""
    if slots is not None and slots < 1:
        raise ValueError(f"{sampler}.slots={slots} must be at least 1 for iterations to share")


def check_filled(sampler: str, slots: int | None, num_steps: int) -> None:
    """Raises ValueError where some slots would be left empty."""
    if slots is not None and slots > num_steps:
        raise ValueError(
            f"{sampler}.slots={slots} are more than the {num_steps} iterations that would fill them: ask for fewer "
            "slots or more iterations (--num-steps)"
        )
