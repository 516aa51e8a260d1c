"""Bytes out of shards: the ranges of one clip, fetched together, again when the network fails.

The members of a clip stand side by side in their tar, so one request brings them all. Each decoding process has one
request open at a time, which bounds them on a machine. Local files are read straight into the memory that is asked
for; remote ones through fsspec, or from a copy of the whole shard on this machine (shard_cache.py).
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from sora_train.data.schema import ShardEntry
from sora_train.data.shard_cache import ShardCache

# Members with less than this between them are fetched by one request: a request costs more than so many bytes.
MAX_GAP = 1 << 16
# Read from a file at a time: what has come is hashed while it is still in the processor's cache.
CHUNK = 1 << 20
# Between attempts: no chance in them, so that a run with the same troubles takes the same way.
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)
# No attempt will mend these.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, NotImplementedError)


class FetchError(Exception):
    """Bytes that cannot be had. `reason`: `missing_shard`, or `read` for all else."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Digest(Protocol):
    """What hashes bytes as they come."""

    def update(self, data: memoryview, /) -> object:
        """The next bytes."""


@dataclass(frozen=True)
class Part:
    """So many bytes of a shard as fit into `into`, from `offset`; hashed in passing."""

    offset: int
    into: memoryview
    digest: Digest | None = None

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.offset + len(self.into)


class ShardBytes:
    """Reads the shards of one data set."""

    def __init__(self, files: AbstractFileSystem, folder: str, cache: ShardCache | None = None) -> None:
        """`files`, `folder`: as of Dataset. `cache`: where remote shards are kept; None: nowhere."""
        self.files, self.folder = files, folder
        self.is_local = isinstance(files, LocalFileSystem)
        self.cache = None if self.is_local else cache

    def fill(self, shard: ShardEntry, parts: Sequence[Part], progress: Callable[[], None] = lambda: None) -> None:
        """Fills the parts, by as few requests as there are neighbourhoods of them.

        Args:
            progress: called whenever something has come or is tried again.

        Raises:
            FetchError: after the last attempt.
        """
        path = f"{self.folder}/{shard.name}"
        try:
            if self.is_local:
                _fill_from_file(path, parts)
                return
            if self.cache is not None:
                kept = self.cache.path(self.files, path, shard, progress)
                if kept is not None and _is_filled(str(kept), parts):
                    return
            for run in neighbourhoods(parts):
                self._fill_remote(path, run, progress)
        except FileNotFoundError as error:
            raise FetchError("missing_shard", f"{path} is not there") from error
        except OSError as error:
            raise FetchError("read", f"{path}: {error}") from error

    def _fill_remote(self, path: str, parts: Sequence[Part], progress: Callable[[], None]) -> None:
        start, end = parts[0].offset, max(part.end for part in parts)
        data = memoryview(_with_retries(lambda: self._range(path, start, end), progress))
        for part in parts:
            part.into[:] = data[part.offset - start : part.end - start]
            if part.digest is not None:
                part.digest.update(part.into)

    def _range(self, path: str, start: int, end: int) -> bytes:
        data: bytes = self.files.cat_file(path, start=start, end=end)
        if len(data) != end - start:
            raise OSError(f"{len(data)} of {end - start} bytes at offset {start}")
        return data


def neighbourhoods(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts in order of their offsets, those with at most MAX_GAP between them together."""
    runs: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: part.offset):
        if runs and part.offset - max(before.end for before in runs[-1]) <= MAX_GAP:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _fill_from_file(path: str, parts: Sequence[Part]) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for part in sorted(parts, key=lambda part: part.offset):
            done = 0
            while done < len(part.into):
                chunk = part.into[done : done + CHUNK]
                count = os.preadv(file, [chunk], part.offset + done)
                if count == 0:
                    raise OSError(f"ends {len(part.into) - done} bytes before offset {part.end}")
                if part.digest is not None:
                    part.digest.update(chunk[:count])
                done += count
    finally:
        os.close(file)


def _is_filled(path: str, parts: Sequence[Part]) -> bool:
    """From a copy, which another process may have removed; once opened it is whole."""
    try:
        _fill_from_file(path, parts)
    except FileNotFoundError:
        return False
    return True


def _with_retries(request: Callable[[], bytes], progress: Callable[[], None]) -> bytes:
    for seconds in (*RETRY_SECONDS, None):
        progress()
        try:
            return request()
        except LASTING:
            raise
        # Clients of object stores have errors of their own, not all of them OSError.
        except Exception as error:
            if seconds is None:
                raise OSError(f"{error!r} after {len(RETRY_SECONDS) + 1} attempts") from error
            time.sleep(seconds)
    raise AssertionError
