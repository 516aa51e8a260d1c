"""Copies of remote shards on this machine: each downloaded whole and once, the least recently used removed.

A copy is named by the SHA-256 of its bytes, so data sets share it and a shard that changes is another one. Any number
of processes share the folder; who finds a shard on its way reads the remote one meanwhile. Trouble with the cache is
never fatal: then there is no copy.
"""

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fsspec import AbstractFileSystem

from sora_train.data.schema import ShardEntry

CHUNK = 8 << 20

log = logging.getLogger(__name__)


class ShardCache:
    """Copies in `folder`, of at most `num_bytes` in all."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self.folder, self.num_bytes = folder, num_bytes
        # By SHA-256; tried once: a shard that is not what dataset.json says would be downloaded for each of its clips.
        self._refused: set[str] = set()

    def path(
        self, files: AbstractFileSystem, remote: str, shard: ShardEntry, progress: Callable[[], None]
    ) -> Path | None:
        """The copy of a shard, downloaded if need be; None when there is none now.

        Args:
            files, remote: where the shard is.
            shard: its entry in dataset.json: a copy has its size and SHA-256.
            progress: called with every chunk.
        """
        kept = self.folder / f"{shard.sha256}.tar"
        try:
            os.utime(kept)  # used now
            return kept
        except OSError:
            pass
        if not shard.sha256 or shard.num_bytes > self.num_bytes or shard.sha256 in self._refused:
            return None
        try:
            return kept if self._download(files, remote, shard, kept, progress) else None
        # fsspec's file systems raise what their clients raise; the shard is read by range instead.
        except Exception as error:
            log.warning("data.cache_dir=%s takes no copy of %s: %r", self.folder, shard.name, error)
            self._refused.add(shard.sha256)
            return None

    def _download(
        self, files: AbstractFileSystem, remote: str, shard: ShardEntry, kept: Path, progress: Callable[[], None]
    ) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        with part.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return kept.exists()  # another process is at it
            if not _is_still(part, file):
                return kept.exists()  # it was, and has finished
            file.truncate(0)
            self._make_room(shard.num_bytes)
            if _copy(files, remote, file, progress) == (shard.num_bytes, shard.sha256):
                part.replace(kept)
                return True
            part.unlink()
            self._refused.add(shard.sha256)
            return False

    def _make_room(self, num_bytes: int) -> None:
        found = []
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".part"):
                try:
                    facts = path.stat()
                except FileNotFoundError:
                    continue
                found.append((facts.st_mtime, facts.st_size, path))
        total = num_bytes + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.num_bytes:
                return
            if path.suffix == ".tar" or _is_abandoned(path):
                path.unlink(missing_ok=True)
                total -= size


def _copy(
    files: AbstractFileSystem, remote: str, file: BinaryIO, progress: Callable[[], None]
) -> tuple[int, str]:
    digest, count = hashlib.sha256(), 0
    with files.open(remote, "rb", block_size=CHUNK, cache_type="readahead") as source:
        while chunk := source.read(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            count += len(chunk)
            progress()
    file.flush()
    return count, digest.hexdigest()


def _is_still(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_abandoned(path: Path) -> bool:
    """Whether nobody writes to an unfinished copy."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _is_still(path, file)
    except OSError:
        return False
