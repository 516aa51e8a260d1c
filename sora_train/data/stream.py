"""The decoding processes of one rank, and the thread that keeps them at work.

Jobs (packs to be read) are taken up in the order of need, sample by sample. Each child has the sample it works on and
the next one. A child that dies costs the sample it was at, reason `crash`; one that stands still is killed, reason
`timeout`, or `read` where bytes did not come; a new child takes its place and the other samples.

The training thread never waits but in `wait`.
"""

import logging
import math
import mmap
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sora_train.data.blocks import Block, Blocks
from sora_train.data.decoder import Request, Setup
from sora_train.data.handover import STATUS_BYTES, Phase, Status, memory_file, send, take_messages
from sora_train.data.precomputed_header import ITEM_BYTES, Place
from sora_train.data.sample import Facts, SampleReader, Task

# Samples a child has at a time: the one it works on, and one so that it need not wait for the next.
TASKS_AHEAD = 2
# Seconds without a sign of life in phases in which the network, or a slow disk, may be to blame.
PATIENCE = {Phase.starting: 300.0, Phase.reading: 120.0}
# Deaths in a row, of all children together, that are no longer the samples' fault: before the first sample, and later.
DEATHS_AT_FIRST = 3
DEATHS_LATER = 20
COMMAND = (sys.executable, "-P", "-m", "sora_train.data.decoder")
DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lost:
    """A sample that could not be read."""

    reason: str


Outcome = Facts | Lost


