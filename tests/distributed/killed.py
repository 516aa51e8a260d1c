"""Worlds of two ranks that are killed and started again until their run is finished. For test_killed.py and
benchmarks/reliability.py.

    python killed.py FOLDER OUT FIRST LAST      kills FIRST up to, not including, LAST; a line of JSON of counts

Ranks are forked from one process that has imported everything, so a start takes a second, not ten. What each step's
loss was goes into a file at once; after each kill every complete checkpoint is read, byte by byte; a run that comes to
its end is compared with one that nobody interrupted.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.optim import EmaConfig, OptimConfig
from sora_train.config.parallel import ParallelConfig, Precision
from sora_train.distributed import runtime
from sora_train.distributed.collectives import gather_facts
from sora_train.distributed.engine import accumulate, build_engine, set_learning_rate
from sora_train.distributed.partitions import fragments
from sora_train.distributed.topology import World
from sora_train.training.checkpoint import Checkpoints
from sora_train.training.checkpoint_folders import complete_checkpoints
from sora_train.training.ema import Ema
from sora_train.training.fragment_files import DamagedCheckpointError, verify
from sora_train.training.host_copy import HostCopy
from sora_train.training.optim import build_optimizer

OPTIM = OptimConfig(clip_norm=1.0, learning_rate=0.01, weight_decay=0.1)
CONFIG = CheckpointConfig(save_every=2, keep=2)
STEPS, RANKS = 24, 2
LOSSES, END, LOADING, LOADED = "losses.jsonl", "end.json", "loading", "loaded"
# Of every eight kills: when, and what is made slow.
MOMENTS = ("save", "save", "slow", "save", "any", "slow", "save", "load")


class Net(nn.Module):
    """Megabytes, so that a save takes a while; odd sizes, so that partitions cut through parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(63, 1001), nn.Linear(1001, 301)

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(rows)))


def train(world: World, run_dir: Path, stage: int) -> None:
    """To the last step, from wherever the run is."""
    torch.manual_seed(7)
    model = Net()
    parallel = ParallelConfig(zero_stage=stage, precision=Precision.fp32)
    engine = build_engine(model, build_optimizer(model, OPTIM, world.device), parallel, OPTIM)
    held = fragments(engine)
    ema = Ema(held, EmaConfig(decay=0.9))
    checkpoints = Checkpoints(run_dir, CONFIG, world, engine=engine, held=held, ema=ema, facts={"config": {}})
    (run_dir / LOADING).touch()
    state = checkpoints.load_latest()
    (run_dir / LOADED).touch()
    while state.step < STEPS:
        set_learning_rate(engine, OPTIM.learning_rate)
        rows = torch.randn(RANKS, 8, 63, generator=torch.Generator().manual_seed(state.step))[world.global_rank]
        loss = engine(rows).square().sum() / 16
        accumulate(engine, loss, is_last=True)
        ema.update(state.step)
        total = sum(gather_facts(loss.item()))
        state = state.next()
        if world.is_main:
            with (run_dir / LOSSES).open("a") as file:
                file.write(json.dumps([state.step, total.hex()]) + "\n")
        if state.step % CONFIG.save_every == 0:
            checkpoints.save(state)
    checkpoints.wait()
    if world.is_main:
        files = json.loads((complete_checkpoints(run_dir / "checkpoints")[0] / "manifest.json").read_text())["files"]
        (run_dir / END).write_text(json.dumps(files))


def start_world(run_dir: Path, stage: int, slow: tuple[int, float] | None = None) -> list[int]:
    """Process ids of the ranks. `slow`: a rank, and how many seconds its writer hesitates."""
    for name in (LOADING, LOADED):
        (run_dir / name).unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            try:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                )  # fmt: skip
                if slow is not None and slow[0] == rank:
                    hesitate(slow[1])
                train(runtime.start(threads=1), run_dir, stage)
                runtime.finish()
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(1)
        pids.append(pid)
    return pids


def hesitate(seconds: float) -> None:
    """This rank's writer begins late."""
    write = HostCopy.write

    def late(self: HostCopy, file: BinaryIO) -> dict[str, Any]:
        time.sleep(seconds)
        return write(self, file)

    HostCopy.write = late  # type: ignore[method-assign]


def join(pids: list[int]) -> bool:
    """Whether all ended well."""
    return [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)


