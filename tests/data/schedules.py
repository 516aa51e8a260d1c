"""Trainings that are killed again and again and go on in worlds of other sizes, as far as the data sees them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sora_train.config.model import ModelConfig
from sora_train.cost.step_cost import of_model
from sora_train.data.draws import Purpose, generator
from sora_train.data.order import Order, PlannedSample
from sora_train.data.packing import PackLimits, assign

WORLDS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Attempt:
    """From a checkpoint to a kill."""

    world_size: int
    first_step: int
    killed_in: int  # this step is begun and lost; the number of steps: it came to its end


# (step, index, data set, clip, frames, size, caption, seed of the timestep)
Record = tuple[object, ...]


def drawn_schedule(seed: int, steps: int) -> list[Attempt]:
    """Attempts that come to the end at last, each from the newest checkpoint of those before it."""
    draw = np.random.default_rng(seed)
    save_every = int(draw.integers(1, 8))
    attempts: list[Attempt] = []
    step = 0
    while step < steps:
        killed_in = int(min(steps, step + draw.geometric(0.12)))
        attempts.append(Attempt(int(draw.choice(WORLDS)), step, killed_in))
        step = steps if killed_in == steps else max(step, killed_in // save_every * save_every)
    return attempts


def run(build_order: Callable[[], Order], attempts: list[Attempt], limits: PackLimits) -> list[Record]:
    """What a training trains on, step after step: of a step that was done twice, what the last attempt did.

    Raises:
        AssertionError: it did something else the second time, or a clip was lost or repeated between the ranks.
    """
    steps: dict[int, list[Record]] = {}
    for attempt in attempts:
        order = build_order()
        costs = of_model(order.model)
        for step in range(attempt.first_step, attempt.killed_in):
            records = []
            batch = order.batch(step)
            for packs in assign(batch, attempt.world_size, limits, costs):
                for rank, pack in enumerate(packs):
                    # What a group shares is done once, whoever holds which tokens of it.
                    shared = pack.shared if pack.first_rank == rank else ()
                    records += [record(order, sample) for sample in (*pack.samples, *shared)]
            records.sort(key=lambda entry: entry[1])  # type: ignore[arg-type,return-value]
            assert [entry[1] for entry in records] == list(range(len(batch.samples)))
            assert steps.get(step, records) == records
            steps[step] = records
    assert sorted(steps) == list(range(attempts[-1].killed_in))
    return [entry for step in sorted(steps) for entry in steps[step]]


def record(order: Order, sample: PlannedSample) -> Record:
    """All that was decided about a clip."""
    size = sample.size
    return (
        sample.step,
        sample.index,
        order.names[sample.dataset],
        (sample.shard, sample.row.key),
        tuple(size.frame_indices),
        (size.height, size.width, sample.latent_shape, sample.num_tokens),
        sample.caption,
        int(generator(order.seed, sample.step, sample.index, Purpose.timestep).integers(2**63)),
    )


def small_model() -> ModelConfig:
    """Eight heads, so that groups of every size occur."""
    return ModelConfig(in_channels=96, out_channels=96, width=128, heads=8, depth=2, mlp_width=512)
