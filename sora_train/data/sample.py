"""One sample of a plan, read: its bytes fetched, decoded into memory that is given, and its draws made.

Runs in a decoding process (decoder.py), or in the training process when there are none. torch is not imported here:
processes that never scale a frame start without it.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import xxhash
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from sora_train.config.data import CaptionConfig, Decoder
from sora_train.config.diffusion import TimestepConfig
from sora_train.data.caption_text import CaptionError, read_captions
from sora_train.data.captions import spoken
from sora_train.data.clip import DecodeError, decode_clip
from sora_train.data.draws import Purpose, generator
from sora_train.data.fetch import FetchError, Part, ShardBytes
from sora_train.data.order import PlannedSample
from sora_train.data.precomputed_header import ITEM_BYTES, LatentsHeader, Place, latents_header, text_header
from sora_train.data.schema import ShardEntry
from sora_train.data.shard_cache import ShardCache
from sora_train.diffusion.timesteps import sample_t

# Tensors begin at multiples of this.
ALIGNMENT = 64


class SampleError(Exception):
    """A sample that cannot be trained on. `reason` is one word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Watcher(Protocol):
    """Whoever must be told that the work goes on."""

    def read(self) -> None:
        """Bytes have come, or are asked for again."""

    def decoded(self) -> None:
        """A frame has been decoded, or all of them."""


