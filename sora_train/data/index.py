"""The index of a folder of shards at run time: tables shard by shard, and bytes by (shard, offset, size).

Opening reads dataset.json alone, however many shards there are. A table that does not belong to the shard that
dataset.json names stops the run by name; a tar that is missing, shorter or other than it was does not: its clips fail
one by one when they are read, and are counted. Any file system that fsspec knows will do.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from sora_train.config.root import ConfigError
from sora_train.data.schema import MANIFEST_NAME, DatasetManifest, index_name
from sora_train.data.shard_table import ShardTable

# Shards whose tables stay in memory; the shuffle works on windows of fewer.
CACHED_SHARDS = 64
# Index files that are fetched at a time: most of the wait is for the first byte.
FETCHED_AT_ONCE = 16
FETCHED_AHEAD = 64


class Dataset:
    """An indexed data set. A table is read when its shard is first asked for; bytes are read by range."""

    def __init__(self, files: AbstractFileSystem, folder: str, manifest: DatasetManifest) -> None:
        self.files = files
        self.folder = folder
        self.manifest = manifest
        self.table = lru_cache(maxsize=CACHED_SHARDS)(self._load_table)

    def tables(self, shards: Iterable[int]) -> Iterator[ShardTable]:
        """The tables of many shards, in the order given; fetched side by side, a few ahead, and not kept.

        Raises:
            ConfigError: as `table`.
        """
        remaining = iter(shards)
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
            while batch := list(islice(remaining, FETCHED_AHEAD)):
                yield from map(self._parse, batch, pool.map(self._fetch, batch))

    def _load_table(self, shard: int) -> ShardTable:
        """The rows of a shard.

        Raises:
            ConfigError: its index is missing, damaged, or of another version of the shard than dataset.json.
        """
        return self._parse(shard, self._fetch(shard))

    def _fetch(self, shard: int) -> bytes:
        name = index_name(self.manifest.shards[shard].name)
        try:
            data: bytes = self.files.cat_file(f"{self.folder}/{name}")
        except OSError as error:
            raise ConfigError(
                f"{self.folder}/{name} cannot be read ({error.strerror or error}): copy the data set again, or run "
                f"`python -m data_pipelines.index shards={self.folder}`"
            ) from error
        return data

    def _parse(self, shard: int, data: bytes) -> ShardTable:
        entry = self.manifest.shards[shard]
        place = f"{self.folder}/{index_name(entry.name)}"
        rebuild = f"run `python -m data_pipelines.index shards={self.folder}`"
        if entry.index_sha256 and hashlib.sha256(data).hexdigest() != entry.index_sha256:
            raise ConfigError(f"{place} is damaged or not the one that {MANIFEST_NAME} was written with: {rebuild}")
        try:
            table = ShardTable.from_bytes(data)
        except ValueError as error:
            raise ConfigError(f"{place} is {error}: {rebuild}") from error
        if len(table) != entry.num_samples:
            raise ConfigError(
                f"{place} has {len(table)} samples, {MANIFEST_NAME} says {entry.num_samples} of {entry.name}: {rebuild}"
            )
        return table

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset`. Raises OSError when they cannot be read."""
        name = self.manifest.shards[shard].name
        data: bytes = self.files.cat_file(f"{self.folder}/{name}", start=offset, end=offset + size)
        if len(data) != size:
            raise OSError(f"{name} ends after {len(data)} of {size} bytes at offset {offset}")
        return data

    def __reduce__(self) -> tuple[object, ...]:
        # Workers get the manifest and the place, not the tables.
        return Dataset, (self.files, self.folder, self.manifest)


def open_dataset(shards: str | Path) -> Dataset:
    """Opens the data set in a folder or at an fsspec URL (s3://, gs://, https://, …).

    Raises:
        ConfigError: there is no dataset.json, or one of another format; or no file system for the URL.
    """
    files, folder = locate(shards, "data.shards")
    try:
        manifest = DatasetManifest.from_json(files.cat_file(f"{folder}/{MANIFEST_NAME}"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"data.shards={shards} holds no {MANIFEST_NAME}: "
            f"build it with `python -m data_pipelines.index shards={shards}`"
        ) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"data.shards={shards}: {error}") from error
    if manifest.num_samples == 0:
        raise ConfigError(f"data.shards={shards} holds no samples: curate more clips")
    return Dataset(files, folder, manifest)


def locate(shards: str | Path, setting: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a folder or URL, and the folder in it. `setting`: what to call it in a message.

    Raises:
        ConfigError: no name; `pipe:`, which other readers of WebDataset hand to a shell; a protocol unknown or not
            installed.
    """
    if not str(shards):
        raise ConfigError(f"{setting} is empty: give a folder or a URL")
    if str(shards).startswith("pipe:"):
        raise ConfigError(f"{setting}={shards}: commands are not run: give a folder or a URL")
    try:
        files, folder = fsspec.core.url_to_fs(str(shards))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{setting}={shards}: {error}") from error
    return files, folder.rstrip("/")
