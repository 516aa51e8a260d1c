"""Last stage: clips into WebDataset tars. Tasks write parts; one closing task lays them out as shards of equal size.

A tar is written beside its place and renamed when it is complete and on disk, and holds no time or name of the
machine: the same clips give the same bytes, whatever was killed in between and however many workers there were.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from datatrove.pipeline.base import PipelineStep
from webdataset.writer import ShardWriter

from data_pipelines.record import Record


@dataclass(frozen=True)
class Sample:
    """A finished clip: the bytes of its medium and of its JSON."""

    key: str
    medium: str
    data: bytes
    record_json: bytes


class AtomicFiles:
    """`opener` and `post` of a ShardWriter: a file is complete or absent."""

    def __init__(self) -> None:
        self.open_files: dict[str, IO[bytes]] = {}

    def opener(self, name: str) -> IO[bytes]:
        """Opens NAME.tmp."""
        self.open_files[name] = open(name + ".tmp", "wb")  # noqa: SIM115  (closed by `post`)
        return self.open_files[name]

    def post(self, name: str) -> None:
        """Makes NAME.tmp durable and gives it its name."""
        file = self.open_files.pop(name)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(name + ".tmp", name)


def shard_writer(pattern: str, max_bytes: float) -> ShardWriter:
    """A ShardWriter whose tars are atomic and reproducible; goes on to the next at `max_bytes` of samples."""
    files = AtomicFiles()
    return ShardWriter(
        pattern, maxcount=10**9, maxsize=max_bytes, opener=files.opener, post=files.post, verbose=0, mtime=0.0
    )


class WritePart(PipelineStep):
    """Writes the clips of one task to one tar."""

    name = "write_shards"
    type = "curation"

    def __init__(self, parts: Path) -> None:
        super().__init__()
        self.parts = parts

    def run(self, data: Iterable[Record], rank: int = 0, world_size: int = 1) -> Iterator[Record]:
        """The generator that datatrove chains."""
        with shard_writer(f"{self.parts}/{rank:06d}-%d.tar", float("inf")) as writer:
            for record in data:
                self.stat_update("in", "out")
                record_json = record.to_clip_record().to_json().encode()
                writer.write({"__key__": record.key, record.medium: record.data, "json": record_json})
                yield record


class ReadParts(PipelineStep):
    """Reads the samples of every part, in the order of the sources."""

    name = "read_parts"
    type = "curation"

    def __init__(self, parts: Path) -> None:
        super().__init__()
        self.parts = parts

    def run(self, data: Iterable[Sample] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Sample]:
        """The generator that datatrove starts from."""
        for part in part_files(self.parts):
            yield from read_samples(part)


class WriteShards(PipelineStep):
    """Writes samples to OUTPUT/shard-000000.tar and on."""

    name = "write_shards"
    type = "curation"

    def __init__(self, output: Path, max_bytes: float) -> None:
        super().__init__()
        self.output = output
        self.max_bytes = max_bytes

    def run(self, data: Iterable[Sample], rank: int = 0, world_size: int = 1) -> Iterator[Sample]:
        """The generator that datatrove chains."""
        with shard_writer(f"{self.output}/shard-%06d.tar", self.max_bytes) as writer:
            for sample in data:
                self.stat_update("out")
                writer.write({"__key__": sample.key, sample.medium: sample.data, "json": sample.record_json})
                yield sample


def part_files(parts: Path) -> list[Path]:
    """The tars of all tasks, in the order of their sources."""
    return sorted(parts.glob("*.tar"))


def read_samples(part: Path) -> Iterator[Sample]:
    """The samples of a tar whose members are KEY.json and KEY.MEDIUM, one after the other."""
    with tarfile.open(part, "r:") as tar:
        members = iter(tar)
        for first, second in zip(members, members, strict=True):
            contents = {}
            for member in (first, second):
                key, _, suffix = member.name.rpartition(".")
                file = tar.extractfile(member)
                assert file is not None
                contents[suffix] = file.read()
            record_json = contents.pop("json")
            ((medium, data),) = contents.items()
            yield Sample(key, medium, data, record_json)


def balanced_bytes(total: int, max_bytes: int) -> float:
    """Bytes a shard so that all are about equal and none is much over `max_bytes`."""
    return total / max(1, -(-total // max_bytes))
