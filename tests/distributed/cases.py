"""Run under torchrun by test_engine.py: many cases in one world of processes, each a line of JSON from rank 0.

A world takes seconds to start; the cases take milliseconds each.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.optim import EmaConfig, OptimConfig
from sora_train.config.parallel import Checkpointing, ParallelConfig, Precision
from sora_train.config.root import ConfigError
from sora_train.cost.memory import PackSize
from sora_train.distributed import runtime
from sora_train.distributed.activations import BlockRunner
from sora_train.distributed.collectives import barrier, gather_facts
from sora_train.distributed.engine import accumulate, build_engine, set_learning_rate
from sora_train.distributed.parallelize import parallelize
from sora_train.distributed.partitions import fragments
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.distributed.topology import World
from sora_train.models.pack_layout import PackLayout
from sora_train.models.video_dit import VideoDiT
from sora_train.training.checkpoint import Checkpoints, TrainState
from sora_train.training.ema import Ema
from sora_train.training.optim import build_optimizer

OPTIM = OptimConfig(clip_norm=1.0, learning_rate=0.01, weight_decay=0.1)
STEPS = 4
KEEP_TWO = CheckpointConfig(keep=2)
DIT = ModelConfig(
    width=24, depth=3, heads=2, mlp_width=48, in_channels=4, out_channels=4,
    text=TextConfig(kind=TextKind.encoder, width=16),
)  # fmt: skip
# Rows of each micro-step's pack on each rank: unequal sizes, several micro-steps.
ROWS = {1: [[6, 10]], 2: [[1, 5], [7, 3]], 3: [[1, 5], [4, 2], [3, 1]]}


class Net(nn.Module):
    """Parameters of odd sizes, so that partitions cut through them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(rows.to(self.first.weight.dtype)))).float()


class Run:
    """An engine with its average and checkpoints, trained on rows that depend on the step alone."""

    def __init__(
        self,
        world: World,
        folder: Path,
        stage: int,
        precision: Precision,
        config: CheckpointConfig = KEEP_TWO,
    ) -> None:
        torch.manual_seed(7)
        model = Net()
        parallel = ParallelConfig(zero_stage=stage, precision=precision)
        self.world = world
        self.engine = build_engine(model, build_optimizer(model, OPTIM, world.device), parallel, OPTIM)
        self.shapes = {name: tuple(value.shape) for name, value in Net().named_parameters()}
        self.held = fragments(self.engine)
        self.ema = Ema(self.held, EmaConfig(decay=0.9))
        self.checkpoints = Checkpoints(
            folder, config, world, engine=self.engine, held=self.held, ema=self.ema, facts={"config": {}}
        )
        self.state = self.checkpoints.load_latest()
        self.losses: list[float] = []

    def train(self, steps: int) -> None:
        while self.state.step < steps:
            set_learning_rate(self.engine, OPTIM.learning_rate)
            packs = my_rows(self.state.step, self.world)
            total = 0.0
            for number, rows in enumerate(packs):
                loss = self.engine(rows).square().sum() / 16
                total += loss.item()
                accumulate(self.engine, loss, is_last=number == len(packs) - 1)
            self.ema.update(self.state.step)
            self.losses.append(sum(gather_facts(total)))
            self.state = self.state.next()

    def whole(self) -> dict[str, Tensor]:
        return Ema.gather(self.ema, self.shapes)

    def pieces(self) -> list[Tensor]:
        pieces = [fragment.master for fragment in self.held] + self.ema.averages
        return [piece.clone() for piece in pieces + [s for f in self.held for s in f.states.values()]]


def batch(step: int) -> Tensor:
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(step))


def my_rows(step: int, world: World) -> list[Tensor]:
    sizes = ROWS[world.world_size]
    parts = iter(batch(step).split([size for rank in sizes for size in rank]))
    by_rank = [[next(parts) for _ in rank] for rank in sizes]
    return by_rank[world.global_rank]


def reference(steps: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """The same training in plain torch, one process, one batch a step."""
    torch.manual_seed(7)
    model = Net()
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, OPTIM, torch.device("cpu"))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.learning_rate
        loss = model(batch(step)).square().sum() / 16
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.named_parameters():
            average[name].lerp_(value.detach(), 1 - decay)
    return losses, {name: value.detach() for name, value in model.named_parameters()}, average


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def equals_one_process(world: World, folder: Path, stage: int, precision: Precision) -> dict[str, Any]:
    run = Run(world, folder, stage, precision)
    run.train(STEPS)
    losses, _, average = reference(STEPS)
    off = max(abs(a - b) / b for a, b in zip(run.losses, losses, strict=True))
    whole = run.whole()
    return {"loss": off, "average": max(relative(whole[name], average[name]) for name in average)}


def resumes_bitwise(world: World, folder: Path, stage: int, precision: Precision) -> dict[str, Any]:
    straight = Run(world, folder / "straight", stage, precision)
    straight.train(STEPS)
    first = Run(world, folder / "resumed", stage, precision)
    first.train(2)
    first.checkpoints.save(first.state)
    first.checkpoints.wait()
    second = Run(world, folder / "resumed", stage, precision)
    started_at = second.state.step
    second.train(STEPS)
    same = all(torch.equal(a, b) for a, b in zip(straight.pieces(), second.pieces(), strict=True))
    return {
        "started_at": started_at,
        "losses": second.losses == straight.losses[2:],
        "pieces": all(gather_facts(same)),
    }