class Unwatched:
    """Tells nobody."""

    def read(self) -> None:
        """Nothing."""

    def decoded(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Task:
    """A planned sample and the shard it is in. Without its medium, no more than its text is read."""

    sample: PlannedSample
    shard: ShardEntry
    has_medium: bool = True

    @property
    def places(self) -> "Places":
        """Of its parts in its memory."""
        return places_of(self.sample, self.has_medium)


@dataclass(frozen=True)
class Places:
    """Where the parts of a sample stand in its memory, each from a multiple of ALIGNMENT on; and its size in bytes.

    Frames, or a member of latents as it is stored (of one that is longer than planned, the planned part); then the
    noise; then the member of text rows as it is stored. Frames, latents and noise are empty where they are not read.
    """

    medium: slice
    noise: slice
    text: slice

    @property
    def num_bytes(self) -> int:
        """Of the whole; never none, of which there could be no view."""
        return max(1, self.text.stop)


def places_of(sample: PlannedSample, has_medium: bool = True) -> Places:
    """Known from the plan alone."""
    row, size = sample.row, sample.size
    if not has_medium:
        return Places(slice(0, 0), slice(0, 0), slice(0, row.text_size))
    if row.latent_shape is None:
        medium = size.num_frames * size.height * size.width * 3
    elif row.latent_shape == sample.latent_shape:
        medium = row.medium_size
    else:
        medium = max(ITEM_BYTES.values()) * math.prod(sample.latent_shape)
    noise, noise_bytes = _aligned(medium), 4 * math.prod(sample.latent_shape)
    text = noise + _aligned(noise_bytes)
    return Places(slice(0, medium), slice(noise, noise + noise_bytes), slice(text, text + row.text_size))


@dataclass(frozen=True)
class Facts:
    """What is to be known of a sample whose memory has been filled."""

    t: float
    text: str  # "" where the caption was dropped
    latents: Place | None = None  # in its memory; None: frames
    rows: Place | None = None  # in its memory; None: `text` counts


@dataclass(frozen=True)
class Source:
    """A data set, as reading needs it."""

    files: AbstractFileSystem
    folder: str
    caption_fields: tuple[str, ...]


@dataclass
class SampleReader:
    """All that reading samples takes; travels to decoding processes by pickle."""

    sources: tuple[Source, ...]  # by PlannedSample.dataset
    timesteps: TimestepConfig
    captions: CaptionConfig
    seed: int
    decoder: Decoder = Decoder.libav
    cache: ShardCache | None = None  # of remote shards
    _bytes: dict[int, ShardBytes] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": {}}

    def read(self, task: Task, memory: NDArray[np.uint8], watcher: Watcher) -> Facts:
        """Fills the memory of a task, [task.places.num_bytes], and makes the sample's draws.

        Raises:
            SampleError: see `fill`.
        """
        sample = task.sample
        facts = self.fill(task, memory, watcher)
        if not task.has_medium:
            return facts
        draw = generator(self.seed, sample.step, sample.index, Purpose.noise)
        noise = memory[task.places.noise].view(np.float32).reshape(sample.latent_shape)
        draw.standard_normal(out=noise, dtype=np.float32)
        watcher.decoded()
        return facts

    def fill(self, task: Task, memory: NDArray[np.uint8], watcher: Watcher) -> Facts:
        """Everything but the noise.

        Raises:
            SampleError: `missing_shard`, `read`, `hash`, `record` (or a more exact word for captions that are not
                what the index says), or what `decode_clip` says.
        """
        sample, row = task.sample, task.sample.row
        places, has_medium = task.places, task.has_medium
        # Latents go where they stay, unless only a part of them does.
        is_direct = row.latent_shape == sample.latent_shape
        medium = memory[places.medium]
        if has_medium and not is_direct:
            medium = np.empty(row.medium_size, dtype=np.uint8)
        rows = memory[places.text]
        has_rows, has_text = row.text_size > 0, sample.caption is not None and row.text_size == 0
        record = bytearray(row.record_size if has_text else 0)
        digest = xxhash.xxh3_64()
        watcher.read()
        parts = [Part(row.medium_offset, medium.data, digest if row.medium_xxh3 else None)] if has_medium else []
        parts += [Part(row.record_offset, memoryview(record))] if has_text else []
        parts += [Part(row.text_offset, rows.data)] if has_rows else []
        source = self.sources[sample.dataset]
        try:
            if parts:
                self._shard_bytes(sample.dataset).fill(task.shard, parts, watcher.read)
            if has_medium and row.medium_xxh3 and digest.intdigest() != row.medium_xxh3:
                raise SampleError("hash", f"{row.key} is not what was indexed")
            text = self._caption(sample, bytes(record), source) if has_text else ""
            if has_medium and row.latent_shape is None:
                if (row.height, row.width) != (sample.size.scaled_height, sample.size.scaled_width):
                    import torch  # noqa: F401  # scaling takes it: seconds, of which the decoder is not to blame

                watcher.decoded()
                frames = memory[places.medium].reshape(sample.size.num_frames, sample.size.height, sample.size.width, 3)
                decode_clip(medium.tobytes(), row, sample.size, watcher.decoded, out=frames, decoder=self.decoder)
        except (FetchError, CaptionError, DecodeError) as error:
            raise SampleError(error.reason, error.detail) from error
        watcher.decoded()
        has_latents = has_medium and row.latent_shape is not None
        return Facts(
            t=timestep(self.timesteps, self.seed, sample),
            text=text,
            latents=_latents(sample, medium, memory, places, is_direct) if has_latents else None,
            rows=_rows(sample, rows, places.text.start) if has_rows else None,
        )

    def _shard_bytes(self, dataset: int) -> ShardBytes:
        if dataset not in self._bytes:
            source = self.sources[dataset]
            self._bytes[dataset] = ShardBytes(source.files, source.folder, self.cache)
        return self._bytes[dataset]

    def _caption(self, sample: PlannedSample, record: bytes, source: Source) -> str:
        row, number = sample.row, sample.caption
        captions = read_captions(record, row.captions_in, source.caption_fields)
        if number is None or len(captions) != len(row.captions):
            raise SampleError("record", f"{len(captions)} captions, the index says {len(row.captions)}")
        draw = generator(self.seed, sample.step, sample.index, Purpose.caption_field)
        return spoken(captions[number], self.captions, draw)


def timestep(config: TimestepConfig, seed: int, sample: PlannedSample) -> float:
    """t of a sample, whether or not it can be read."""
    return sample_t(config, sample.num_tokens, generator(seed, sample.step, sample.index, Purpose.timestep))


def _latents(
    sample: PlannedSample, medium: NDArray[np.uint8], memory: NDArray[np.uint8], places: Places, is_direct: bool
) -> Place:
    """Checks the header; moves what is not where a tensor can be."""
    header = _header(medium)
    if header.shape != sample.row.latent_shape:
        raise SampleError("record", f"latents of {header.shape}, the index says {sample.row.latent_shape}")
    stored, item = header.place, ITEM_BYTES[header.place.number]
    if is_direct and stored.offset % item == 0:
        return stored
    c, frames, h, w = sample.latent_shape
    if header.shape[0] != c or header.shape[1] < frames or header.shape[2:] != (h, w):
        raise SampleError("record", f"latents of {header.shape}, planned are {sample.latent_shape}")
    whole = medium[stored.offset :][: item * math.prod(stored.shape)].reshape(*stored.shape, item)
    first = np.ascontiguousarray(whole[:, :frames]).reshape(-1)
    memory[places.medium][: first.size] = first
    return Place(stored.number, sample.latent_shape, 0)


def _header(medium: NDArray[np.uint8]) -> LatentsHeader:
    try:
        return latents_header(medium.data)
    except ValueError as error:
        raise SampleError("record", str(error)) from error


def _rows(sample: PlannedSample, member: NDArray[np.uint8], start: int) -> Place | None:
    """Of the caption; of the empty text, if it has rows, where the caption was dropped."""
    try:
        header = text_header(member.data)
    except ValueError as error:
        raise SampleError("record", str(error)) from error
    if len(header.captions) != len(sample.row.captions):
        found, indexed = len(header.captions), len(sample.row.captions)
        raise SampleError("record", f"rows of {found} captions, the index says {indexed}")
    place = header.empty if sample.caption is None else header.captions[sample.caption]
    if place is None:
        return None
    item = ITEM_BYTES[place.number]
    if place.offset % item:  # no tensor can begin here; this one belongs to nobody else
        size = item * math.prod(place.shape)
        member[:size] = member[place.offset : place.offset + size].copy()
        place = Place(place.number, place.shape, 0)
    return Place(place.number, place.shape, start + place.offset)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
