"""The rows of one shard as columns: what an index file holds, and what planning works on.

A shard of thousands of clips is sized and shuffled by array arithmetic; a row is made only for a clip that is taken.
The file is safetensors: numbers alone, nothing to unpickle, opened without parsing a line.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sora_train.data.schema import (
    FORMAT_VERSION,
    LATENT_SUFFIX,
    MEDIA,
    CaptionEntry,
    CaptionsIn,
    IndexRow,
    Origin,
    Style,
)

# `origin/style` of a caption by its number in an index: new ones go to the end.
KINDS = tuple(f"{origin.value}/{style.value}" for origin in Origin for style in Style)
PLACES = tuple(CaptionsIn)

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class ShardTable:
    """Columns of n samples. Ragged columns (keys, captions) are end to end, with the end of each sample's part."""

    keys: NDArray[np.uint8]  # ASCII
    key_ends: Numbers
    medium: NDArray[np.uint8]  # number in MEDIA
    medium_offset: Numbers
    medium_size: Numbers
    medium_xxh3: NDArray[np.uint64]
    captions_in: NDArray[np.uint8]  # number in CaptionsIn
    record_offset: Numbers
    record_size: Numbers
    text_offset: Numbers
    text_size: Numbers
    num_frames: Numbers
    fps: NDArray[np.float64]
    height: Numbers
    width: Numbers
    duration_seconds: NDArray[np.float64]
    rotation: Numbers
    is_variable_rate: NDArray[np.bool_]
    latent_shape: Numbers  # [n, 4], zeros for pixels
    source: NDArray[np.uint8]  # [n, 32], SHA-256
    caption_kind: NDArray[np.uint8]  # number in KINDS
    caption_bytes: Numbers
    caption_ends: Numbers

    def __len__(self) -> int:
        return len(self.key_ends)

    @property
    def is_image(self) -> NDArray[np.bool_]:
        """Which samples are images: pictures, and latents of one frame."""
        return self.num_frames == 1

    @property
    def is_latent(self) -> NDArray[np.bool_]:
        """Which samples are pre-encoded."""
        return self.medium == MEDIA.index(LATENT_SUFFIX)

    def key(self, i: int) -> str:
        """Of sample i."""
        return self.keys[_begin(self.key_ends, i) : self.key_ends[i]].tobytes().decode("ascii")

    def row(self, i: int) -> IndexRow:
        """Sample i as one record."""
        captions = range(_begin(self.caption_ends, i), int(self.caption_ends[i]))
        medium = MEDIA[self.medium[i]]
        return IndexRow(
            key=self.key(i),
            medium=medium,
            medium_offset=int(self.medium_offset[i]),
            medium_size=int(self.medium_size[i]),
            num_frames=int(self.num_frames[i]),
            fps=float(self.fps[i]),
            height=int(self.height[i]),
            width=int(self.width[i]),
            duration_seconds=float(self.duration_seconds[i]),
            source_sha256=self.source[i].tobytes().hex(),
            captions=tuple(CaptionEntry(KINDS[self.caption_kind[j]], int(self.caption_bytes[j])) for j in captions),
            medium_xxh3=int(self.medium_xxh3[i]),
            captions_in=PLACES[self.captions_in[i]],
            record_offset=int(self.record_offset[i]),
            record_size=int(self.record_size[i]),
            text_offset=int(self.text_offset[i]),
            text_size=int(self.text_size[i]),
            rotation=int(self.rotation[i]),
            is_variable_rate=bool(self.is_variable_rate[i]),
            latent_shape=_shape(self.latent_shape[i]) if medium == LATENT_SUFFIX else None,
        )

    def rows(self) -> tuple[IndexRow, ...]:
        """All of them."""
        return tuple(self.row(i) for i in range(len(self)))

    @staticmethod
    def from_rows(rows: Sequence[IndexRow]) -> "ShardTable":
        """The columns of some rows. Raises ValueError for what no column can hold, e.g. a source that is no SHA-256."""
        captions = [caption for row in rows for caption in row.captions]
        return ShardTable(
            keys=np.frombuffer("".join(row.key for row in rows).encode("ascii"), dtype=np.uint8),
            key_ends=np.cumsum(_numbers(len(row.key) for row in rows)),
            medium=np.array([MEDIA.index(row.medium) for row in rows], dtype=np.uint8),
            medium_offset=_numbers(row.medium_offset for row in rows),
            medium_size=_numbers(row.medium_size for row in rows),
            medium_xxh3=np.array([row.medium_xxh3 for row in rows], dtype=np.uint64),
            captions_in=np.array([PLACES.index(row.captions_in) for row in rows], dtype=np.uint8),
            record_offset=_numbers(row.record_offset for row in rows),
            record_size=_numbers(row.record_size for row in rows),
            text_offset=_numbers(row.text_offset for row in rows),
            text_size=_numbers(row.text_size for row in rows),
            num_frames=_numbers(row.num_frames for row in rows),
            fps=np.array([row.fps for row in rows], dtype=np.float64),
            height=_numbers(row.height for row in rows),
            width=_numbers(row.width for row in rows),
            duration_seconds=np.array([row.duration_seconds for row in rows], dtype=np.float64),
            rotation=_numbers(row.rotation for row in rows),
            is_variable_rate=np.array([row.is_variable_rate for row in rows], dtype=np.bool_),
            latent_shape=np.array([row.latent_shape or (0, 0, 0, 0) for row in rows], dtype=np.int64).reshape(-1, 4),
            source=np.frombuffer(
                b"".join(_sha256(row.source_sha256) for row in rows), dtype=np.uint8
            ).reshape(-1, 32),
            caption_kind=np.array([KINDS.index(caption.kind) for caption in captions], dtype=np.uint8),
            caption_bytes=_numbers(caption.num_bytes for caption in captions),
            caption_ends=np.cumsum(_numbers(len(row.captions) for row in rows)),
        )

    def to_bytes(self) -> bytes:
        """The file; equal tables give equal bytes."""
        columns = {name: np.ascontiguousarray(getattr(self, name)) for name in COLUMNS}
        return bytes(save(columns, metadata={"format_version": str(FORMAT_VERSION)}))

    @staticmethod
    def from_bytes(data: bytes) -> "ShardTable":
        """Raises ValueError for bytes that are no such file, or one whose columns do not fit together."""
        try:
            columns = load(data)
        except SafetensorError as error:
            raise ValueError(f"not an index ({error})") from error
        if columns.keys() != set(COLUMNS):
            raise ValueError(f"not an index: its columns are {sorted(columns)}")
        table = ShardTable(**columns)
        table._check()
        return table

    def _check(self) -> None:
        for ends in (self.key_ends, self.caption_ends):
            if ends.ndim != 1 or ends.dtype != _INT64 or (ends[:1] < 0).any() or (ends[1:] < ends[:-1]).any():
                raise ValueError("not an index: samples that end before they begin")
        num_captions = int(self.caption_ends[-1]) if len(self.caption_ends) else 0
        lengths = {
            "keys": int(self.key_ends[-1]) if len(self) else 0,
            "caption_kind": num_captions,
            "caption_bytes": num_captions,
        }
        for name in COLUMNS:
            column, shape = getattr(self, name), (lengths.get(name, len(self)), *_WIDTHS.get(name, ()))
            if column.shape != shape or column.dtype != _TYPES.get(name, _INT64):
                raise ValueError(f"not an index: column {name} is {column.dtype} {column.shape}, expected {shape}")
        for name, limit in (("medium", len(MEDIA)), ("captions_in", len(PLACES)), ("caption_kind", len(KINDS))):
            if (getattr(self, name) >= limit).any():
                raise ValueError(f"not an index this code reads: column {name} holds unknown kinds")
        for name, least in _LEAST.items():
            if not (getattr(self, name) >= least).all():  # NaN is not
                raise ValueError(f"not an index: column {name} holds values below {least}")


