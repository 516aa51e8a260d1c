"""Data sets without tars, of any size, for the tests and the benchmarks of the order: tables are made on demand."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from sora_train.data.schema import CaptionEntry, DatasetManifest, IndexRow, ShardEntry
from sora_train.data.shard_table import ShardTable

# By clip numbers, their frames.
Frames = Callable[[NDArray[np.int64]], NDArray[np.int64]]


def mixed(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """1, 5, 9 or 17 frames, in no order."""
    return np.array([1, 5, 9, 17])[(numbers * 2654435761 >> 7) % 4]


class Simulated:
    """Clips of 64 x 64 pixels at 8 frames a second, two neighbours of one source, with two captions each."""

    def __init__(self, num_shards: int, clips_per_shard: int, frames: Frames = mixed, name: str = "s") -> None:
        self.frames, self.clips_per_shard, self.name = frames, clips_per_shard, name
        self.manifest = DatasetManifest(
            tuple(ShardEntry(f"{name}{i}.tar", 0, "", clips_per_shard) for i in range(num_shards))
        )
        row = IndexRow(
            key=f"{0:010}x0000",
            medium="mp4",
            medium_offset=0,
            medium_size=0,
            num_frames=1,
            fps=8.0,
            height=64,
            width=64,
            duration_seconds=1.0,
            source_sha256="0" * 64,
            captions=(CaptionEntry("original/short", 5), CaptionEntry("recaption/short", 20)),
        )
        one = ShardTable.from_rows([row])
        columns = {
            item.name: np.concatenate([getattr(one, item.name)] * clips_per_shard) for item in fields(ShardTable)
        }
        ends = {name: np.cumsum(columns[name]) for name in ("key_ends", "caption_ends")}
        self.template = ShardTable(**(columns | ends))
        self.places = np.array([[ord(digit) for digit in f"{i:04}"] for i in range(clips_per_shard)], dtype=np.uint8)
        self.loads: list[int] = []

    def tables(self, shards: Iterable[int]) -> Iterator[ShardTable]:
        return map(self.table, shards)

    def table(self, shard: int) -> ShardTable:
        self.loads.append(shard)
        count, first = self.clips_per_shard, shard * self.clips_per_shard
        # The number of the first clip, and how far behind it a clip stands.
        keys = np.frombuffer(f"{first:010}x0000".encode() * count, dtype=np.uint8).reshape(count, -1).copy()
        keys[:, -4:] = self.places
        seed = int.from_bytes(sha256(f"{self.name} {shard}".encode()).digest()[:8], "little")
        sources = np.random.Generator(np.random.Philox(seed)).bytes(32 * (count // 2 + 1))
        source = np.repeat(np.frombuffer(sources, dtype=np.uint8).reshape(-1, 32), 2, axis=0)[:count]
        num_frames = self.frames(first + np.arange(count))
        return replace(self.template, keys=keys.ravel(), num_frames=num_frames, source=source)
