"""A decoding process: takes up one sample at a time until its parent is gone. It may die or hang; nobody is hurt.

Started by stream.py as `python -m sora_train.data.decoder CONTROL LIFELINE STATUS`, three descriptors. What it hears
comes from its parent and is unpickled; what it says is JSON, since a decoder gone wild may say anything.
"""

import fcntl
import json
import mmap
import os
import pickle
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sora_train.data.handover import Phase, Status, receive, send

# This much longer than its parent would wait, a child waits for itself.
GRACE = 3


@dataclass(frozen=True)
class Setup:
    """The first message to a child: what reads its samples, and its limits."""

    reader: Any  # SampleReader, whose module the child imports when it is unpickled
    memory_bytes: int
    patience: dict[Phase, float]  # seconds without a sign of life
    expects_scaling: bool  # for which torch is needed


@dataclass(frozen=True)
class Request:
    """Every other message: a task, and its part of the memory whose descriptor comes with it."""

    number: int
    task: Any  # Task
    start: int
    num_bytes: int
    block: int  # number of the memory
    blocks: tuple[int, ...]  # those that the parent has


class Memory:
    """What this process sees of its parent's memory: while a decoder runs, the part of its own sample alone.

    Where nothing is decoded whole blocks stay mapped, which spares latents half of what they cost.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, mmap.mmap] = {}

    def part(self, request: Request, file: int) -> memoryview:
        """The memory of a request. Maps are not closed but forgotten: what an error left behind may refer to them."""
        if request.task.sample.row.latent_shape is None:
            self._blocks.clear()
            # All pages at once where that is possible: one by one they cost more than what is written to them.
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            return memoryview(mmap.mmap(file, request.num_bytes, flags=flags, offset=request.start))
        self._blocks = {number: known for number, known in self._blocks.items() if number in request.blocks}
        if request.block not in self._blocks:
            self._blocks[request.block] = mmap.mmap(file, os.fstat(file).st_size)
        return memoryview(self._blocks[request.block])[request.start : request.start + request.num_bytes]


class Signs:
    """Tells the parent, and the clock that ends a child whose parent cannot, that the work goes on."""

    def __init__(self, status: Status, patience: dict[Phase, float]) -> None:
        self.status, self.patience = status, patience

    def begin(self, number: int) -> None:
        """A task is taken up."""
        self.status.begin(number)
        self._wind(Phase.reading)

    def read(self) -> None:
        """Bytes have come, or are asked for again."""
        self._tell(Phase.reading)

    def decoded(self) -> None:
        """A frame has been decoded, or all of them."""
        self._tell(Phase.decoding)

    def idle(self) -> None:
        """The task is done."""
        self.status.tell(Phase.idle)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _tell(self, phase: Phase) -> None:
        self.status.tell(phase)
        self._wind(phase)

    def _wind(self, phase: Phase) -> None:
        signal.setitimer(signal.ITIMER_REAL, GRACE * self.patience[phase])


def main(control: socket.socket, lifeline: int, status: Status) -> None:
    """Works until the parent closes its end."""
    _live_as_long_as(lifeline)
    try:
        setup: Setup = pickle.loads(receive(control)[0])
        _bound(setup.memory_bytes)
        read = _reading(setup.reader)
    except EOFError:
        return
    except BaseException as error:
        traceback.print_exc()
        _say(control, {"broken": repr(error)})
        return
    signs = Signs(status, setup.patience)
    signs.idle()
    _say(control, {"ready": True})
    if setup.expects_scaling and not select.select([control], [], [], 0.2)[0]:
        import torch  # noqa: F401  # takes seconds: rather now, with nothing else to do
    memory = Memory()
    while True:
        try:
            message, file = receive(control)
        except (EOFError, OSError):
            return
        request: Request = pickle.loads(message)
        signs.begin(request.number)
        assert file is not None
        part = memory.part(request, file)
        os.close(file)
        answer = read(request.task, part, signs)
        del part
        signs.idle()
        _say(control, {"number": request.number, **answer})


def _reading(reader: Any) -> Callable[[Any, memoryview, Signs], dict[str, Any]]:
    import numpy as np

    from sora_train.data.sample import SampleError

    def read(task: Any, memory: memoryview, signs: Signs) -> dict[str, Any]:
        try:
            return {"facts": vars(reader.read(task, np.frombuffer(memory, dtype=np.uint8), signs))}
        except SampleError as error:
            return {"reason": error.reason, "detail": error.detail[:1000]}
        except MemoryError as error:
            return {"reason": "memory", "detail": str(error)[:1000]}
        # A library that stumbles over a file costs its clip, not the run.
        except Exception:
            return {"reason": "error", "detail": traceback.format_exc(limit=-8)}

    return read


def _say(control: socket.socket, message: dict[str, Any]) -> None:
    send(control, json.dumps(message, default=vars).encode())


def _live_as_long_as(lifeline: int) -> None:
    """The end of the parent closes its end of the lifeline: the kernel then sends SIGIO, which ends this process even
    where it hangs in a decoder. (Where SIGIO is not deadly, the clock is.)"""
    # A launcher signals whole process groups and cgroups; the training process answers with a checkpoint, for which its
    # children must go on.
    for deaf in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(deaf, signal.SIG_IGN)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    # From here on the kernel tells; what happened before, nobody told.
    os.set_blocking(lifeline, False)
    try:
        if os.read(lifeline, 1) == b"":
            os._exit(0)
    except BlockingIOError:
        pass


def _bound(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file of each crash would fill the disk
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        with open("/proc/self/oom_score_adj", "w") as score:  # rather this process than training
            score.write("800")
    except OSError:
        pass


if __name__ == "__main__":
    control_file, lifeline_file, status_file = (int(word) for word in sys.argv[1:])
    main(socket.socket(fileno=control_file), lifeline_file, Status(status_file))
    os._exit(0)  # taking the interpreter down while libraries that run threads are loaded aborts now and then