@dataclass(eq=False)
class Job:
    """Samples whose memory is one block. A place without a task needs no reading: its outcome stays None."""

    tasks: Sequence[Task | None]
    outcomes: list[Outcome | None] = field(init=False)
    starts: list[int] = field(init=False)  # of each sample's part of the block
    num_bytes: int = field(init=False, default=0)
    block: Block | None = field(init=False, default=None)
    is_dropped: bool = field(init=False, default=False)
    _open: deque[int] = field(init=False)  # not handed out
    _unsettled: int = field(init=False)

    def __post_init__(self) -> None:
        self.outcomes, self.starts = [None] * len(self.tasks), []
        for task in self.tasks:
            self.starts.append(self.num_bytes)
            if task is not None:
                pages = -(-task.places.num_bytes // mmap.ALLOCATIONGRANULARITY)
                self.num_bytes += pages * mmap.ALLOCATIONGRANULARITY
        self._open = deque(number for number, task in enumerate(self.tasks) if task is not None)
        self._unsettled = len(self._open)

    @property
    def is_done(self) -> bool:
        """Whether every task has its outcome."""
        return self._unsettled == 0

    def next_task(self) -> int | None:
        """Number of a task to be handed out."""
        return self._open.popleft() if self._open and not self.is_dropped else None

    def take_back(self, number: int) -> None:
        """A task that was handed out and not taken up."""
        self._open.appendleft(number)

    def settle(self, number: int, outcome: Outcome) -> None:
        """The end of a task."""
        self.outcomes[number] = outcome
        self._unsettled -= 1

    @property
    def is_at_rest(self) -> bool:
        """Whether no child has any of its tasks."""
        return self._unsettled == len(self._open)


@dataclass(eq=False)
class _Child:
    process: "subprocess.Popen[bytes]"
    control: socket.socket
    lifeline: int  # its end closes when this process ends, however it ends
    status: Status
    is_told: bool = False  # what to read with
    is_ready: bool = False
    # The first is being worked on, once the child has taken it up.
    tasks: deque[tuple[int, Job, int]] = field(default_factory=deque)
    inbox: bytearray = field(default_factory=bytearray)
    signs: tuple[int, Phase, int] | None = None
    still_seconds: float = 0.0

    def end(self) -> int | None:
        """Kills and buries it. Returns its exit code; None when it is beyond killing (in the kernel)."""
        self.process.kill()
        self.control.close()
        os.close(self.lifeline)
        try:
            return self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return None


class Pool:
    """Child processes that read samples. They start at once, so that they are there when the data set is open.

    Args:
        workers: how many.
        stall_seconds: patience with a child that decodes.
        memory_bytes: what a child may take.
        command: starts a child; the descriptors that it is given follow.
    """

    def __init__(
        self, workers: int, stall_seconds: float, memory_bytes: int, command: Sequence[str] = COMMAND
    ) -> None:
        self.workers, self.memory_bytes, self.command = workers, memory_bytes, tuple(command)
        # One that is asked for a sample and does not even take it up is as still as one that decodes no further frame.
        self.patience = {**PATIENCE, Phase.decoding: stall_seconds, Phase.idle: 4 * stall_seconds}
        self.blocks = Blocks()
        self._setup: bytes | None = None
        self._children: list[_Child] = []
        self._jobs: list[Job] = []
        self._numbers = 0
        self._deaths = self._finished = 0
        self._error: BaseException | None = None
        self._is_closed = False
        # Guards all of the above; told whenever a job is done, or all is lost.
        self._news = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._bell, self._ring = socket.socketpair()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._supervise, name="decoding", daemon=True)
        self._thread.start()

    def open(self, reader: SampleReader, expects_scaling: bool = False) -> None:
        """Says what reads the samples, and whether frames will be scaled; before the first job."""
        self._setup = pickle.dumps(Setup(reader, self.memory_bytes, self.patience, expects_scaling))
        self._wake()

    def submit(self, tasks: Sequence[Task | None], is_urgent: bool = False) -> Job:
        """Asks for samples; behind all that was asked for before, or before it."""
        job = Job(tasks)
        with self._news:
            self._jobs.insert(0 if is_urgent else len(self._jobs), job)
        self._wake()
        return job

    def wait(self, job: Job) -> Tensor | None:
        """Returns the job's memory when all of its outcomes are there; None when nothing was to be read.

        Raises:
            RuntimeError: children cannot start, or die one after the other.
        """
        with self._news:
            self._news.wait_for(lambda: job.is_done or self._error is not None or self._is_closed)
            if not job.is_done:
                raise RuntimeError(str(self._error or "the decoding processes have been ended")) from self._error
            self._jobs.remove(job)
            block, job.block = job.block, None
            return None if block is None else self.blocks.lend(block)

    def drop(self, jobs: Iterable[Job]) -> None:
        """Nobody will wait for these."""
        with self._news:
            for job in jobs:
                job.is_dropped = True
        self._wake()

    def pids(self) -> list[int]:
        """Of the children that live."""
        with self._news:
            return [child.process.pid for child in self._children]

    def close(self) -> None:
        """Ends the children and the thread."""
        with self._news:
            self._is_closed = True
            self._news.notify_all()
        self._wake()
        if threading.current_thread() is not self._thread:  # which may collect the garbage that the pool is part of
            self._thread.join()

    def _wake(self) -> None:
        with suppress(OSError):  # rung already, or closed
            self._ring.send(b"!", socket.MSG_DONTWAIT)

    # What follows runs in the supervising thread, and holds the lock.

    def _supervise(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)  # children inherit it; and they reach the main thread sooner
        tick = self.patience[Phase.decoding] / 16
        seen = time.monotonic()
        try:
            while not self._is_closed:
                with self._news:
                    self._fill_ranks()
                    self._hand_out()
                    self._put_away()
                events = self._selector.select(tick)
                # While this thread, or the machine, stood still itself, nobody is blamed for it.
                elapsed, seen = min(time.monotonic() - seen, 2 * tick), time.monotonic()
                with self._news:
                    for key, _ in events:
                        if key.data is None:
                            self._bell.recv(1 << 10)
                        else:
                            self._hear(key.data)
                    for child in tuple(self._children):
                        self._judge(child, elapsed)
        except BaseException as error:
            with self._news:
                self._error = error
                self._news.notify_all()
        finally:
            with self._news:
                for child in self._children:
                    child.end()
                self._children.clear()
            self._selector.close()

    def _fill_ranks(self) -> None:
        while len(self._children) < self.workers:
            child = _start(self.command)
            self._children.append(child)
            self._selector.register(child.control, selectors.EVENT_READ, child)
        for child in tuple(self._children):
            if self._setup is not None and not child.is_told:
                child.is_told = True
                self._say(child, self._setup)

    def _hand_out(self) -> None:
        for held in range(TASKS_AHEAD):
            for child in tuple(self._children):
                if child.is_ready and len(child.tasks) <= held:
                    job, number = next(
                        ((job, number) for job in self._jobs if (number := job.next_task()) is not None), (None, 0)
                    )
                    if job is None:
                        return
                    self._give(child, job, number)

    def _give(self, child: _Child, job: Job, number: int) -> None:
        task = job.tasks[number]
        assert task is not None
        if job.block is None:
            job.block = self.blocks.take(job.num_bytes)
        self._numbers += 1
        child.tasks.append((self._numbers, job, number))
        request = Request(
            self._numbers, task, job.starts[number], task.places.num_bytes, job.block.number, self.blocks.numbers
        )
        self._say(child, pickle.dumps(request), job.block.file)

    def _say(self, child: _Child, message: bytes, file: int | None = None) -> None:
        try:
            send(child.control, message, file)
        except OSError:
            self._lose(child, "crash")

    def _hear(self, child: _Child) -> None:
        if child not in self._children:  # lost in this very round
            return
        try:
            data = child.control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._lose(child, "crash")
            return
        child.inbox += data
        try:
            for message in take_messages(child.inbox):
                if "broken" in message:
                    raise RuntimeError(f"a decoding process cannot start: {message['broken']}")
                if "ready" in message:
                    child.is_ready = True
                else:
                    self._settle(child, message)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            log.warning("a decoding process said what it should not: %r", error)
            self._lose(child, "crash")

    def _settle(self, child: _Child, message: dict[str, Any]) -> None:
        expected, job, number = child.tasks[0]
        task = job.tasks[number]
        if task is None or message["number"] != expected:
            raise ValueError(f"an answer to task {message['number']} of {expected}")
        outcome: Outcome
        if "facts" in message:
            outcome = facts_from(message["facts"], task.places.num_bytes)
        else:
            outcome = Lost(str(message["reason"]))
            level = logging.WARNING if outcome.reason == "error" else logging.INFO
            log.log(level, "%s of %s: %s", task.sample.row.key, task.shard.name, message["detail"])
        child.tasks.popleft()
        self._finished, self._deaths = self._finished + 1, 0
        job.settle(number, outcome)
        if job.is_done:
            self._news.notify_all()

    def _judge(self, child: _Child, elapsed: float) -> None:
        signs = child.status.look()
        is_at_work = bool(child.tasks) if child.is_ready else child.is_told
        if signs != child.signs or not is_at_work:
            child.signs, child.still_seconds = signs, 0.0
            return
        child.still_seconds += elapsed
        if child.still_seconds > self.patience[signs[1]]:
            self._lose(child, "timeout" if signs[1] is Phase.decoding else "read")

    def _lose(self, child: _Child, reason: str) -> None:
        """Ends a child; the sample it was at is lost, the others are handed out anew."""
        if child not in self._children:
            return
        self._children.remove(child)
        self._selector.unregister(child.control)
        at_work = child.status.look()[0]
        code = child.end()
        is_blamed = bool(child.tasks) and child.tasks[0][0] == at_work
        if is_blamed:
            _, job, number = child.tasks.popleft()
            job.settle(number, Lost(reason))
            if job.is_done:
                self._news.notify_all()
        for _, job, number in reversed(child.tasks):
            job.take_back(number)
        if is_blamed and reason != "crash":
            return
        self._deaths += 1
        if self._deaths >= (DEATHS_LATER if self._finished else DEATHS_AT_FIRST):
            raise RuntimeError(
                f"decoding processes died {self._deaths} times in a row, the last with exit code {code}, without "
                f"reading one sample: see their messages above; try data.workers=0, or more data.worker_memory_gib"
            )

    def _put_away(self) -> None:
        for job in [job for job in self._jobs if job.is_dropped and job.is_at_rest]:
            self._jobs.remove(job)
            if job.block is not None:
                self.blocks.give_back(job.block)


