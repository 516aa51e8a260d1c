"""What is trained on does not depend on how many ranks do it, nor on how often they are killed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from corpus import CODEC, data_config
from schedules import WORLDS, Attempt, drawn_schedule, run, small_model
from simulated import Simulated

from sora_train.config.data import DatasetConfig, SizeChange, SizeConfig, StageConfig
from sora_train.data.order import Order
from sora_train.data.packing import PackLimits

STEPS = 30
SETS = {name: Simulated(12, 10, name=f"elastic-{name}") for name in ("films", "more", "stills")}
CONFIG = replace(
    data_config(Path("x")),
    shards="",
    datasets={"films": DatasetConfig("x"), "stills": DatasetConfig("x", 0.5), "more": DatasetConfig("x", 0.0)},
    size=SizeConfig(max_pixels=32 * 32, max_frames=5, sampling_fps=8.0),
    stages=[
        StageConfig(11, size=SizeChange(max_pixels=64 * 64, max_frames=9), tokens_per_step=3200),
        StageConfig(20, weights={"more": 1.0, "stills": 0.0}),
    ],
    tokens_per_step=800,
)


def build(seed: int = 0) -> Order:
    return Order(SETS, CONFIG, small_model(), CODEC, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("largest_group", [1, 4])
def test_kills_and_other_worlds_change_nothing(largest_group: int) -> None:
    """Twenty random schedules; `python -m benchmarks.data_order` runs two hundred."""
    # A clip of 320 tokens needs two ranks where groups are allowed.
    limits = PackLimits(320 if largest_group == 1 else 200, largest_group, heads=8)
    worlds = WORLDS if largest_group == 1 else WORLDS[1:]
    truth = run(build, [Attempt(worlds[0], 0, STEPS)], limits)
    assert len(truth) > 300
    seen = Counter()
    for seed in range(10):
        attempts = [
            replace(attempt, world_size=max(attempt.world_size, worlds[0])) for attempt in drawn_schedule(seed, STEPS)
        ]
        seen.update(attempt.world_size for attempt in attempts)
        assert run(build, attempts, limits) == truth
    assert set(seen) == set(worlds)
    assert seen.total() > 30
    assert run(lambda: build(seed=1), [Attempt(2, 0, 3)], limits) != truth[:30]


def test_nothing_is_lost_or_repeated_over_stages() -> None:
    truth = run(build, [Attempt(2, 0, STEPS)], PackLimits(320))
    for name in ("films", "more", "stills"):
        clips = [entry[3] for entry in truth if entry[2] == name]
        order = build()
        number = order.names.index(name)
        epoch = next(int(s.totals.clips.sum()) for (n, _), s in order.shuffles.items() if n == number)
        for start in range(0, len(clips), epoch):
            assert max(Counter(clips[start : start + epoch]).values()) == 1
