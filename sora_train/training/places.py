"""Where checkpoints lie: a folder of a file system, or one of an object store behind any fsspec URL (s3://, gs://, …).

`RemoteFolder` says what is asked of a `Path` here in the same words, so that whoever reads need not know which it is.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sora_train.config.root import ConfigError

# A header larger than this is no header: safetensors' own limit.
MAX_HEADER_BYTES = 100_000_000


class RemoteFolder:
    """A name in an object store: a file, or what the names of files begin with."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a protocol that fsspec does not know or that needs a package that is missing."""
        self.url = url.rstrip("/")
        try:
            self._store, self._path = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"checkpoint.folder={url}: {error}") from error

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFolder) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemoteFolder":
        """All but the last part."""
        return RemoteFolder(self.url.rpartition("/")[0])

    def iterdir(self) -> Iterator["RemoteFolder"]:
        """What is in it; nothing where it does not exist. Other writers' files are seen at once."""
        self._store.invalidate_cache()
        try:
            names = self._store.ls(self._path, detail=False)
        except FileNotFoundError:
            return
        for name in names:
            yield self / str(name).rstrip("/").rpartition("/")[2]

    def is_file(self) -> bool:
        """Whether there is a file of that name."""
        return bool(self._store.isfile(self._path))

    def size(self) -> int:
        """Bytes of the file."""
        return int(self._store.size(self._path))

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file, to be read or to be written whole: it is there once it has been closed."""
        if "w" in mode:
            self._store.makedirs(self._path.rpartition("/")[0], exist_ok=True)
        file: BinaryIO = self._store.open(self._path, mode)
        return file

    def read_bytes(self) -> bytes:
        """The whole file."""
        content: bytes = self._store.cat_file(self._path)
        return content

    def read_text(self) -> str:
        """The whole file."""
        return self.read_bytes().decode()

    def remove(self) -> None:
        """The file, or everything under the name; nothing where there is nothing."""
        self._store.invalidate_cache()
        if self._store.exists(self._path):
            self._store.rm(self._path, recursive=True)


Folder = Path | RemoteFolder


def folder_at(place: str) -> Folder:
    """A path, or an fsspec URL."""
    return RemoteFolder(place) if "://" in place else Path(place)


def size_of(file: Folder) -> int:
    """Bytes of a file."""
    return file.size() if isinstance(file, RemoteFolder) else file.stat().st_size


@contextmanager
def new_file(file: Folder) -> Iterator[BinaryIO]:
    """A file to be written from its beginning; once left, its bytes are on disk, or in the store.

    Raises:
        OSError: as the system says it, with the name of the file.
    """
    try:
        with file.open("wb") as opened:
            yield opened
            if isinstance(file, Path):
                opened.flush()
                os.fsync(opened.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error


def open_tensors(file: Folder) -> Any:
    """A safetensors file to be read in stretches: `keys()`, `get_slice(key)[first:last]`, and a context to leave."""
    return RemoteTensors(file) if isinstance(file, RemoteFolder) else safe_open(file, framework="pt")


class RemoteTensors:
    """Flat fp32 tensors of a safetensors file in an object store, read by ranges."""

    def __init__(self, file: RemoteFolder) -> None:
        self._file = file.open("rb")
        length = int.from_bytes(self._file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file} is no safetensors file")
        self._header = json.loads(self._file.read(length))
        self._start = 8 + length

    def __enter__(self) -> "RemoteTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return [name for name in self._header if name != "__metadata__"]

    def get_slice(self, key: str) -> "RemoteSlice":
        """A tensor, not read yet."""
        entry = self._header[key]
        first, last = entry["data_offsets"]
        if entry["dtype"] != "F32" or entry["shape"] != [(last - first) // 4]:
            raise ValueError(f"{key} is not flat fp32")
        return RemoteSlice(self._file, self._start + first, (last - first) // 4)


class RemoteSlice:
    """Numbers in a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length

    def __getitem__(self, stretch: slice) -> Tensor:
        first, last, _ = stretch.indices(self._length)
        self._file.seek(self._offset + 4 * first)
        raw = self._file.read(4 * (last - first))
        if len(raw) != 4 * (last - first):
            raise ValueError("the file ends within a tensor")
        return torch.from_numpy(np.frombuffer(raw, np.float32).copy())
