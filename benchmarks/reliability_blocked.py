"""How long training waits for a checkpoint: against one copy of the same memory, and against DeepSpeed's own save.

One process, ZeRO-1, a state of some hundred MiB; the least of several, since other work on a machine only adds. Run by
benchmarks/reliability.py in a process of its own.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.optim import EmaConfig, OptimConfig
from sora_train.config.parallel import ParallelConfig, Precision
from sora_train.distributed import runtime
from sora_train.distributed.engine import accumulate, build_engine, set_learning_rate
from sora_train.distributed.partitions import fragments
from sora_train.training.checkpoint import Checkpoints, TrainState
from sora_train.training.ema import Ema
from sora_train.training.optim import build_optimizer

OPTIM = OptimConfig()
WIDTH, LAYERS = 1024, 12
REPEATS = 7


def measure(folder: Path) -> dict[str, float]:
    """Seconds and bytes."""
    world = runtime.start(threads=1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    engine = build_engine(
        model,
        build_optimizer(model, OPTIM, world.device),
        ParallelConfig(zero_stage=1, precision=Precision.fp32),
        OPTIM,
    )
    held = fragments(engine)
    ema = Ema(held, EmaConfig())
    checkpoints = Checkpoints(
        folder / "ours", CheckpointConfig(keep=1), world, engine=engine, held=held, ema=ema, facts={}
    )
    set_learning_rate(engine, 1e-4)
    accumulate(engine, engine(torch.randn(4, WIDTH)).square().mean(), is_last=True)
    state = [values for fragment, averages in zip(held, ema.averages, strict=True)
             for values in (fragment.master, averages, *fragment.states.values())]  # fmt: skip
    bytes_of_state = sum(values.nbytes for values in state)
    whole = torch.cat(state)
    other = torch.zeros_like(whole)
    # In turns: whatever else the machine does then falls on each alike.
    copies, blocked, totals, theirs, busy, copying = [], [], [], [], [], []
    for number in range(REPEATS):
        copies.append(_timed(lambda: other.copy_(whole)))
        busy.append(_timed(partial(checkpoints.save, TrainState(number + 1)), time.thread_time))
        checkpoints.wait()
        copying.append(_timed(lambda: other.copy_(whole), time.thread_time))
        figures = checkpoints.figures()
        blocked.append(figures["checkpoint_blocked_seconds"])
        totals.append(figures["checkpoint_seconds"])
        if number < 3:
            began = time.perf_counter()
            engine.save_checkpoint(str(folder / "theirs"), tag=f"step-{number}")
            theirs.append(time.perf_counter() - began)
            shutil.rmtree(folder / "theirs")
    alone, while_writing = _processor_time(checkpoints)
    return {
        "bytes": float(bytes_of_state),
        "copy": min(copies),
        "blocked": min(blocked),
        "save": min(totals),
        "deepspeed": min(theirs),
        "copy_processor": min(copying),
        "blocked_processor": min(busy),
        "alone": alone,
        "while_writing": while_writing,
    }


def _timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def _processor_time(checkpoints: Checkpoints) -> tuple[float, float]:
    """CPU-seconds of this thread for a piece of work: medians alone, and while a checkpoint is being written."""
    a = torch.randn(256, 256)

    def piece() -> float:
        began = time.thread_time()
        product: Tensor = a
        for _ in range(10):
            product = (product @ a).tanh()
        return time.thread_time() - began

    alone, while_writing = [], []
    for number in range(REPEATS):
        checkpoints.save(TrainState(100 + number))
        while checkpoints._writers.is_busy:
            while_writing.append(piece())
        checkpoints.wait()
        alone += [piece() for _ in range(max(20, len(while_writing) // (number + 1)))]
    return statistics.median(alone), statistics.median(while_writing)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(Path(sys.argv[1]))))
    runtime.finish()