COLUMNS = tuple(ShardTable.__dataclass_fields__)
# Of the columns that are not one int64 a sample.
_INT64 = np.dtype(np.int64)
_WIDTHS = {"latent_shape": (4,), "source": (32,)}
_TYPES = {
    **dict.fromkeys(("keys", "medium", "captions_in", "source", "caption_kind"), np.dtype(np.uint8)),
    **dict.fromkeys(("fps", "duration_seconds"), np.dtype(np.float64)),
    "medium_xxh3": np.dtype(np.uint64),
    "is_variable_rate": np.dtype(np.bool_),
}
# What every sample has at least.
_LEAST = {"num_frames": 1, "height": 1, "width": 1, "fps": 0, "medium_offset": 0, "medium_size": 0}


def _numbers(values: Iterable[int]) -> Numbers:
    return np.fromiter(values, dtype=np.int64)


def _begin(ends: Numbers, i: int) -> int:
    return int(ends[i - 1]) if i else 0


def _shape(values: Numbers) -> tuple[int, int, int, int]:
    c, t, h, w = (int(value) for value in values)
    return c, t, h, w


def _sha256(text: str) -> bytes:
    digest = bytes.fromhex(text)
    if len(digest) != 32:
        raise ValueError(f"source_sha256={text!r} is no SHA-256")
    return digest
