"""Which clips make the global batch of a step: a pure function of (data set, config, seed, step).

Think of one endless stream of tokens: all training clips of epoch 0 in a shuffled order, then those of epoch 1, and
so on. Step k takes the clips whose first token lies in [k B, (k + 1) B), B = tokens_per_step. World size is no
argument and nothing is remembered, so any number of ranks, at any time, sees the same batches.

The shuffle has two levels: shards are permuted, then the clips within each window of neighbouring shards. Totals by
shard tell where a step begins without walking there.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sora_train.config.data import DataConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.data.captions import check_captions, choose_caption
from sora_train.data.draws import VALIDATION_STEP, Purpose, generator
from sora_train.data.index import Dataset
from sora_train.data.schema import IndexRow
from sora_train.data.size import ClipSize, check_size, clip_size, token_stride
from sora_train.encoders.codec_shape import CodecShape

# Shards whose clips are shuffled together: bounds the rows in memory, however large the data set.
WINDOW_SHARDS = 16


@dataclass(frozen=True)
class PlannedSample:
    """One clip of a global batch, and all that was decided about it."""

    step: int
    index: int  # in the global batch: with seed and step the key of its draws
    dataset: int  # number in Order.datasets
    shard: int  # number in the manifest
    row: IndexRow
    size: ClipSize
    latent_shape: tuple[int, int, int, int]  # C T H W
    num_tokens: int
    caption: int | None  # in row.captions; None: trained without

    @property
    def text_bytes(self) -> int:
        """Length of its caption in bytes, 0 without."""
        return 0 if self.caption is None else self.row.captions[self.caption].num_bytes


@dataclass(frozen=True)
class GlobalBatch:
    """The clips of a step, on all ranks together."""

    step: int
    samples: tuple[PlannedSample, ...]

    @property
    def num_tokens(self) -> int:
        """Video tokens of the step."""
        return sum(sample.num_tokens for sample in self.samples)


@dataclass(frozen=True)
class SizedRow:
    """A row of the index under the size rule."""

    shard: int
    row: IndexRow
    size: ClipSize
    latent_shape: tuple[int, int, int, int]
    num_tokens: int


@dataclass(frozen=True)
class Window:
    """The clips of some shards, shuffled together, and where the tokens of each begin in the window (and its end)."""

    clips: tuple[SizedRow, ...]
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class Epoch:
    """The shards in the order of an epoch, and where the tokens of each window begin in the epoch (and its end)."""

    shards: tuple[int, ...]
    starts: NDArray[np.int64]


class Order:
    """Global batches by step. Holds totals and caches, no position.

    Raises:
        ConfigError: nothing to train on, or a clip that no pack or step can hold, by name.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, model: ModelConfig, codec: CodecShape, seed: int) -> None:
        check_size(config.size)
        check_captions(config.captions)
        self.dataset, self.config, self.model, self.codec, self.seed = dataset, config, model, codec, seed
        self.stride = token_stride(model, codec)
        self._window = lru_cache(maxsize=4)(self._load_window)
        self._epoch = lru_cache(maxsize=2)(self._load_epoch)
        self.shard_tokens = np.zeros(len(dataset.manifest.shards), dtype=np.int64)
        self.num_clips = 0
        for shard in range(len(self.shard_tokens)):
            clips = self._shard_clips(shard)
            # Held-out clips as well: the first validation would be late to say so.
            self._check_fits(clips + self._shard_clips(shard, held_out=True))
            self.shard_tokens[shard] = sum(clip.num_tokens for clip in clips)
            self.num_clips += len(clips)
        self.epoch_tokens = int(self.shard_tokens.sum())
        if self.epoch_tokens == 0:
            raise ConfigError(
                f"data.shards={config.shards} holds no clip outside the held-out sources: "
                f"lower data.held_out_fraction={config.held_out_fraction} or curate more clips"
            )

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step; never empty."""
        position = step * self.config.tokens_per_step
        end = position + self.config.tokens_per_step
        samples: list[PlannedSample] = []
        while position < end:
            # The first clip that begins at or after `position`, and those behind it in the same window.
            epoch_number, offset = divmod(position, self.epoch_tokens)
            epoch = self._epoch(epoch_number)
            number = int(np.searchsorted(epoch.starts, offset, side="right")) - 1
            window = self._window(epoch_number, number)
            window_start = epoch_number * self.epoch_tokens + int(epoch.starts[number])
            first, last = np.searchsorted(window.starts[:-1], [position - window_start, end - window_start])
            for clip in window.clips[first:last]:
                samples.append(self._plan(step, len(samples), clip))
            position = window_start + int(window.starts[-1])
        return GlobalBatch(step, tuple(samples))

    def validation_samples(self, count: int) -> tuple[PlannedSample, ...]:
        """The first `count` held-out clips, fewer if there are fewer, with draws that never change."""
        samples: list[PlannedSample] = []
        for shard in range(len(self.shard_tokens)):
            for clip in self._shard_clips(shard, held_out=True):
                if len(samples) == count:
                    return tuple(samples)
                samples.append(self._plan(VALIDATION_STEP, len(samples), clip))
        return tuple(samples)

    def _plan(self, step: int, index: int, clip: SizedRow) -> PlannedSample:
        caption = choose_caption(clip.row, self.config.captions, generator(self.seed, step, index, Purpose.caption))
        return PlannedSample(
            step, index, 0, clip.shard, clip.row, clip.size, clip.latent_shape, clip.num_tokens, caption
        )

    def _shard_clips(self, shard: int, held_out: bool = False) -> list[SizedRow]:
        clips = []
        for row in self.dataset.table(shard).rows():
            if is_held_out(row.source_sha256, self.config.held_out_fraction) is held_out:
                size = clip_size(row, self.config.size, self.stride)
                shape = self.codec.latent_shape(size.num_frames, size.height, size.width)
                tokens = shape[1] * (shape[2] // self.model.patch_height) * (shape[3] // self.model.patch_width)
                clips.append(SizedRow(shard, row, size, shape, tokens))
        return clips

    def _check_fits(self, clips: list[SizedRow]) -> None:
        for name in ("max_tokens_per_pack", "tokens_per_step"):
            limit = getattr(self.config, name)
            for clip in clips:
                if clip.num_tokens > limit:
                    shard = self.dataset.manifest.shards[clip.shard].name
                    raise ConfigError(
                        f"clip {clip.row.key} of {shard} has {clip.num_tokens} tokens "
                        f"({clip.size.num_frames} frames of {clip.size.height}x{clip.size.width}), over "
                        f"data.{name}={limit}: raise it, or lower data.size.max_pixels or max_frames"
                    )

    def _load_epoch(self, epoch: int) -> Epoch:
        permutation = generator(self.seed, 0, epoch, Purpose.shard_order).permutation(len(self.shard_tokens))
        ends = np.cumsum(self.shard_tokens[permutation])
        # A window ends with its last shard; the last window may be short.
        lasts = np.append(np.arange(WINDOW_SHARDS - 1, len(ends) - 1, WINDOW_SHARDS), len(ends) - 1)
        return Epoch(tuple(int(shard) for shard in permutation), np.concatenate([[0], ends[lasts]]))

    def _load_window(self, epoch: int, number: int) -> Window:
        shards = self._epoch(epoch).shards[number * WINDOW_SHARDS : (number + 1) * WINDOW_SHARDS]
        clips = [clip for shard in shards for clip in self._shard_clips(shard)]
        permutation = generator(self.seed, number, epoch, Purpose.clip_order).permutation(len(clips))
        shuffled = tuple(clips[i] for i in permutation)
        lengths = np.array([0, *(clip.num_tokens for clip in shuffled)], dtype=np.int64)
        return Window(shuffled, np.cumsum(lengths))


def is_held_out(source_sha256: str, fraction: float) -> bool:
    """Whether a source is kept for validation: by the hash of the source, so that its clips stay together."""
    return int(source_sha256[:13], 16) < fraction * 16**13
