import itertools
from dataclasses import replace

import pytest

from sora_train.config.optim import DecayShape, OptimConfig, ScheduleKind
from sora_train.training.schedule import learning_rate

CONSTANT = OptimConfig(learning_rate=1.0, warmup_steps=10)
COSINE = OptimConfig(learning_rate=1.0, warmup_steps=10, schedule=ScheduleKind.cosine, final_fraction=0.1)
WSD = OptimConfig(learning_rate=1.0, warmup_steps=10, schedule=ScheduleKind.wsd, decay_steps=20, final_fraction=0.2)
SQRT = replace(WSD, decay_shape=DecayShape.sqrt)


@pytest.mark.parametrize("config", [CONSTANT, COSINE, WSD, SQRT])
def test_warms_up_linearly_to_the_peak(config: OptimConfig) -> None:
    assert [learning_rate(step, 100, config) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]


def test_constant_stays() -> None:
    assert learning_rate(99, 100, CONSTANT) == 1.0


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_final_fraction() -> None:
    assert learning_rate(10, 110, COSINE) == 1.0
    assert learning_rate(60, 110, COSINE) == pytest.approx(0.55)
    assert learning_rate(110, 110, COSINE) == pytest.approx(0.1)


def test_wsd_is_stable_then_falls_over_its_last_steps() -> None:
    assert learning_rate(80, 100, WSD) == 1.0
    assert learning_rate(90, 100, WSD) == pytest.approx(0.6)
    assert learning_rate(100, 100, WSD) == pytest.approx(0.2)


def test_no_warm_up() -> None:
    assert learning_rate(0, 100, OptimConfig(learning_rate=1.0, warmup_steps=0)) == 1.0


def test_one_minus_sqrt_falls_fast_at_first_and_to_the_same_end() -> None:
    assert learning_rate(80, 100, SQRT) == 1.0
    assert learning_rate(85, 100, SQRT) == pytest.approx(0.2 + 0.8 * 0.5)
    assert learning_rate(100, 100, SQRT) == pytest.approx(0.2)


@pytest.mark.parametrize("config", [CONSTANT, COSINE, WSD, SQRT])
def test_it_never_jumps_or_rises_after_the_warm_up(config: OptimConfig) -> None:
    """Over 10,000 steps no step changes it by more than a decay of 2,000 steps must: 1 - sqrt begins the steepest."""
    long = replace(config, warmup_steps=1000, decay_steps=2000)
    rates = [learning_rate(step, 10000, long) for step in range(10001)]
    assert rates[999] == rates[1000] == 1.0
    assert all(0 <= before - after < 0.8 / 2000**0.5 + 1e-9 for before, after in itertools.pairwise(rates[999:]))
    assert rates[-1] == pytest.approx(long.final_fraction if config is not CONSTANT else 1.0)


@pytest.mark.parametrize("config", [WSD, SQRT])
def test_a_decay_longer_than_the_run_begins_after_the_warm_up(config: OptimConfig) -> None:
    rates = [learning_rate(step, 25, config) for step in range(26)]
    assert rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.2)
    assert sorted(rates[10:], reverse=True) == rates[10:]
