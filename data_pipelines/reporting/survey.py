"""What is in a data set: a few numbers of every clip, gathered from the index alone. No shard is opened.

About 50 bytes a clip stay in memory: a report of ten million clips takes half a gigabyte.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sora_train.config.data import DataConfig
from sora_train.data.index import Dataset
from sora_train.data.selection import are_held_out
from sora_train.data.shard_table import KINDS, ShardTable
from sora_train.data.size import Stride, clip_sizes

Integers = NDArray[np.int32]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Survey:
    """Columns of all clips, in the order of the manifest."""

    shard_ends: NDArray[np.int64]
    height: Integers  # as displayed
    width: Integers
    fps: Floats
    seconds: Floats
    num_tokens: Integers  # under the size rule; 0: less than one token is left
    is_image: Flags
    is_latent: Flags
    is_held_out: Flags
    source: NDArray[np.uint64]  # the first 8 bytes of its hash
    # Of all captions, clip after clip.
    caption_ends: NDArray[np.int64]
    caption_kind: NDArray[np.uint8]  # number in KINDS
    caption_bytes: Integers

    def __len__(self) -> int:
        return len(self.height)

    @property
    def is_pixel_video(self) -> Flags:
        """Which clips are neither images nor pre-encoded."""
        return ~self.is_image & ~self.is_latent

    @property
    def num_sources(self) -> int:
        """Files that clips were cut from."""
        return len(np.unique(self.source))

    @property
    def num_sources_held_out(self) -> int:
        """Of these, those kept for validation."""
        return len(np.unique(self.source[self.is_held_out]))

    def place(self, clip: int) -> tuple[int, int]:
        """The shard of a clip and its row there."""
        shard = int(np.searchsorted(self.shard_ends, clip, side="right"))
        return shard, clip - (int(self.shard_ends[shard - 1]) if shard else 0)

    def clips_with(self, kind: str) -> NDArray[np.int64]:
        """The clip of each caption of a kind."""
        captions = np.flatnonzero(self.caption_kind == KINDS.index(kind))
        return np.searchsorted(self.caption_ends, captions, side="right").astype(np.int64)

    def caption_lengths(self) -> dict[str, Integers]:
        """Bytes of the captions of each kind that occurs."""
        lengths = {kind: self.caption_bytes[self.caption_kind == number] for number, kind in enumerate(KINDS)}
        return {kind: values for kind, values in lengths.items() if len(values)}



def survey(
    dataset: Dataset, config: DataConfig, stride: Stride, progress: Callable[[int], None] = lambda samples: None
) -> Survey:
    """Reads every index of a data set; `progress` hears of the samples of each.

    Raises:
        ConfigError: an index is damaged, or does not fit its shard.
    """
    columns: dict[str, list[NDArray[np.generic]]] = {name: [] for name in _DTYPES}
    entries = dataset.manifest.shards
    for entry, table in zip(entries, dataset.tables(range(len(entries))), strict=True):
        for name, values in _columns(table, config, stride).items():
            columns[name].append(values.astype(_DTYPES[name]))
        progress(entry.num_samples)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    captions = joined.pop("num_captions")
    return Survey(
        shard_ends=np.cumsum([entry.num_samples for entry in dataset.manifest.shards]),
        caption_ends=np.cumsum(captions, dtype=np.int64),
        **joined,
    )


_DTYPES = {
    "height": np.int32,
    "width": np.int32,
    "fps": np.float32,
    "seconds": np.float32,
    "num_tokens": np.int32,
    "is_image": np.bool_,
    "is_latent": np.bool_,
    "is_held_out": np.bool_,
    "source": np.uint64,
    "num_captions": np.int32,
    "caption_kind": np.uint8,
    "caption_bytes": np.int32,
}


def _columns(table: ShardTable, config: DataConfig, stride: Stride) -> dict[str, NDArray[np.generic]]:
    return {
        "height": table.height,
        "width": table.width,
        "fps": table.fps,
        "seconds": table.duration_seconds,
        "num_tokens": clip_sizes(table, config.size, stride).num_tokens,
        "is_image": table.is_image,
        "is_latent": table.is_latent,
        "is_held_out": are_held_out(table, config.held_out_fraction),
        "source": np.ascontiguousarray(table.source[:, :8]).view(np.uint64).ravel(),
        "num_captions": np.diff(table.caption_ends, prepend=0),
        "caption_kind": table.caption_kind,
        "caption_bytes": table.caption_bytes,
    }
