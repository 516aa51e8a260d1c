"""Checkpoints of two ranks made in one process, and what may happen to them on a disk, by seed. For tests and
benchmarks/reliability.py."""

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.optim import EmaConfig
from sora_train.distributed.partitions import Fragment
from sora_train.distributed.topology import World
from sora_train.training import writers
from sora_train.training.checkpoint import Checkpoints, TrainState
from sora_train.training.checkpoint_reading import latest_checkpoint, load_weights
from sora_train.training.ema import Ema
from sora_train.training.fragment_files import LEDGER, MANIFEST, DamagedCheckpointError, verify

SHAPE = (40, 33)
OLD, NEW = 5, 10
FACTS = {"config": {"data": {"shards": "x"}}}


class Exchange:
    """What two threads tell each other, in place of two processes."""

    def __init__(self) -> None:
        self._slots: list[Any] = [None, None]
        self._meet = threading.Barrier(2, timeout=30)

    def __call__(self, fact: Any, rank: Any) -> list[Any]:
        if rank is None:
            return [fact]
        self._slots[rank] = fact
        self._meet.wait()
        told = list(self._slots)
        self._meet.wait()
        return told


def build_model() -> nn.Linear:
    return nn.Linear(SHAPE[1], SHAPE[0], bias=False)


def two_ranks(run_dir: Path, config: CheckpointConfig = CheckpointConfig()) -> list[Checkpoints]:  # noqa: B008
    """Each holds half of a matrix. To be used while `writers.gather_facts` is an `Exchange`."""
    model = build_model()
    flat = model.weight.detach().view(-1)
    half = flat.numel() // 2
    ranks = []
    for rank in range(2):
        world = World(rank, 2, rank, 2, torch.device("cpu"))
        part = flat[half * rank : half * (rank + 1)]
        states = {"exp_avg": torch.rand(half), "exp_avg_sq": torch.rand(half)}
        held = [Fragment("weight", SHAPE, half * rank, part, states, (0, half))]
        engine: Any = SimpleNamespace(module=model, optimizer=torch.optim.AdamW(model.parameters()))
        with mock.patch.object(writers.dist, "new_group", return_value=rank):
            ranks.append(
                Checkpoints(run_dir, config, world, engine=engine, held=held, ema=Ema(held, EmaConfig()), facts=FACTS)
            )
    return ranks


def save(ranks: list[Checkpoints], step: int) -> Path:
    """The checkpoint of other weights than the one before."""
    with mock.patch.object(writers, "gather_facts", Exchange()):
        for rank in ranks:
            rank.held[0].master.add_(1.0)
            folder = rank.save(TrainState(step))
        for rank in ranks:
            rank.wait()
    assert isinstance(folder, Path)
    return folder


def write_run(run_dir: Path) -> None:
    """Checkpoints of steps OLD and NEW, with ledgers."""
    run_dir.mkdir(parents=True)
    (run_dir / LEDGER).write_text('{"step": 1, "key": "k", "shard": "s", "reason": "decode"}\n')
    ranks = two_ranks(run_dir)
    for step in (OLD, NEW):
        save(ranks, step)


def flip(draw: random.Random, folder: Path, name: str) -> None:
    """One bit, anywhere."""
    content = bytearray((folder / name).read_bytes())
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    (folder / name).write_bytes(content)


def cut(draw: random.Random, folder: Path, name: str) -> None:
    """Its end is missing."""
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: draw.randrange(len(content))])


def delete(draw: random.Random, folder: Path, name: str) -> None:
    """It is gone."""
    (folder / name).unlink()


def swap(draw: random.Random, folder: Path, name: str) -> None:
    """Two files of a checkpoint have changed names."""
    other = draw.choice([path.name for path in sorted(folder.iterdir()) if path.name != name])
    (folder / name).rename(folder / "between")
    (folder / other).rename(folder / name)
    (folder / "between").rename(folder / other)


def stale(draw: random.Random, folder: Path, name: str) -> None:
    """A file of the checkpoint before: whole, and of the same size."""
    shutil.copyfile(folder.with_name(f"step-{OLD:08d}") / name, folder / name)


DAMAGES: dict[str, Callable[[random.Random, Path, str], None]] = {
    "flip": flip, "cut": cut, "delete": delete, "swap": swap, "stale": stale,
}  # fmt: skip
FILES = ("rank-00000.safetensors", "rank-00001.safetensors", LEDGER, MANIFEST)


def damaged(pristine: Path, run_dir: Path, case: int) -> str:
    """Case `case` on a copy of a run: "" where the damage is refused by the name of a file and the checkpoint before is
    taken, bit for bit; else what went wrong."""
    draw = random.Random(case)
    kind = list(DAMAGES)[case % len(DAMAGES)]
    # A ledger that did not change is no stale one; a manifest of the step before is another checkpoint's.
    names = [name for name in FILES if kind != "stale" or name.startswith("rank")]
    name = draw.choice(names)
    shutil.copytree(pristine, run_dir, symlinks=True)
    newest, before = (run_dir / "checkpoints" / f"step-{step:08d}" for step in (NEW, OLD))
    DAMAGES[kind](draw, newest, name)
    what = f"case {case}: {kind} {name}"
    try:
        verify(newest)
    except DamagedCheckpointError as error:
        if not any(known in str(error) for known in FILES):
            return f"{what}: refused without a name: {error}"
    else:
        return f"{what}: not noticed"
    if kind == "delete" and name == MANIFEST and (newest / MANIFEST).exists():
        return f"{what}: still there"
    if latest_checkpoint(run_dir) != before:
        return f"{what}: {latest_checkpoint(run_dir)} was taken"
    model, expected = build_model(), build_model()
    load_weights(latest_checkpoint(run_dir), model, "master")
    load_weights(pristine / "checkpoints" / before.name, expected, "master")
    return "" if torch.equal(model.weight, expected.weight) else f"{what}: other weights"
