"""Work on many shards in processes that may die or hang: a hostile file costs its own sample, not the run.

Each process has one shard at a time and keeps, in shared memory, how far it is and which sample's medium it has open.
When it ends or hangs there, the shard is begun again without that medium; when it ends elsewhere, the shard has failed,
by name. Processes end when the one that started them does, however that ends.
"""

import ctypes
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from sora_train.data.scan import Watch

# A container that is not read after this many seconds never is.
PROBE_SECONDS = 60.0
_POLL_SECONDS = 0.25

Job = TypeVar("Job")
Result = TypeVar("Result")


class Status(ctypes.Structure):
    """What a process tells while it works."""

    _fields_ = (
        ("bytes_read", ctypes.c_int64),
        ("probe_started", ctypes.c_double),  # 0: no medium is open
        ("key", ctypes.c_char * 600),
    )


@dataclass(frozen=True)
class Failed:
    """A shard that could not be worked on, and why."""

    error: str


class _Telling(Watch):
    def __init__(self, status: Any, skipped: Mapping[str, str]) -> None:
        self.status = status
        self.skipped = skipped

    def on_read(self, num_bytes: int) -> None:
        self.status.bytes_read += num_bytes

    def on_probe(self, key: str) -> None:
        self.status.key = key.encode()
        self.status.probe_started = time.monotonic() if key else 0.0


@dataclass
class _Worker(Generic[Job]):
    process: SpawnProcess
    connection: Connection
    status: Any
    job: Job | None = None
    is_late: bool = False


@dataclass
class ShardWorkers(Generic[Job, Result]):
    """Runs `task(job, watch)` for every job in `num_workers` processes."""

    task: Callable[[Job, Watch], Result]  # is pickled
    num_workers: int
    on_progress: Callable[[int], None] = lambda num_bytes: None  # bytes read so far, of all jobs
    probe_seconds: float = PROBE_SECONDS
    _workers: list[_Worker[Job]] = field(default_factory=list)
    _bytes_done: int = 0

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result | Failed]]:
        """Jobs and their results, as they are done."""
        todo = deque((job, dict[str, str]()) for job in jobs)
        skipped: dict[int, dict[str, str]] = {}
        try:
            while todo or any(worker.job is not None for worker in self._workers):
                while len(self._workers) < min(self.num_workers, len(todo) + self._num_busy()):
                    self._workers.append(self._start())
                for worker in self._workers:
                    if worker.job is None and todo:
                        worker.job, reasons = todo.popleft()
                        skipped[id(worker)] = reasons
                        worker.connection.send((worker.job, reasons))
                ready = wait([worker.connection for worker in self._workers], timeout=_POLL_SECONDS)
                for worker in [worker for worker in self._workers if worker.connection in ready]:
                    job = worker.job
                    assert job is not None
                    try:
                        result = worker.connection.recv()
                    except (EOFError, OSError):
                        self._bury(worker)
                        key, reasons = worker.status.key.decode(), skipped[id(worker)]
                        if worker.status.probe_started and key not in reasons:
                            reason = "timeout" if worker.is_late else "crash"
                            todo.appendleft((job, {**reasons, key: reason}))
                        else:
                            yield job, Failed(f"the process that read it ended, {_ending(worker.process)}")
                        continue
                    self._bytes_done += worker.status.bytes_read
                    worker.status.bytes_read, worker.job = 0, None
                    yield job, result
                self._watch()
        finally:
            for worker in list(self._workers):
                worker.process.kill()
                self._bury(worker)

    def _num_busy(self) -> int:
        return sum(worker.job is not None for worker in self._workers)

    def _start(self) -> _Worker[Job]:
        # Not fork: a progress bar and file systems run threads.
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        status = context.RawValue(Status)
        process = context.Process(target=_work, args=(there, status, self.task), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here, status)

    def _watch(self) -> None:
        self.on_progress(self._bytes_done + sum(worker.status.bytes_read for worker in self._workers))
        for worker in self._workers:
            started = worker.status.probe_started
            if started and time.monotonic() - started > self.probe_seconds:
                worker.is_late = True
                worker.process.kill()

    def _bury(self, worker: _Worker[Job]) -> None:
        worker.connection.close()
        worker.process.join()
        self._workers.remove(worker)


def _work(connection: Connection, status: Any, task: Callable[[Any, Watch], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started us ends us
    while True:
        try:
            job, skipped = connection.recv()
        except EOFError:
            return
        status.probe_started = 0.0
        try:
            result = task(job, _Telling(status, skipped))
        except OSError as error:
            result = Failed(str(error))
        connection.send(result)


def _ending(process: SpawnProcess) -> str:
    code = process.exitcode
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
