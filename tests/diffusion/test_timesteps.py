import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from sora_train.config.diffusion import TimestepConfig, TimestepDistribution
from sora_train.diffusion.timesteps import sample_t, sampler_grid, shifted, size_shift


def draws(config: TimestepConfig, num_tokens: int = 100, count: int = 4000) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=0))
    return np.array([sample_t(config, num_tokens, generator) for _ in range(count)])


def test_uniform_covers_the_interval_evenly():
    t = draws(TimestepConfig(distribution=TimestepDistribution.uniform))
    counts, _ = np.histogram(t, bins=10, range=(0, 1))
    assert counts.sum() == len(t)
    assert abs(counts - 400).max() < 80


def test_logit_normal_has_its_mean_and_spread():
    t = draws(TimestepConfig(mean=0.3, std=0.7))
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() - 0.3) < 0.05
    assert abs(logit.std() - 0.7) < 0.05


def test_a_draw_depends_on_the_generator_alone():
    config = TimestepConfig()
    assert np.array_equal(draws(config, count=5), draws(config, count=5))


def test_shift_moves_towards_noise_and_keeps_the_ends():
    assert shifted(0.0, 3.0) == 0
    assert shifted(1.0, 3.0) == 1
    assert shifted(0.5, 3.0) == pytest.approx(0.75)
    assert shifted(0.3, 1.0) == 0.3


def test_larger_clips_get_more_noise():
    config = TimestepConfig(shift=2.0, shift_base_tokens=100)
    assert size_shift(config, 100) == 2.0
    assert size_shift(config, 400) == 4.0
    assert size_shift(TimestepConfig(shift=2.0), 400) == 2.0
    small, large = draws(config, 100), draws(config, 400)
    # The same draws, twice the odds of noise.
    assert np.allclose(large / (1 - large), 2 * small / (1 - small))


class Given:
    """A generator that draws what it is told."""

    def __init__(self, share: float) -> None:
        self.random = lambda: share


def share_below(t: float, config: TimestepConfig) -> float:
    """The unbounded distribution function: of a normal or a uniform number behind sigmoid and shift."""
    t = t / (config.shift - (config.shift - 1) * t)
    if config.distribution is TimestepDistribution.uniform or t in (0, 1):
        return t
    return NormalDist(config.mean, config.std).cdf(math.log(t / (1 - t)))


@pytest.mark.parametrize("distribution", TimestepDistribution)
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.875), (0.875, 1.0), (0.3, 0.35), (0.9, 1.0), (0.0, 0.1)])
@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.4, 0.8, 3.0), (-1.0, 1.5, 5.0)])
def test_between_bounds_it_is_the_same_distribution(distribution, low, high, mean, std, shift):
    """At every share of the way, so for all draws."""
    config = TimestepConfig(distribution=distribution, mean=mean, std=std, shift=shift, low=low, high=high)
    below, above = share_below(low, config), share_below(high, config)
    for share in (0.0, 1e-6, 0.01, 0.3, 0.5, 0.9, 1 - 1e-6):
        t = sample_t(config, 100, Given(share))
        assert low <= t <= high
        assert math.isclose((share_below(t, config) - below) / (above - below), share, rel_tol=1e-6, abs_tol=1e-9)


def test_bounded_draws_are_the_free_ones_that_fall_between():
    free = draws(TimestepConfig(shift=3.0), count=20_000)
    kept, bounded = np.sort(free[free >= 0.875]), np.sort(draws(TimestepConfig(shift=3.0, low=0.875)))
    distance = abs(np.searchsorted(kept, bounded) / len(kept) - np.arange(len(bounded)) / len(bounded)).max()
    assert distance < 1.95 * math.sqrt(1 / len(kept) + 1 / len(bounded))  # Kolmogorov-Smirnov at 0.1%


def test_bounds_far_in_a_tail_are_kept():
    """Where shares of the normal distribution round to 1, or to nothing at all."""
    for low, high in ((1 - 1e-8, 1.0), (0.0, 1e-8), (1 - 1e-15, 1 - 1e-16), (0.0, 1e-300)):
        t = draws(TimestepConfig(std=0.3, low=low, high=high), count=200)
        assert (low <= t).all()
        assert (t <= high).all()
    t = draws(TimestepConfig(std=1.0, low=1 - 1e-4), count=2000)
    assert len(np.unique(t)) > 1900
    assert (draws(TimestepConfig(std=0.0, low=0.7), count=3) == 0.7).all()
    for tokens in range(1, 300):  # a shift of any digits leaves the end where it is
        assert 0.9 <= sample_t(TimestepConfig(shift_base_tokens=7, low=0.9), tokens, Given(1 - 2**-53)) <= 1


def test_without_bounds_draws_are_those_of_before():
    logit = np.random.Generator(np.random.Philox(key=0)).standard_normal(5)
    assert np.allclose(draws(TimestepConfig(), count=5), 1 / (1 + np.exp(-logit)), rtol=1e-15)
    uniform = TimestepConfig(distribution=TimestepDistribution.uniform)
    assert np.array_equal(draws(uniform, count=5), np.random.Generator(np.random.Philox(key=0)).random(5))


def test_the_grid_of_a_sampler_runs_from_noise_to_clean():
    assert sampler_grid(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    grid = sampler_grid(5, 3.0)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(grid))
    assert math.isclose(grid[1], shifted(0.8, 3.0))
    with pytest.raises(ValueError, match="at least one step"):
        sampler_grid(0, 1.0)
