import math
from itertools import pairwise

import pytest

from riverrun.train.config import ScheduleConfig
from riverrun.train.schedule import lr_factor


def factors(steps, **fields):
    return [lr_factor(ScheduleConfig(**fields), step, steps) for step in range(steps)]


def test_cosine_warms_up_peaks_and_ends_at_the_minimum():
    got = factors(20, name="cosine", warmup_steps=4, min_lr_ratio=0.1)
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    assert got[11] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the way down
    assert got[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(got[3:]))


def test_wsd_is_constant_then_falls_as_one_minus_sqrt():
    got = factors(20, name="wsd", warmup_steps=2, decay_steps=8, min_lr_ratio=0.0)
    assert got[1:12] == [1.0] * 11
    assert got[12:] == pytest.approx([1 - math.sqrt(i / 8) for i in range(1, 9)])
    longer = factors(30, name="wsd", warmup_steps=2, decay_steps=8, min_lr_ratio=0.0)
    assert longer[:12] == got[:12], "a run resumed with more steps has the same past"


def test_no_warmup_and_no_step_beyond_the_end():
    assert factors(4, name="cosine", warmup_steps=0, min_lr_ratio=1.0) == [1.0] * 4
    with pytest.raises(ValueError, match="outside a schedule of 4 steps"):
        lr_factor(ScheduleConfig(warmup_steps=0), 4, 4)