def ended(pid: int) -> bool:
    """Whether it did, without waiting; it stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for(is_there: Any, pids: list[int]) -> None:
    """Until something shows, or a rank has ended."""
    until = time.monotonic() + 120
    while not is_there() and not any(map(ended, pids)):
        assert time.monotonic() < until, "a world does nothing"
        time.sleep(0.0005)


def kill(draw: random.Random, run_dir: Path, stage: int, moment: str) -> dict[str, bool]:
    """Starts the world, kills it at a moment. Tells whether it was killed, within a save, within a load."""
    writing = run_dir / "checkpoints"
    slow = (draw.randrange(RANKS), draw.uniform(0.05, 0.3)) if moment == "slow" else None
    left = _unfinished(writing)  # by kills before; a world that saves begins by removing it
    pids = start_world(run_dir, stage, slow)

    def is_writing() -> bool:
        return any(item not in left for item in _unfinished(writing))

    if moment == "load":
        wait_for((run_dir / LOADING).exists, pids)
        time.sleep(draw.uniform(0, 0.03))
    else:
        wait_for((run_dir / LOADED).exists, pids)
        if moment == "any":
            time.sleep(draw.uniform(0, 0.5))
        else:
            for _ in range(draw.randint(1, 4)):  # not always the first save
                wait_for(is_writing, pids)
                time.sleep(draw.uniform(0, 0.02))
                if draw.random() < 0.5:
                    break
                wait_for(lambda: not is_writing(), pids)
            wait_for(is_writing, pids)
            time.sleep(draw.choice([0, draw.uniform(0, 0.03), draw.uniform(0, 0.3 if moment == "slow" else 0.08)]))
    draw.shuffle(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        time.sleep(draw.choice([0, draw.uniform(0, 0.03)]))  # the other lives on for a while
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    return {
        "killed": signal.SIGKILL in statuses,
        "in_save": is_writing(),
        "in_load": not (run_dir / LOADED).exists(),
    }


def _unfinished(checkpoints: Path) -> set[tuple[str, int]]:
    """Names and ages of what is being written, or was."""
    found = set()
    for path in checkpoints.glob(".writing-step-*"):
        try:
            found.add((path.name, path.stat().st_ctime_ns))
        except FileNotFoundError:  # it was renamed meanwhile
            continue
    return found


def read_losses(run_dir: Path) -> list[list[Any]]:
    """(step, loss as hex) of each step that was done, in order; a line that a kill cut off is left out."""
    lines = (run_dir / LOSSES).read_text().splitlines() if (run_dir / LOSSES).exists() else []
    return [json.loads(line) for line in lines if line.startswith("[") and line.endswith("]")]


def prepare() -> None:
    """Imports and compiles what ranks need, before they are forked; in an environment of its own, since a process that
    is killed while it compiles leaves a lock that others would wait for."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    import logging
    import warnings

    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # with all of the compiler behind it

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    torch.set_num_threads(1)
    build_optimizer(Net(), OPTIM, torch.device("cpu"))


def straight(folder: Path, stage: int) -> tuple[dict[int, str], Any]:
    """Losses and the last checkpoint's files of the run that nobody interrupts; made once."""
    run_dir = folder / f"straight-{stage}"
    if not (run_dir / END).exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        assert join(start_world(run_dir, stage)), "the run that nobody kills fails"
    return dict(read_losses(run_dir)), json.loads((run_dir / END).read_text())


def campaign(folder: Path, first: int, last: int) -> dict[str, Any]:
    """Kills number `first` up to `last`, stages in turn. What it counts is asked for in `problems`: none should be."""
    prepare()
    counts: dict[str, Any] = {
        "kills": 0, "in_save": 0, "slow": 0, "in_load": 0, "resumes": 0, "finished": 0, "equal": 0, "checked": 0,
        "problems": [],
    }  # fmt: skip
    number = first
    while number < last:
        stage = 1 + (number // 8) % 3
        losses, files = straight(folder, stage)
        run_dir = folder / f"run-{number}"
        run_dir.mkdir(parents=True)
        had_one = False
        while number < last and not (run_dir / END).exists() and number // 8 % 3 == stage - 1:
            moment = MOMENTS[number % len(MOMENTS)]
            seen = kill(random.Random(number), run_dir, stage, moment)
            if seen["killed"]:
                counts["kills"] += 1
                counts["slow"] += moment == "slow"
                counts["in_save"] += seen["in_save"]
                counts["in_load"] += seen["in_load"]
                number += 1
            whole = []
            for checkpoint in complete_checkpoints(run_dir / "checkpoints"):
                try:
                    verify(checkpoint)
                    whole.append(checkpoint)
                except DamagedCheckpointError as error:
                    counts["problems"].append(f"kill {number}: {checkpoint.name}: {error}")
                counts["checked"] += 1
            if had_one and not whole:
                counts["problems"].append(f"kill {number}: no good checkpoint is left")
            had_one = had_one or bool(whole)
        if not (run_dir / END).exists() and not join(start_world(run_dir, stage)):
            counts["problems"].append(f"kill {number}: the run could not be taken up")
            continue
        counts["resumes"] += 1
        done = read_losses(run_dir)
        wrong = [step for step, loss in done if losses[step] != loss]
        end = json.loads((run_dir / END).read_text())
        counts["finished"] += 1
        if wrong or {step for step, _ in done} != set(losses) or end != files:
            counts["problems"].append(f"before kill {number}: steps {wrong[:3]} differ, or the weights do")
        else:
            counts["equal"] += 1
        shutil.rmtree(run_dir)
        print(f"{counts['kills']} kills {json.dumps(counts)}", file=sys.stderr, flush=True)
    return counts


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(campaign(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))))
