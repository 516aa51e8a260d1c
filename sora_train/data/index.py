"""The index of a folder of shards: written once after curation, opened by every run.

`write_index` reads the tars and leaves `dataset.json` and one NAME.index.safetensors a shard; `open_dataset` reads
those and hands out tables shard by shard, and bytes by (shard, offset, size), from any file system fsspec knows.
"""

import hashlib
import os
import re
import tarfile
from functools import lru_cache
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from sora_train.config.root import ConfigError
from sora_train.data.schema import (
    IMAGE_SUFFIXES,
    MANIFEST_NAME,
    VIDEO_SUFFIXES,
    CaptionEntry,
    ClipRecord,
    DatasetManifest,
    IndexRow,
    ShardEntry,
    index_name,
)
from sora_train.data.shard_table import ShardTable

END_OF_TAR = bytes(1024)
KEY = re.compile(r"[A-Za-z0-9_/-]+")
# Shards whose tables stay in memory; the shuffle works on windows of fewer.
CACHED_SHARDS = 64


def write_index(folder: str | Path) -> DatasetManifest:
    """Indexes every *.tar of a local folder; dataset.json comes last, so it never names what is not there.

    Raises:
        ConfigError: no shards, a truncated tar, or a sample that breaks the schema, named.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ConfigError(f"shards={folder} holds no *.tar: give the folder that the curation wrote")
    entries = []
    for path in paths:
        rows = scan_shard(path)
        _write_atomically(folder / index_name(path.name), ShardTable.from_rows(rows).to_bytes())
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        entries.append(ShardEntry(path.name, path.stat().st_size, sha256, len(rows)))
    manifest = DatasetManifest(tuple(entries))
    _write_atomically(folder / MANIFEST_NAME, (manifest.to_json() + "\n").encode())
    return manifest


def scan_shard(path: Path) -> list[IndexRow]:
    """The rows of one local tar, in its order.

    Raises:
        ConfigError: truncated tar, duplicate or malformed key, or a sample without medium or record.
    """
    # tarfile and webdataset end silently at a cut; a whole tar ends in two blocks of zeros.
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(END_OF_TAR)))
        if file.read() != END_OF_TAR:
            raise ConfigError(f"{path} is truncated (no end-of-archive mark): write or copy it again")
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    records: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, _, suffix = member.name.partition(".")
                if not KEY.fullmatch(key) or suffix in members.setdefault(key, {}):
                    raise ConfigError(f"{path}: member {member.name} has a malformed or repeated key: rename it")
                members[key][suffix] = member
                if suffix == "json":
                    content = tar.extractfile(member)
                    assert content is not None
                    records[key] = content.read()
    except tarfile.TarError as error:
        raise ConfigError(f"{path} is not a readable tar ({error}): write or copy it again") from error
    return [_row(path, key, files, records.get(key)) for key, files in members.items()]


def _row(path: Path, key: str, files: dict[str, tarfile.TarInfo], record_json: bytes | None) -> IndexRow:
    media = [suffix for suffix in files if suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES]
    if len(media) != 1 or record_json is None:
        raise ConfigError(
            f"{path}: sample {key} has members {sorted(files)}: it needs one medium "
            f"({', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}) and a json record"
        )
    try:
        record = ClipRecord.from_json(record_json)
    except ValueError as error:
        raise ConfigError(f"{path}: {key}.json is {error}: write the shard with data_pipelines.curate") from error
    medium, record_member = files[media[0]], files["json"]
    return IndexRow(
        key=key,
        medium=media[0],
        medium_offset=medium.offset_data,
        medium_size=medium.size,
        record_offset=record_member.offset_data,
        record_size=record_member.size,
        num_frames=record.num_frames,
        fps=0.0 if media[0] in IMAGE_SUFFIXES else record.fps,
        height=record.height,
        width=record.width,
        duration_seconds=record.duration_seconds,
        source_sha256=record.source.sha256,
        captions=tuple(CaptionEntry(item.kind, len(item.text.encode())) for item in record.captions),
    )


class Dataset:
    """An indexed data set. A table is read when its shard is first asked for; bytes are read by range."""

    def __init__(self, files: AbstractFileSystem, folder: str, manifest: DatasetManifest) -> None:
        self.files = files
        self.folder = folder
        self.manifest = manifest
        self.table = lru_cache(maxsize=CACHED_SHARDS)(self._load_table)

    def _load_table(self, shard: int) -> ShardTable:
        entry = self.manifest.shards[shard]
        try:
            num_bytes = self.files.size(f"{self.folder}/{entry.name}")
            data: bytes = self.files.cat_file(f"{self.folder}/{index_name(entry.name)}")
        except FileNotFoundError as error:
            raise ConfigError(f"{self.folder} lacks {entry.name} or its index: copy the data set again") from error
        try:
            table = ShardTable.from_bytes(data)
        except ValueError as error:
            raise ConfigError(
                f"{self.folder}/{index_name(entry.name)} is {error}: "
                f"rebuild it with `python -m data_pipelines.index shards={self.folder}`"
            ) from error
        if num_bytes != entry.num_bytes or len(table) != entry.num_samples:
            raise ConfigError(
                f"{self.folder}/{entry.name} has {num_bytes} bytes and {len(table)} indexed samples, dataset.json says "
                f"{entry.num_bytes} and {entry.num_samples}: copy the shard again or rebuild the index"
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
    try:
        files, folder = fsspec.core.url_to_fs(str(shards))
        text = files.cat_file(f"{folder}/{MANIFEST_NAME}")
        manifest = DatasetManifest.from_json(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"data.shards={shards} holds no {MANIFEST_NAME}: "
            f"build it with `python -m data_pipelines.index shards={shards}`"
        ) from error
    except (ValueError, ImportError) as error:  # fsspec's, for protocols unknown or not installed
        raise ConfigError(f"data.shards={shards}: {error}") from error
    if manifest.num_samples == 0:
        raise ConfigError(f"data.shards={shards} holds no samples: curate more clips")
    return Dataset(files, folder, manifest)


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