def facts_from(values: dict[str, Any], num_bytes: int) -> Facts:
    """What a child says of a sample whose memory has so many bytes. Raises ValueError, KeyError or TypeError if it
    cannot be."""
    places = []
    for name in ("latents", "rows"):
        place = None
        if values[name] is not None:
            place = Place(values[name]["number"], tuple(values[name]["shape"]), values[name]["offset"])
            size = ITEM_BYTES[place.number] * math.prod(place.shape)
            if min(place.shape) < 1 or not 0 <= place.offset <= num_bytes - size:
                raise ValueError(f"{place} lies outside its memory")
        places.append(place)
    if not isinstance(values["text"], str) or not 0 <= values["t"] <= 1:
        raise ValueError(f"t={values['t']}, text {values['text']!r}")
    return Facts(float(values["t"]), values["text"], *places)


def _start(command: Sequence[str]) -> _Child:
    ours, theirs = socket.socketpair()
    listening, lifeline = os.pipe()
    status_file = memory_file(STATUS_BYTES)
    files = (theirs.fileno(), listening, status_file)
    environment = {
        **os.environ,
        # The same modules as here, whatever the working directory holds; and no GPU, ever.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "CUDA_VISIBLE_DEVICES": "",
        # Children are as many as there are cores to decode on.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    try:
        process = subprocess.Popen(
            [*command, *(str(file) for file in files)],
            pass_fds=files,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a launcher's signals to the process group do not reach it
        )
        return _Child(process, ours, lifeline, Status(status_file))
    finally:
        theirs.close()
        os.close(listening)
        os.close(status_file)
