"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

import math

from riverrun.train.config import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor, in [0, 1], on every group's peak learning rate at optimiser step `step` of `steps`, from 0.

    Linear warm-up to 1 over `warmup_steps` steps (the last of them runs at the peak), then
    - cosine: half a cosine from 1 to `min_lr_ratio`, reached in the very last step (Loshchilov & Hutter 2017);
    - wsd: constant, then over the last `decay_steps` steps 1 - (1 - min_lr_ratio)·√p with p the part of the decay that
      is done: the "1-sqrt" shape that Hägele et al. 2024 (arXiv:2405.18392) found best. Its constant part does not
      depend on `steps`, so a run can be resumed with more steps.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step {step} lies outside a schedule of {steps} steps")
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "cosine":
        done = (step + 1 - config.warmup_steps) / (steps - config.warmup_steps)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
    done = max(0.0, (step + 1 - (steps - config.decay_steps)) / config.decay_steps)
    return 1 - (1 - config.min_lr_ratio) * math.sqrt(done)
