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
from sora_train.config.optim import EmaConfig, OptimConfig, OptimizerKind
from sora_train.config.parallel import ParallelConfig, Precision
from sora_train.distributed import muon, runtime
from sora_train.distributed.collectives import gather_facts
from sora_train.distributed.engine import accumulate, build_engine, set_learning_rate
from sora_train.distributed.partitions import fragments
from sora_train.distributed.topology import World
from sora_train.training.checkpoint import Checkpoints
from sora_train.training.ema import Ema
from sora_train.training.optim import build_optimizer, parameter_groups

OPTIM = OptimConfig(kind=OptimizerKind.muon, clip_norm=1.0, learning_rate=0.01, weight_decay=0.1)
STEPS = 6
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


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Of a map that is to be learnt: a sum over rows, divided by the count of all."""
    target = torch.sin(3 * rows[:, :5])
    loss: Tensor = (model(rows) - target).square().sum() / 24
    return loss


def batch(step: int) -> Tensor:
    return torch.randn(24, 9, generator=torch.Generator().manual_seed(step))


class Run:
    """An engine with its averages and checkpoints, trained on rows that depend on the step alone."""

    def __init__(self, world: World, folder: Path, stage: int, precision: Precision) -> None:
        model = build_net()
        parallel = ParallelConfig(zero_stage=stage, precision=precision)
        self.world = world
        self.shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        self.engine = build_engine(model, build_optimizer(model, OPTIM, world.device), parallel, OPTIM)
        self.held = fragments(self.engine)
        self.ema = Ema(self.held, EmaConfig())
        config = CheckpointConfig(keep=2)
        self.checkpoints = Checkpoints(
            folder, config, world, engine=self.engine, held=self.held, ema=self.ema, facts={"config": {}}
        )
        self.state = self.checkpoints.load_latest()
        self.losses: list[float] = []

    def train(self, steps: int) -> None:
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

    def weights(self) -> dict[str, Tensor]:
        """The fp32 weights, whole."""
        masters = Ema(self.held, EmaConfig())
        return masters.gather(self.shapes)


def reference(steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The same training in plain torch, one process, one batch a step: torch's own Muon, in fp32 instead of bf16."""
    model = build_net()
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
    return losses, {name: value.detach() for name, value in model.named_parameters()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def equals_torch(world: World, folder: Path, stage: int) -> dict[str, Any]:
    results = {}
    losses, expected = reference(STEPS)
    start = {name: value.detach() for name, value in build_net().named_parameters()}
    for place, elements in (("whole", 2**26), ("rounds", 100)):
        with mock.patch.object(muon, "MAX_ELEMENTS", elements):
            run = Run(world, folder / place, stage, Precision.fp32)
            run.train(STEPS)
        weights = run.weights()
        rounds = getattr(run.engine.optimizer, "optimizer", run.engine.optimizer)._rounds
        results[place] = {
            "loss": max(abs(a - b) / b for a, b in zip(run.losses, losses, strict=True)),
            "weights": max(relative(weights[name], expected[name]) for name in expected),
            "change": max(
                relative(weights[name] - start[name], expected[name] - start[name]) for name in expected
            ),
            "rounds": max(len(rounds_) for rounds_ in rounds.values()),
            "losses": run.losses,
        }
    return results


CASES: dict[str, Callable[..., dict[str, Any]]] = {"equals_torch": equals_torch}


def main(folder: str, out: str, *names: str) -> None:
    world = runtime.start(threads=1)
    results = []
    for name in names:
        for stage in range(4):
            result = CASES[name](world, Path(folder) / f"{name}-{stage}", stage)
            results.append({"case": name, "stage": stage, **result})
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    runtime.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
