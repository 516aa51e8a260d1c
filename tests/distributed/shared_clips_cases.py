"""Run under torchrun by test_shared_clips.py: real shards, the real loader and step, clips that no rank could hold
alone; against one process that holds them whole. Many cases in one world, each a line of JSON from rank 0.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))

from corpus import CODEC, data_config
from test_pack import T5

from sora_train.config.data import DataConfig, SizeConfig
from sora_train.config.diffusion import CountedBy, DiffusionConfig, Target, TimestepConfig
from sora_train.config.encoders import CodecConfig
from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.optim import EmaConfig, OptimConfig
from sora_train.config.parallel import ParallelConfig, Precision
from sora_train.config.root import TrainConfig, build_config
from sora_train.data.loader import Loader, build_loader
from sora_train.data.pack import Failure, Pack
from sora_train.data.packing import PackPlan
from sora_train.data.sample import SampleError
from sora_train.distributed import runtime
from sora_train.distributed.collectives import barrier, gather_facts, sum_over_ranks
from sora_train.distributed.engine import accumulate, build_engine, set_learning_rate
from sora_train.distributed.parallelize import parallelize
from sora_train.distributed.partitions import fragments
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.distributed.topology import World
from sora_train.encoders.video_codec import build_codec
from sora_train.models.video_dit import VideoDiT
from sora_train.training.ema import Ema
from sora_train.training.metrics import COUNTED, Metrics
from sora_train.training.optim import build_optimizer
from sora_train.training.step import Encoders, diffusion_loss
from sora_train.training.validation import Validation

MODEL = ModelConfig(
    width=32, depth=2, heads=4, mlp_width=48, in_channels=96, out_channels=96, frequency_width=16,
    text=TextConfig(width=16, layers=1, heads=2),
)  # fmt: skip
ROWS = replace(MODEL, text=TextConfig(kind=TextKind.encoder, width=16))
# Gradients of nearly nothing are not blown up to steps of full length.
OPTIM = OptimConfig(clip_norm=1.0, learning_rate=0.01, weight_decay=0.1, eps=1e-3)
STEPS = 2
# Tokens that a rank may hold, by ranks: the largest clip has 1008, of those made in advance 400.
ROOM, ROOM_MIXED = {2: 600, 4: 500}, {2: 300, 4: 300}
ALONE = SequenceGroups({})
CODEC_HERE = build_codec(CodecConfig(), "cpu")
# In place of a text encoder, for captions that were dropped and have no rows.
ENCODE: Any = SimpleNamespace(encode=lambda captions: [torch.full((2, 16), float(len(text))) for text in captions])


@dataclass
class Setting:
    """What a case trains on, and how."""

    data: DataConfig
    model: ModelConfig = MODEL
    stage: int = 1
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    regroups: bool = True
    room: dict[int, int] = field(default_factory=lambda: ROOM)
    masked: dict[int, frozenset[tuple[str, str]]] = field(default_factory=dict)
    # Changes the loader before it is used.
    spoil: Callable[[Loader], None] = lambda loader: None

    @property
    def encoders(self) -> Encoders:
        return Encoders(CODEC_HERE, ENCODE if self.model is ROWS else None)


@dataclass
class Outcome:
    """Of a run, on every rank."""

    losses: list[float]
    weights: dict[str, Tensor]
    counts: dict[str, float]
    tried: int
    values: dict[str, float]
    failures: list[Failure]
    plans: list[PackPlan]  # of this rank


def build(setting: Setting, rank: int, world_size: int) -> Loader:
    data = replace(setting.data, max_tokens_per_pack=setting.room.get(world_size, 10**6))
    loader = build_loader(
        data,
        setting.model,
        CODEC,
        TimestepConfig(),
        3,
        rank,
        world_size,
        largest_group=8,
        regroups_within_step=setting.regroups,
        masked=setting.masked,
        codec_identity="wavelet-1",
        text_identity=T5,
    )
    setting.spoil(loader)
    return loader


def build_model(config: ModelConfig) -> VideoDiT:
    """Nothing at zero, so that every path counts."""
    torch.manual_seed(7)
    model = VideoDiT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
    return model


def in_groups(world: World, groups: SequenceGroups, setting: Setting) -> Outcome:
    """By all ranks, through DeepSpeed."""
    loader = build(setting, world.global_rank, world.world_size)
    model = build_model(setting.model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parallel = ParallelConfig(zero_stage=setting.stage, precision=Precision.fp32)
    parallelize(model, parallel, world, groups, is_quiet=True)
    engine = build_engine(model, build_optimizer(model, OPTIM, world.device), parallel, OPTIM)

    def learn(loss: Tensor, is_last: bool) -> None:
        set_learning_rate(engine, OPTIM.learning_rate)
        accumulate(engine, loss, is_last)

    outcome = train(world, loader, setting, engine, learn, groups)
    outcome.weights = Ema(fragments(engine), EmaConfig()).gather(shapes)
    return outcome


def in_one_process(world: World, setting: Setting) -> Outcome:
    """By rank 0 in plain torch, each clip whole in a large pack; the others look on. Once for like settings."""
    like = replace(setting, data=replace(setting.data, workers=0), stage=0, regroups=True)
    if repr(like) not in known:
        known[repr(like)] = train_alone(world, like)
    return known[repr(like)]


known: dict[str, Outcome] = {}


def train_alone(world: World, setting: Setting) -> Outcome:
    loader = build(setting, 0, 1)
    model = build_model(setting.model)
    optimizer = build_optimizer(model, OPTIM, torch.device("cpu"))

    def learn(loss: Tensor, is_last: bool) -> None:
        loss.backward()
        if is_last:
            nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = OPTIM.learning_rate
            optimizer.step()
            optimizer.zero_grad()

    outcome = train(world, loader, setting, model, learn, ALONE, looks_on=world.global_rank > 0)
    outcome.weights = {name: value.detach() for name, value in model.named_parameters()}
    return outcome


def train(
    world: World, loader: Loader, setting: Setting, model: Any, learn: Callable[[Tensor, bool], None],
    groups: SequenceGroups, looks_on: bool = False,
) -> Outcome:  # fmt: skip
    metrics, failures, plans, encoders = Metrics(world, ParallelConfig()), [], [], setting.encoders
    for step in range(STEPS):
        for pack in [] if looks_on else loader.packs(step):
            result = diffusion_loss(model, pack, encoders, setting.model, setting.diffusion, groups)
            learn(result.loss, pack.is_last)
            metrics.add(result)
            failures += pack.failures
            plans.append(pack.plan)
        metrics.end_step()
    loader.close()
    counts = dict(zip(COUNTED, sum_over_ranks(metrics.counts.clone()).tolist(), strict=True))
    means = metrics.reduce()
    values = {name: value for name, value in means.values.items() if name.startswith("loss")}
    tried = means.clips + means.failed
    return Outcome(means.step_losses, {}, counts, tried, values, failures, plans)


def compared(world: World, groups: SequenceGroups, setting: Setting, alone: Setting | None = None) -> dict[str, Any]:
    """Groups against one process; `alone`: what that is to do otherwise."""
    shared, whole = in_groups(world, groups, setting), in_one_process(world, alone or setting)
    return differences(shared, whole) | {
        "failures": [vars(failure) for part in gather_facts(shared.failures) for failure in part],
        "owned": gather_facts(sum(piece.is_owned for plan in shared.plans for piece in plan.pieces)),
        "lent": sum(gather_facts(sum(not piece.part for plan in shared.plans for piece in plan.pieces))),
        "sizes": sorted({plan.group_size for part in gather_facts(shared.plans) for plan in part if plan.shared}),
        "partitions": [sorted(sizes) for sizes in partitions(shared.plans)],
        "micro_steps": [sum(plan.step == step for plan in shared.plans) for step in range(STEPS)],
    }


def differences(shared: Outcome, whole: Outcome) -> dict[str, Any]:
    """Relative ones, of rank 0's."""
    off = [
        float((shared.weights[name] - value).norm() / value.norm()) if name in shared.weights else 1.0
        for name, value in whole.weights.items()
    ]
    return {
        "loss": max(abs(a - b) / b for a, b in zip(shared.losses, whole.losses, strict=True)),
        "weights": max(off),
        "counts": shared.counts == whole.counts,
        "clips": whole.counts["clips"],
        "tried": [shared.tried, whole.tried],
        "values": max(abs(shared.values[name] - value) / value for name, value in whole.values.items()),
        "same_values": shared.values.keys() == whole.values.keys(),
    }


