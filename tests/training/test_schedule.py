import pytest

from sora_train.config.optim import OptimConfig, ScheduleKind
from sora_train.training.schedule import learning_rate

CONSTANT = OptimConfig(learning_rate=1.0, warmup_steps=10)
COSINE = OptimConfig(learning_rate=1.0, warmup_steps=10, schedule=ScheduleKind.cosine, final_fraction=0.1)
WSD = OptimConfig(learning_rate=1.0, warmup_steps=10, schedule=ScheduleKind.wsd, decay_steps=20, final_fraction=0.2)


@pytest.mark.parametrize("config", [CONSTANT, COSINE, WSD])
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
