"""Writes an index: for each tar its NAME.index.safetensors, then index_rejects.jsonl, and dataset.json last of all.

dataset.json never names what is not there, and knows each index by its hash: one that was written since, by a run that
did not come to its end, is not taken for it. `write_index` does it all in this process, for shards of our own making;
data_pipelines.index does it for any shards, in several processes.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from sora_train.config.root import ConfigError
from sora_train.data.index import locate
from sora_train.data.scan import Reject, Watch, scan_shard
from sora_train.data.schema import MANIFEST_NAME, REJECTS_NAME, DatasetManifest, ShardEntry, index_name
from sora_train.data.shard_table import ShardTable

CAPTION_FIELDS = ("caption", "text")
# What tells versions of a file apart, by the names that file systems of fsspec give it.
_STAMPS = ("ETag", "etag", "generation", "md5Hash", "mtime", "created", "last_modified", "LastModified")
_READ_BLOCK = 8 << 20


@dataclass(frozen=True)
class ShardFile:
    """A tar as its file system lists it."""

    name: str  # relative to the data set's folder
    num_bytes: int
    stamp: str  # another one for another version of the file; empty: the file system does not tell


@dataclass(frozen=True)
class ShardReport:
    """What became of a tar."""

    entry: ShardEntry
    rejects: tuple[Reject, ...]
    encoders: tuple[str, ...]
    text_encoders: tuple[str, ...]


def write_index(
    folder: str | Path, caption_fields: Sequence[str] = CAPTION_FIELDS, allow_rejects: bool = False
) -> DatasetManifest:
    """Indexes every tar of a folder or URL, sub-folders included, in this process.

    Raises:
        ConfigError: no shards, no sample that can be indexed, or, unless allowed, anything at all that was rejected.
    """
    files, place = locate(folder, "shards")
    reports = []
    for shard in list_shards(files, place):
        report = index_shard(files, place, shard, caption_fields, Watch())
        for reject in report.rejects if not allow_rejects else ():
            name = f"{shard.name}: {reject.key or 'the tar'}"
            raise ConfigError(
                f"{folder}/{name} is rejected, {reject.reason} ({reject.detail}): write the shard again, or leave such "
                f"samples out with `python -m data_pipelines.index shards={folder}`"
            )
        reports.append(report)
    return write_manifest(files, place, reports, caption_fields)


def list_shards(files: AbstractFileSystem, folder: str) -> list[ShardFile]:
    """The tars of a folder and its sub-folders, by name; hidden folders, as those of unfinished work, are left out.

    Raises:
        ConfigError: there are none, or a sub-folder is a data set of its own, whose indexes would be written over.
    """
    found = []
    for path, info in files.find(folder, detail=True).items():
        name = path.removeprefix(folder).lstrip("/")
        if name.endswith("/" + MANIFEST_NAME) and not name.startswith("."):
            inner = name.removesuffix("/" + MANIFEST_NAME)
            raise ConfigError(f"shards={folder} holds a data set of its own in {inner}: index each by itself")
        if name.endswith(".tar") and not any(part.startswith(".") for part in name.split("/")):
            stamp = " ".join(f"{key}={info[key]}" for key in _STAMPS if info.get(key) is not None)
            found.append(ShardFile(name, info["size"], stamp))
    if not found:
        raise ConfigError(f"shards={folder} holds no *.tar: give a folder of WebDataset shards")
    return sorted(found, key=lambda shard: shard.name)


def index_shard(
    files: AbstractFileSystem, folder: str, shard: ShardFile, caption_fields: Sequence[str], watch: Watch
) -> ShardReport:
    """Reads a tar and writes its index.

    Raises:
        OSError: the tar cannot be read, or its index not be written.
    """
    with files.open(f"{folder}/{shard.name}", "rb", block_size=_READ_BLOCK) as file:
        scan = scan_shard(file, shard.name, caption_fields, watch)
    if scan.num_bytes != shard.num_bytes:
        raise OSError(f"{shard.name} has {scan.num_bytes} bytes, {shard.num_bytes} were listed: it changes meanwhile")
    index = ShardTable.from_rows(scan.rows).to_bytes()
    write_whole(files, f"{folder}/{index_name(shard.name)}", index)
    entry = ShardEntry(
        name=shard.name,
        num_bytes=scan.num_bytes,
        sha256=scan.sha256,
        num_samples=len(scan.rows),
        num_rejected=sum(reject.is_sample for reject in scan.rejects),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    return ShardReport(entry, scan.rejects, scan.encoders, scan.text_encoders)


def write_manifest(
    files: AbstractFileSystem, folder: str, reports: Sequence[ShardReport], caption_fields: Sequence[str]
) -> DatasetManifest:
    """Writes index_rejects.jsonl and dataset.json.

    Raises:
        ConfigError: no shard has a sample that can be indexed; dataset.json is then left as it was.
    """
    rejects = [reject for report in reports for reject in report.rejects]
    place = f"{folder}/{REJECTS_NAME}"
    if rejects:
        write_whole(files, place, "".join(reject.to_json() + "\n" for reject in rejects).encode())
    elif files.exists(place):
        files.rm(place)
    manifest = DatasetManifest(
        shards=tuple(report.entry for report in reports),
        encoders=_union(report.encoders for report in reports),
        text_encoders=_union(report.text_encoders for report in reports),
        caption_fields=tuple(caption_fields),
    )
    if manifest.num_samples == 0:
        first = next((reject for reject in rejects if reject.is_sample), rejects[0] if rejects else None)
        reason = f", the first for {first.reason} ({first.detail})" if first else ""
        raise ConfigError(
            f"shards={folder}: none of {manifest.num_rejected} samples in {len(reports)} tars can be indexed{reason}: "
            f"see {place}"
        )
    write_whole(files, f"{folder}/{MANIFEST_NAME}", (manifest.to_json() + "\n").encode())
    return manifest


def write_whole(files: AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes a file whole or not at all; object stores do so by themselves. Raises OSError."""
    if not isinstance(files, LocalFileSystem):
        try:
            files.pipe_file(path, data)
        except NotImplementedError as error:
            raise OSError(f"{type(files).__name__} only reads") from error
        return
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _union(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(sorted({name for each in names for name in each}))