def partitions(plans: list[PackPlan]) -> Iterator[set[int]]:
    """Sizes of this rank's groups in each step."""
    for step in range(STEPS):
        yield {plan.group_size for plan in plans if plan.step == step}


# --- cases: each from the world, its groups and a folder with shards, to facts


def trains(world: World, groups: SequenceGroups, folder: Path) -> dict[str, Any]:
    found = {}
    samples = DiffusionConfig(counted_by=CountedBy.samples, prediction=Target.latents)
    data = data_config(folder / "videos" / "shards")
    for name, setting in {
        "zero 1": Setting(data),
        "zero 3, a worker": Setting(replace(data, workers=1), stage=3),
        "by samples, latents predicted": Setting(data, diffusion=samples),
        "one partition a step": Setting(data, stage=3, regroups=False),
        "first frames clean": Setting(data, diffusion=DiffusionConfig(first_frame_probability=0.5)),
        "first frames beside the noise": Setting(
            data,
            model=replace(MODEL, condition_channels=2 + 96),  # a mask and the codec's latents
            diffusion=DiffusionConfig(first_frame_probability=1.0),
            stage=3,
        ),
    }.items():
        found[name] = compared(world, groups, setting)
    size = SizeConfig(max_pixels=8960, max_frames=9, sampling_fps=8.0)
    mixed = replace(data_config(folder / "mixed" / "shards"), size=size, held_out_fraction=0.0)
    made = Setting(mixed, ROWS, room=ROOM_MIXED)
    found["made in advance"] = compared(world, groups, made)
    found["made in advance, a worker"] = compared(world, groups, replace(made, data=replace(mixed, workers=1), stage=3))
    return found


