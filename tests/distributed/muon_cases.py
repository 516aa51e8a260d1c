"""Run under torchrun by test_muon.py: Muon and both averages of the weights, many cases in one world of processes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.optim import EmaConfig, EmaProfile, OptimConfig, OptimizerKind
from sora_train.config.parallel import ParallelConfig, Precision
from sora_train.config.root import ConfigError
from sora_train.distributed import muon, runtime
from sora_train.distributed.collectives import gather_facts
from sora_train.distributed.engine import accumulate, build_engine, set_learning_rate
from sora_train.distributed.partitions import fragments
from sora_train.distributed.topology import World
from sora_train.training.checkpoint import Checkpoints
from sora_train.training.ema import Ema
from sora_train.training.ema_profiles import decay
from sora_train.training.ema_snapshots import Snapshots
from sora_train.training.optim import build_optimizer, parameter_groups

OPTIM = OptimConfig(kind=OptimizerKind.muon, clip_norm=1.0, learning_rate=0.01, weight_decay=0.1)
EMA = EmaConfig(profile=EmaProfile.power, lengths=[0.1, 0.05])
STEPS = 6
# Of each world in a run that goes from one to the next, a snapshot of its averages every so many, and its stages.
LEG, SNAPSHOT_EVERY = 17, 3
STAGES = {2: [0, 1, 2, 3], 3: [3, 3, 0, 1], 1: [1, 1, 3, 2]}
# Rows of each micro-step's pack on each rank: unequal sizes, several micro-steps.
ROWS = {1: [[10, 14]], 2: [[3, 9], [8, 4]], 3: [[3, 5], [6, 2], [4, 4]]}


class Block(nn.Module):
    """Wide, tall and square matrices of odd sizes, so that partitions cut through them, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(7, 11), nn.Linear(11, 7, bias=False), nn.Linear(7, 7)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.out(torch.tanh(self.down(torch.tanh(self.up(rows)))))


class Net(nn.Module):
    """Matrices outside of blocks are AdamW's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(9, 7), nn.Linear(7, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.first(rows.to(self.first.weight.dtype))
        for block in self.blocks:
            rows = block(rows)
        return self.last(rows).float()


def build_net() -> Net:
    torch.manual_seed(7)
    return Net()


SHAPES = {name: tuple(value.shape) for name, value in Net().named_parameters()}


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Of a map that is to be learnt: a sum over rows, divided by the count of all."""
    target = torch.sin(3 * rows[:, :5])
    loss: Tensor = (model(rows) - target).square().sum() / 24
    return loss


def batch(step: int) -> Tensor:
    return torch.randn(24, 9, generator=torch.Generator().manual_seed(step))


