"""Disks that fail in the middle of a save, at any byte of it. For tests and benchmarks/reliability.py."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

from damage import NEW, OLD, Exchange, two_ranks

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.training import checkpoint, checkpoint_folders, writers
from sora_train.training.checkpoint import TrainState
from sora_train.training.checkpoint_folders import complete_checkpoints
from sora_train.training.fragment_files import LEDGER, verify
from sora_train.training.places import Folder, new_file
from sora_train.training.writers import SaveError

ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "quota": errno.EDQUOT}
OFFSETS = 10


class Failing:
    """A file on a disk that takes so many bytes and no more."""

    def __init__(self, file: BinaryIO, disk: "Disk", name: str) -> None:
        self._file, self._disk, self._name = file, disk, name

    def write(self, content: Any) -> int:
        """As much as there is room for."""
        view = memoryview(content).cast("B")
        self._file.write(view[: max(0, self._disk.room)])
        self._disk.room -= len(view)
        if self._disk.room < 0:
            raise OSError(self._disk.error, os.strerror(self._disk.error))
        return len(view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Disk:
    """Counts the bytes of all files of a save."""

    def __init__(self, room: int, error: int = errno.ENOSPC) -> None:
        self.room, self.error = room, error

    @contextmanager
    def new_file(self, file: Folder) -> Iterator[Any]:
        """In place of `places.new_file`."""
        try:
            with new_file(file) as opened:
                yield Failing(opened, self, str(file))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Checkpoints are written to it."""
        with ExitStack() as stack:
            for module in (checkpoint, checkpoint_folders):
                stack.enter_context(mock.patch.object(module, "new_file", self.new_file))
            yield


def attempt(run_dir: Path, step: int) -> str:
    """Saves as two ranks; what the first is told, or nothing. Both must be told the same."""
    ranks = two_ranks(run_dir, CheckpointConfig(keep=2))
    told = []
    with mock.patch.object(writers, "gather_facts", Exchange()):
        for rank in ranks:
            rank.save(TrainState(step))
        for rank in ranks:
            try:
                rank.wait()
                told.append("")
            except SaveError as error:
                told.append(str(error))
    assert told[0] == told[1], told
    return told[0]


def size_of_a_save(run_dir: Path) -> int:
    """Bytes of everything that a save writes."""
    return sum(path.stat().st_size for path in (run_dir / "checkpoints" / f"step-{NEW:08d}").iterdir())


def fails_at(run_dir: Path, offset: int, error: int) -> str:
    """A save on a disk that fails behind `offset` bytes. "" when it is told in one line, nothing of it is left, the
    checkpoints before are whole, and the next save on a mended disk succeeds."""
    with Disk(offset, error).mounted():
        told = attempt(run_dir, NEW + 1)
    return _aftermath(run_dir, told, os.strerror(error), f"offset {offset}, {os.strerror(error)}")


def is_read_only(run_dir: Path) -> str:
    """The file system takes no new folder."""
    mkdir = Path.mkdir

    def refuses(self: Path, *arguments: Any, **more: Any) -> None:
        if self.name.startswith(".writing"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        mkdir(self, *arguments, **more)

    with mock.patch.object(Path, "mkdir", refuses):
        told = attempt(run_dir, NEW + 1)
    return _aftermath(run_dir, told, "Read-only file system", "read-only")


def exceeds_the_system_s_limit(run_dir: Path, limit: int) -> str:
    """The operating system itself refuses: no file may be larger than `limit`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        told = attempt(run_dir, NEW + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return _aftermath(run_dir, told, "File too large", f"RLIMIT_FSIZE {limit}")


def _aftermath(run_dir: Path, told: str, reason: str, what: str) -> str:
    folder = run_dir / "checkpoints"
    if reason not in told or "\n" in told or "is the last good one" not in told:
        return f"{what}: told {told!r}"
    names = sorted(path.name for path in folder.iterdir())
    if names != ["latest", f"step-{OLD:08d}", f"step-{NEW:08d}"]:
        return f"{what}: left {names}"
    for path in complete_checkpoints(folder):
        verify(path)
    if (folder / "latest").resolve().name != f"step-{NEW:08d}" or not (run_dir / LEDGER).exists():
        return f"{what}: latest moved"
    mended = attempt(run_dir, NEW + 1)
    return f"{what}: then {mended}" if mended else ""
