"""Recurrence counts: against the table of two million draws of Huginn's sampler, a simulation, and their limits."""

import numpy as np
import pytest

from riverrun.modeling.depth.counts import RecurrenceDistribution
from riverrun.modeling.depth.options import DepthOptions

QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99, 0.999)


def distribution(mean, depth, **options):
    return RecurrenceDistribution(DepthOptions(mean_recurrence=mean, backprop_depth=depth, **options))


def moments(found):
    counts = np.arange(len(found.pmf))
    mean = counts @ np.array(found.pmf)
    return mean, np.sqrt((counts - mean) ** 2 @ np.array(found.pmf))


@pytest.mark.parametrize(
    ("mean", "depth", "p", "deviation", "graded"),
    [(32, 8, 33.0, 18.0, 7.98), (16, 8, 17.0, 9.4, 7.74), (8, 4, 9.0, 5.1, 3.86), (4, 4, 5.0, 2.9, 3.41)],
)
def test_means_of_two_million_draws(mean, depth, p, deviation, graded):
    found = distribution(mean, depth)
    assert sum(found.pmf) == pytest.approx(1) and min(found.pmf) >= 0 and found.pmf[0] == 0
    assert moments(found) == (pytest.approx(p, abs=0.06), pytest.approx(deviation, abs=0.25))  # whose tail is not cut
    n, k = found.mean_steps
    assert k == pytest.approx(graded, abs=0.006)
    assert n + k == pytest.approx(moments(found)[0])


def test_quantiles_of_two_million_draws():
    found = distribution(32, 8)
    assert [found.quantile(u) for u in QUANTILES] == [8, 12, 29, 67, 94, 136]
    assert sum(found.pmf[:8]) == pytest.approx(0.009, abs=5e-4)
    assert found.mean_steps[0] == pytest.approx(25.0, abs=0.02)
    assert [distribution(mean, 4).quantile(0.99) for mean in (16, 8)] == [48, 26]


@pytest.mark.parametrize("sigma", [0.5, 1.0, 0.0])
def test_probabilities_are_those_of_the_sampler(sigma):
    """Draws of τ and p as the definition has them; the last probability is that of the whole tail."""
    found, draws = distribution(8, 4, sigma=sigma), 400_000
    rng = np.random.default_rng(0)
    p = rng.poisson(np.exp(rng.normal(np.log(8) - sigma**2 / 2, sigma, draws))) + 1
    share = np.bincount(np.minimum(p, found.largest), minlength=found.largest + 1) / draws
    assert np.abs(share - found.pmf).max() < 5 * np.sqrt(max(found.pmf) / draws)


def test_no_count_is_beyond_the_cap():
    found = distribution(32, 8)
    assert found.largest == found.quantile(np.nextafter(1, 0)) == 136
    assert sum(found.pmf[:-1]) < 0.999 <= 1 and found.pmf[-1] > 0
    assert found.quantile(0.0) >= 1


def test_a_uniform_number_gives_the_distribution():
    found = distribution(4, 2)
    drawn = [found.quantile(u) for u in (np.arange(20_000) + 0.5) / 20_000]
    assert np.abs(np.bincount(drawn) / 20_000 - found.pmf).max() < 1e-4


def test_fixed_counts():
    found = distribution(6, 4, sampling="fixed")
    assert found.largest == 6 and found.mean_steps == (2, 4)
    assert {found.quantile(u) for u in (0.0, 0.5, 0.999)} == {6}


@pytest.mark.parametrize(("count", "steps"), [(1, (0, 1)), (4, (0, 4)), (5, (1, 4)), (40, (36, 4))])
def test_the_last_iterations_backpropagate(count, steps):
    assert distribution(8, 4).split(count) == steps
