"""The threads that write a checkpoint while training goes on: one on each rank, in step with each other.

They agree over a process group of their own, so no step of training waits for a disk, not even another rank's; and
what one of them could not do is an error on all of them, so all ranks come to the same end.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from sora_train.config.root import ConfigError
from sora_train.distributed.collectives import gather_facts
from sora_train.distributed.topology import World

# How far apart ranks may be in writing the same checkpoint: a slow disk is not a dead rank, and a dead one is noticed
# by its closed connection.
PATIENCE = timedelta(hours=6)

log = logging.getLogger(__name__)
Fact = TypeVar("Fact")


class SaveError(ConfigError):
    """A checkpoint could not be written; one line says which, where and why."""


class Writers:
    """Runs one piece of work at a time on this rank's thread."""

    def __init__(self, world: World) -> None:
        """Every rank must build it at the same point."""
        self._rank = world.global_rank
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if world.world_size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.what = ""
        self.seconds = 0.0  # the last work took

    @property
    def is_busy(self) -> bool:
        """Whether work is going on."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether work has ended with an error that nobody has been told of: the next `wait` raises it."""
        return self._error is not None

    def start(self, what: str, work: Callable[[], None]) -> None:
        """Begins; every rank must, with the same work. The work before must have been waited for."""
        assert self._thread is None
        self.what = what
        began = time.perf_counter()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # whatever it is, it belongs to the thread that trains
                self._error = error
                if not threading.main_thread().is_alive():  # which is on its way out for another reason
                    log.error("%s: %s", what, error)
            self.seconds = time.perf_counter() - began

        # No daemon: a program that ends for another reason finishes the checkpoint it has begun.
        self._thread = threading.Thread(target=run, name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> None:
        """Until the work has ended, if any was begun.

        Raises:
            FloatingPointError, SaveError: what went wrong, on every rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def together(self, part: Callable[[], Fact]) -> list[Fact]:
        """Inside the work: this rank's part of it, then the parts of all, in rank order. No rank goes on before all
        have done theirs.

        Raises:
            FloatingPointError: on every rank, where one raised it.
            SaveError: on every rank, where one raised anything else; the lowest rank's is told.
        """
        fact: Fact | None = None
        cause: Exception | None = None
        try:
            fact = part()
        except Exception as error:  # the others wait for this rank: they must hear of it whatever it is
            cause = error
        told = None if cause is None else (isinstance(cause, FloatingPointError), str(cause) or repr(cause))
        outcomes = gather_facts((fact, told), self._group)
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                is_not_finite, line = problem
                raise (FloatingPointError(line) if is_not_finite else SaveError(f"rank {rank}: {line}")) from cause
        return [fact for fact, _ in outcomes]  # type: ignore[misc]