class Run:
    """An engine with its averages and checkpoints, trained on rows that depend on the step alone."""

    def __init__(
        self, world: World, folder: Path, stage: int, precision: Precision, optim: OptimConfig = OPTIM
    ) -> None:
        model = build_net()
        parallel = ParallelConfig(zero_stage=stage, precision=precision)
        self.world = world
        self.engine = build_engine(model, build_optimizer(model, optim, world.device), parallel, optim)
        self.held = fragments(self.engine)
        self.ema = Ema(self.held, EMA)
        config = CheckpointConfig(keep=2)
        self.checkpoints = Checkpoints(
            folder, config, world, engine=self.engine, held=self.held, ema=self.ema, facts={"config": {}}
        )
        self.state = self.checkpoints.load_latest()
        facts = {"config": {}}
        self.snapshots = Snapshots(folder, world, self.ema, shapes=SHAPES, facts=facts, step=self.state.step)
        self.losses: list[float] = []

    def train(self, steps: int, snapshot_every: int = 0) -> None:
        while self.state.step < steps:
            set_learning_rate(self.engine, OPTIM.learning_rate)
            parts = iter(batch(self.state.step).split([size for rank in ROWS[self.world.world_size] for size in rank]))
            by_rank = [[next(parts) for _ in rank] for rank in ROWS[self.world.world_size]]
            packs, total = by_rank[self.world.global_rank], 0.0
            for number, rows in enumerate(packs):
                loss = loss_of(self.engine, rows)
                total += loss.item()
                accumulate(self.engine, loss, is_last=number == len(packs) - 1)
            self.ema.update(self.state.step)
            self.losses.append(sum(gather_facts(total)))
            self.state = self.state.next()
            if snapshot_every and self.state.step % snapshot_every == 0:
                self.snapshots.save(self.state.step)

    def save(self) -> None:
        self.checkpoints.save(self.state)
        self.checkpoints.wait()

    def whole(self) -> list[dict[str, Tensor]]:
        """The fp32 weights, and each of the averages, by name."""
        found = []
        for kind in (None, *self.ema.kinds):
            of_kind = Ema(self.held, EmaConfig())
            if kind is not None:
                for chosen, averages in zip(of_kind.kept, self.ema.kept, strict=True):
                    chosen["ema"].copy_(averages[kind])
            found.append(of_kind.gather(SHAPES))
        return found

    def pieces(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps of this rank's."""
        kinds = [
            {"master": fragment.master, **averages, **fragment.states}
            for fragment, averages in zip(self.held, self.ema.kept, strict=True)
        ]
        named = zip(self.held, kinds, strict=True)
        return {f"{kind}/{f.name}": value.clone() for f, of_piece in named for kind, value in of_piece.items()}


def reference(steps: int, lengths: list[float] = EMA.lengths) -> tuple[list[float], list[dict[str, Tensor]]]:
    """The same training in plain torch, one process, one batch a step: torch's own Muon, in fp32 instead of bf16.

    Returns the losses; the weights, and averages of those lengths (in float64).
    """
    model = build_net()
    averages = [{name: value.detach().double() for name, value in model.named_parameters()} for _ in lengths]
    groups = parameter_groups(model, OPTIM)
    matrices = [group for group in groups if group.pop("is_muon", False)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=OPTIM.learning_rate, momentum=OPTIM.momentum, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [group for group in groups if group not in matrices],
            lr=OPTIM.learning_rate,
            betas=(OPTIM.beta1, OPTIM.beta2),
            eps=OPTIM.eps,
        ),
    ]
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
        for average, length in zip(averages, lengths, strict=True):
            for name, value in model.named_parameters():
                average[name].lerp_(value.detach().double(), 1 - decay(step, length))
    return losses, [{name: value.detach() for name, value in model.named_parameters()}, *averages]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def off(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(relative(mine[name], theirs[name]) for mine, theirs in pairs for name in theirs)


def losses_off(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def equals_torch(world: World, folder: Path, stage: int) -> dict[str, Any]:
    """All matrices at once, and with a buffer that holds one."""
    results = {}
    losses, expected = reference(STEPS)
    for place, elements in (("whole", 2**26), ("rounds", 100)):
        with mock.patch.object(muon, "MAX_ELEMENTS", elements):
            run = Run(world, folder / place, stage, Precision.fp32)
            run.train(STEPS)
        rounds = getattr(run.engine.optimizer, "optimizer", run.engine.optimizer)._rounds
        results[place] = {
            "loss": losses_off(run.losses, losses),
            "weights": off(run.whole(), expected),
            "rounds": max(len(of_step) for of_step in rounds.values()),
        }
    return results


def resumes_bitwise(world: World, folder: Path, stage: int) -> dict[str, Any]:
    results = {}
    for precision in (Precision.fp32, Precision.bf16):
        place = folder / precision.value
        straight = Run(world, place / "straight", stage, precision)
        straight.train(STEPS)
        first = Run(world, place / "resumed", stage, precision)
        first.train(3)
        first.save()
        first.train(5)  # and is killed
        second = Run(world, place / "resumed", stage, precision)
        started_at = second.state.step
        second.train(STEPS)
        ours, theirs = straight.pieces(), second.pieces()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        results[precision.value] = {
            "started_at": started_at,
            "losses": second.losses == straight.losses[3:],
            "different": [name for part in gather_facts(different) for name in part],
            "kinds": sorted({name.split("/")[0] for part in gather_facts(list(ours)) for name in part}),
        }
    return results


def continues(world: World, folder: Path, stage: int) -> dict[str, Any]:
    """A run directory from another world size and stage is taken up, and left for the next."""
    run = Run(world, folder, STAGES[world.world_size][stage], Precision.fp32)
    started_at = run.state.step
    run.train(started_at + LEG, SNAPSHOT_EVERY)
    run.save()
    losses, expected = reference(started_at + LEG)
    return {
        "started_at": started_at,
        "stage": run.engine.zero_optimization_stage(),
        "loss": losses_off(run.losses, losses[started_at:]),
        "weights": off(run.whole(), expected),
    }


def refuses(world: World, folder: Path, stage: int) -> dict[str, Any]:
    """A checkpoint of Muon is not one of AdamW's."""
    run = Run(world, folder, stage, Precision.fp32)
    run.save()
    try:
        Run(world, folder, stage, Precision.fp32, OptimConfig())
    except ConfigError as error:
        return {"refusal": str(error)}
    return {"refusal": ""}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "equals_torch": equals_torch,
    "resumes_bitwise": resumes_bitwise,
    "continues": continues,
    "refuses": refuses,
}


def main(folder: str, out: str, *names: str) -> None:
    world = runtime.start(threads=1)
    results = []
    for name in names:
        for stage in range(4):
            result = CASES[name](world, Path(folder) / f"{name}-{stage}", stage)
            results.append({"case": name, "number": stage, "stage": stage, **result})
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    runtime.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
