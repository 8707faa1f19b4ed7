"""Watches for steps that the engine skipped because a loss or a gradient was not finite."""

LIMIT = 10  # skipped steps in a row: a spike is over by then, a diverged model is not


class Diverged(ValueError):
    """Training cannot go on as it is."""


class Guard:
    """Counts skipped steps. A skipped step uses up its data and its place in the schedule, but changes no weight."""

    def __init__(self) -> None:
        self.skipped = 0
        self.in_a_row = 0

    def observe(self, skipped: bool) -> None:
        """Takes note of a step.

        Raises:
            Diverged: `LIMIT` steps in a row were skipped.
        """
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= LIMIT:
            raise Diverged(
                f"the loss or the gradient was not finite in {self.in_a_row} steps in a row, on every attempt: all of "
                "them were skipped. Lower optimizer.lr, warm up longer (schedule.warmup_steps) or train in "
                "train.dtype='fp32'"
            )

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
