"""Run under torchrun by test_checkpointing.py: ranks that save together while they train, many cases in one world."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import torch
from cases import STEPS, Run

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.parallel import Precision
from sora_train.config.root import ConfigError
from sora_train.distributed import runtime
from sora_train.distributed.collectives import barrier, gather_facts
from sora_train.distributed.topology import World
from sora_train.training import checkpoint
from sora_train.training.checkpoint_folders import complete_checkpoints
from sora_train.training.fragment_files import verify
from sora_train.training.host_copy import HostCopy
from sora_train.training.places import Folder, new_file
from sora_train.training.resilience import AgreedStop

FP32 = Precision.fp32


def slow_on(world: World, rank: int, seconds: float) -> Any:
    """One rank's disk is slow."""
    write = HostCopy.write

    def slow(self: HostCopy, file: BinaryIO) -> dict[str, Any]:
        if world.global_rank == rank:
            time.sleep(seconds)
        return write(self, file)

    return mock.patch.object(HostCopy, "write", slow)


def full_on(world: World, rank: int) -> Any:
    """One rank's disk is full."""

    @contextmanager
    def opens(file: Folder) -> Iterator[BinaryIO]:
        with new_file(file) as opened:
            yield opened
            if world.global_rank == rank:
                raise OSError(errno.ENOSPC, "No space left on device", str(file))

    return mock.patch.object(checkpoint, "new_file", opens)


def trains_while_a_rank_writes_slowly(world: World, folder: Path, stage: int) -> dict[str, Any]:
    """Each step is saved; the steps go on, in place, while rank 1 still writes what they were."""
    straight = Run(world, folder / "straight", stage, FP32)
    run = Run(world, folder / "saved", stage, FP32, CheckpointConfig(keep=0))
    kept, went_on = [], 0
    with slow_on(world, 1, 0.05):
        for step in range(1, STEPS + 1):
            run.train(step)
            kept.append(run.pieces())
            run.checkpoints.save(run.state)
            went_on += not (run.checkpoints.folder / f"step-{step:08d}").exists()
        run.checkpoints.wait()
    straight.train(STEPS)
    same = all(torch.equal(a, b) for a, b in zip(run.pieces(), straight.pieces(), strict=True))
    written = []
    for step in range(STEPS, 0, -1):
        newest = complete_checkpoints(run.checkpoints.folder)[0]
        verify(newest)
        other = Run(world, folder / "saved", stage, FP32)
        match = all(torch.equal(a, b) for a, b in zip(other.pieces(), kept[step - 1], strict=True))
        written.append(other.state.step == step and match)
        barrier()
        if world.is_main:
            newest.rename(newest.with_name(f"seen-{step}"))
        barrier()
    return {"went_on": went_on, "same": all(gather_facts(same)), "written": all(gather_facts(all(written)))}


def one_rank_cannot_write(world: World, folder: Path, stage: int) -> dict[str, Any]:
    """The last rank's disk is full: all ranks stop after the same step and say the same."""
    run = Run(world, folder, stage, FP32)
    stop = AgreedStop()
    told, started_at = "", run.state.step
    run.train(1)
    run.checkpoints.save(run.state)
    run.checkpoints.wait()
    with full_on(world, world.world_size - 1), slow_on(world, 0, 0.1):
        while run.state.step < 2000 and not stop.agreed(run.checkpoints.has_failed):
            run.train(run.state.step + 1)
            if run.state.step == 2:
                run.checkpoints.save(run.state)
        try:
            run.checkpoints.wait()
        except ConfigError as error:
            told = str(error)
    names = sorted(path.name for path in run.checkpoints.folder.iterdir())
    again = Run(world, folder, stage, FP32)
    return {
        "started_at": started_at,
        "told": gather_facts(told),
        "stopped_at": gather_facts(run.state.step),
        "names": names,
        "again": again.state.step,
    }


def one_rank_is_not_finite(world: World, folder: Path, stage: int) -> dict[str, Any]:
    run = Run(world, folder, stage, FP32)
    run.train(1)
    if world.global_rank == world.world_size - 1:
        next(fragment for fragment in run.held if fragment.written[0] < fragment.written[1]).master.fill_(float("nan"))
    run.checkpoints.save(run.state)
    told = ""
    try:
        run.checkpoints.wait()
    except FloatingPointError as error:
        told = str(error)
    return {"told": gather_facts(told), "names": [path.name for path in run.checkpoints.folder.iterdir()]}


def resumes_behind_a_url(world: World, folder: Path, stage: int) -> dict[str, Any]:
    """Into an object store, and out of it at another ZeRO stage."""
    config = CheckpointConfig(folder=f"file://{folder}/store")
    straight = Run(world, folder / "straight", stage, FP32)
    straight.train(STEPS)
    first = Run(world, folder, stage, FP32, config)
    first.train(2)
    first.checkpoints.save(first.state)
    first.checkpoints.wait()
    second = Run(world, folder, stage, FP32, config)
    started_at = second.state.step
    second.train(STEPS)
    same = all(torch.equal(a, b) for a, b in zip(straight.pieces(), second.pieces(), strict=True))
    return {"started_at": started_at, "same": all(gather_facts(same)), "elsewhere": (folder / "checkpoints").exists()}


def stops_while_saving(world: World, folder: Path, stage: int) -> dict[str, Any]:
    """A signal to one rank while a save is being written: both checkpoints are there, no step is lost."""
    run = Run(world, folder, stage, FP32)
    stop = AgreedStop()
    with slow_on(world, 0, 0.2):
        while run.state.step < 2000 and not stop.agreed(run.checkpoints.has_failed):
            run.train(run.state.step + 1)
            if run.state.step == 2:
                run.checkpoints.save(run.state)
                if world.global_rank == world.world_size - 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
        run.checkpoints.save(run.state)
        run.checkpoints.wait()
    again = Run(world, folder, stage, FP32)
    found = [path.name for path in complete_checkpoints(run.checkpoints.folder)]
    return {"stopped_at": gather_facts(run.state.step), "again": again.state.step, "found": found}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "trains_while_a_rank_writes_slowly": trains_while_a_rank_writes_slowly,
    "one_rank_cannot_write": one_rank_cannot_write,
    "one_rank_is_not_finite": one_rank_is_not_finite,
    "resumes_behind_a_url": resumes_behind_a_url,
    "stops_while_saving": stops_while_saving,
}


def main(folder: str, out: str) -> None:
    world = runtime.start(threads=1)
    results = []
    for name, case in CASES.items():
        for stage in range(4):
            results.append({"case": name, "stage": stage, **case(world, Path(folder) / f"{name}-{stage}", stage)})
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    runtime.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