def masks(world: World, groups: SequenceGroups, folder: Path) -> dict[str, Any]:
    """A shared clip that its owner cannot decode, one whose text a neighbour cannot read, one masked from the start, a
    shard that is gone."""
    whole = Setting(data_config(folder / "videos" / "shards"))
    loader = build(whole, world.global_rank, world.world_size)
    (plan, *_) = [plan for step in range(STEPS) for plan in loader.plans(step) if plan.shared]
    loader.close()
    victim, step = plan.shared[0], plan.step
    shard = loader.order.datasets[0].manifest.shards[victim.shard].name
    masked = {step: frozenset({(f"main/{shard}", victim.row.key)})}
    damaged, gone = (folder / f"{name}-{world.world_size}" for name in ("damaged", "gone"))
    if world.is_main:
        for copy in (damaged, gone):
            shutil.copytree(folder / "videos" / "shards", copy)
        with (damaged / shard).open("r+b") as file:
            file.seek(victim.row.medium_offset)
            file.write(bytes(victim.row.medium_size))
        (gone / shard).unlink()
    barrier()

    def spoil(loader: Loader) -> None:
        """Its text cannot be read by those that do not own it."""
        read = loader.reader.read

        def fail(task: Any, *others: Any) -> Any:
            if task.sample.row.key == victim.row.key and task.sample.step == step and not task.has_medium:
                raise SampleError("read", "by chance")
            return read(task, *others)

        loader.reader.read = fail  # type: ignore[method-assign]

    without = replace(whole, masked=masked)
    found = {
        "damaged": compared(world, groups, replace(whole, data=data_config(damaged))),
        "damaged, a worker": compared(world, groups, replace(whole, data=data_config(damaged, workers=1))),
        "replayed": compared(world, groups, without),
        "text lost": compared(world, groups, replace(whole, spoil=spoil), without),
        "gone": compared(world, groups, replace(whole, data=data_config(gone))),
    }
    everything, masked_one = in_one_process(world, whole), in_one_process(world, without)
    found["matters"] = {"loss": differences(masked_one, everything)["loss"]}
    found["victim"] = {"key": victim.row.key, "shard": f"main/{shard}"}
    return found


def validates(world: World, groups: SequenceGroups, folder: Path) -> dict[str, Any]:
    """The held-out loss of all ranks, and of each for itself with whole clips."""
    setting = Setting(data_config(folder / "videos" / "shards", held_out_fraction=0.5))
    values = {
        "run_dir": str(folder / "run"), "data": {"shards": "x"}, "validation": {"clips": 12, "prompts": []},
        "model": {"width": 32, "depth": 2, "heads": 4, "mlp_width": 48, "in_channels": 96, "out_channels": 96,
                  "frequency_width": 16, "text": {"width": 16, "layers": 1, "heads": 2}},
        "parallel": {"precision": "fp32"},
    }  # fmt: skip
    config = build_config(TrainConfig, values)
    weights = {name: value.detach() for name, value in build_model(MODEL).named_parameters()}
    ema: Any = SimpleNamespace(each_whole=lambda shapes: weights.items())
    seen: list[float] = []
    tracker: Any = SimpleNamespace(log_validation=lambda step, values, videos: seen.append(values["held_out_loss"]))
    shared = 0
    for rank, size, among in ((0, 1, ALONE), (world.global_rank, world.world_size, groups)):
        loader = build(setting, rank, size)
        Validation(config, world, loader, setting.encoders, {}, among).run(ema, tracker, 3)
        packs: list[Pack] = loader.validation_packs(12)
        shared = sum(len(pack.plan.shared) for pack in packs)
    return {"losses": seen, "shared": shared}


CASES: dict[str, Callable[[World, SequenceGroups, Path], dict[str, Any]]] = {
    "trains": trains, "masks": masks, "validates": validates,
}  # fmt: skip


def main(folder: str, out: str) -> None:
    world = runtime.start(threads=1)
    groups = SequenceGroups.build(world, min(world.world_size, MODEL.heads))
    results = {name: case(world, groups, Path(folder)) for name, case in CASES.items()}
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    runtime.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