def resumes_elsewhere(world: World, folder: Path, stage: int, precision: Precision) -> dict[str, Any]:
    """From the checkpoint that another stage (and, with `folder` given from outside, another world) wrote."""
    writer = Run(world, folder, 3 - stage, precision)
    writer.train(2)
    writer.checkpoints.save(writer.state)
    writer.checkpoints.wait()
    reader = Run(world, folder, stage, precision)
    reader.train(STEPS)
    losses, _, average = reference(STEPS)
    whole = reader.whole()
    return {
        "loss": max(abs(a - b) / b for a, b in zip(reader.losses, losses[2:], strict=True)),
        "average": max(relative(whole[name], average[name]) for name in average),
    }


def falls_back(world: World, folder: Path, stage: int, precision: Precision) -> dict[str, Any]:
    """A flipped bit, a cut file and a changed manifest are noticed; the one before is taken."""
    run = Run(world, folder, stage, precision)
    run.train(1)
    run.checkpoints.save(run.state)
    run.checkpoints.wait()
    started = []
    for damage in ("flip", "cut", "manifest", "missing"):
        run.state = TrainState(2)
        newest = run.checkpoints.save(run.state)
        run.checkpoints.wait()
        if world.is_main:
            hurt(newest, damage)
        barrier()
        started.append(Run(world, folder, stage, precision).state.step)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    if world.is_main:
        hurt(folder / "checkpoints" / "step-00000001", "cut")
    barrier()
    refusal = ""
    try:
        Run(world, folder, stage, precision)
    except ConfigError as error:
        refusal = str(error)
    return {"started": started, "kept": kept, "refusal": refusal}


def hurt(checkpoint: Path, damage: str) -> None:
    path = checkpoint / ("manifest.json" if damage == "manifest" else "rank-00000.safetensors")
    if damage == "missing":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        content[-5] ^= 1
        path.write_bytes(content)
    else:
        path.write_text(path.read_text().replace('"optimizer_steps": 1', '"optimizer_steps": 2'))


def continues(world: World, folder: Path, stage: int, precision: Precision) -> dict[str, Any]:
    """A run directory from another world size is taken up and finished."""
    run = Run(world, folder, stage, precision)
    started_at = run.state.step
    run.train(started_at + 2)
    run.checkpoints.save(run.state)
    run.checkpoints.wait()
    losses, _, average = reference(started_at + 2)
    whole = run.whole()
    return {
        "started_at": started_at,
        "loss": max(abs(a - b) / b for a, b in zip(run.losses, losses[started_at:], strict=True)),
        "average": max(relative(whole[name], average[name]) for name in average),
    }


def keeps_activations_in_any_way(world: World, folder: Path, stage: int, precision: Precision) -> dict[str, Any]:
    """Two steps of a model in each mode of checkpointing, as parameters come and go; and bytes of its states."""
    pack = PackSize(tokens=9, text_rows=4, samples=2)
    losses, weights, held_bytes = [], [], {}
    for mode, is_offloaded in (
        (Checkpointing.none, False),
        (Checkpointing.block, False),
        (Checkpointing.operations, True),
    ):
        torch.manual_seed(7)
        model = VideoDiT(DIT)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        parallel = ParallelConfig(
            zero_stage=stage, precision=precision, checkpointing=mode, offload_activations=is_offloaded
        )
        parallelize(model, parallel, world, SequenceGroups({}), pack, is_quiet=True)
        if isinstance(model.run_block, BlockRunner) and model.run_block.offload:
            model.run_block.offload.min_bytes = 0
        engine = build_engine(model, build_optimizer(model, OPTIM, world.device), parallel, OPTIM)
        total = []
        for step in range(2):
            set_learning_rate(engine, OPTIM.learning_rate)
            draw = torch.Generator().manual_seed(10 * step + world.global_rank)
            tokens, rows = torch.randn(9, 16, generator=draw), torch.randn(4, 16, generator=draw)
            layout = PackLayout.build([6, 3], [1, 3])
            for is_last in (False, True):
                out = engine(tokens, torch.zeros(9, 3, dtype=torch.int64), torch.tensor([0.2, 0.7]), rows, layout)
                loss = out.square().sum() / 16
                total.append(sum(gather_facts(loss.item())))
                accumulate(engine, loss, is_last=is_last)
        losses.append(total)
        held = fragments(engine)
        weights.append([fragment.master.clone() for fragment in held])
        kept = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
        held_bytes = {
            "parameters": sum(gather_facts(sum(value.numel() * value.element_size() for value in kept))),
            "optimizer": sum(gather_facts(sum(4 * s.numel() for f in held for s in (f.master, *f.states.values())))),
            "ema": sum(gather_facts(4 * sum(fragment.length for fragment in held))),
        }
    same = all(torch.equal(a, b) for other in weights[1:] for a, b in zip(weights[0], other, strict=True))
    return {"losses": losses, "weights": all(gather_facts(same)), "bytes": held_bytes}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "equals_one_process": equals_one_process,
    "resumes_bitwise": resumes_bitwise,
    "resumes_elsewhere": resumes_elsewhere,
    "falls_back": falls_back,
    "continues": continues,
    "keeps_activations_in_any_way": keeps_activations_in_any_way,
}


def main(folder: str, out: str, *names: str) -> None:
    world = runtime.start(threads=1)
    results = []
    for name, stage, precision in itertools.product(names, range(4), (Precision.fp32, Precision.bf16)):
        if precision is Precision.bf16 and name != "resumes_bitwise":
            continue  # rounding is all that a comparison with fp32 would show
        place = Path(folder) / (f"{name}-{stage}" if name == "continues" else f"{name}-{stage}-{precision.value}")
        result = CASES[name](world, place, stage, precision)
        results.append({"case": name, "stage": stage, "precision": precision.value, **result})
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    runtime.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
