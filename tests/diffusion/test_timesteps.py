import itertools
import math

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


def test_the_grid_of_a_sampler_runs_from_noise_to_clean():
    assert sampler_grid(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    grid = sampler_grid(5, 3.0)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(grid))
    assert math.isclose(grid[1], shifted(0.8, 3.0))
    with pytest.raises(ValueError, match="at least one step"):
        sampler_grid(0, 1.0)
