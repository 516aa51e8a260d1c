"""Whether shards still are what their index says: every tar is read again and hashed, as a whole and by sample."""

import hashlib

import xxhash
from fsspec import AbstractFileSystem

from sora_train.config.root import ConfigError
from sora_train.data.index import Dataset
from sora_train.data.scan import Watch
from sora_train.data.schema import DatasetManifest, ShardEntry
from sora_train.data.shard_table import ShardTable
from sora_train.data.tar_members import Readable

_READ_BYTES = 1 << 20
_NAMED = 20  # keys in one line


def verify_shard(files: AbstractFileSystem, folder: str, entry: ShardEntry, watch: Watch) -> tuple[str, ...]:
    """What is wrong with a shard or its index; nothing for one that is as it was.

    Raises:
        OSError: the shard is there and cannot be read.
    """
    try:
        table = Dataset(files, folder, DatasetManifest((entry,))).table(0)
    except ConfigError as error:
        return (str(error),)
    try:
        with files.open(f"{folder}/{entry.name}", "rb", block_size=8 << 20) as file:
            return _compare(file, entry, table, watch)
    except FileNotFoundError:
        return ("is missing",)


def _compare(file: Readable, entry: ShardEntry, table: ShardTable, watch: Watch) -> tuple[str, ...]:
    order = table.medium_offset.argsort()
    starts = table.medium_offset[order].tolist()
    ends = (table.medium_offset + table.medium_size)[order].tolist()
    differing: list[str] = []
    tar, medium = hashlib.sha256(), xxhash.xxh3_64()
    position, i = 0, 0
    while piece := file.read(_READ_BYTES):
        tar.update(piece)
        watch.on_read(len(piece))
        after = position + len(piece)
        while i < len(order) and starts[i] < after:
            medium.update(piece[max(starts[i] - position, 0) : ends[i] - position])
            if ends[i] > after:
                break
            if medium.intdigest() != int(table.medium_xxh3[order[i]]):
                differing.append(table.key(int(order[i])))
            medium.reset()
            i += 1
        position = after
    differing += [table.key(int(j)) for j in order[i:]]
    complaints = []
    if position != entry.num_bytes:
        complaints.append(f"has {position} bytes, {entry.num_bytes} were indexed")
    if tar.hexdigest() != entry.sha256:
        complaints.append("its SHA-256 differs")
    if differing:
        more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
        names = ", ".join(differing[:_NAMED])
        complaints.append(f"{len(differing)} of {len(table)} samples differ: {names}{more}")
    return tuple(complaints)
