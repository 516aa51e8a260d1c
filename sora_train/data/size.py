"""The native size rule: at which size and rate a clip is trained on, and which of its frames. Pure.

Written once, over columns: a whole shard is sized by array arithmetic, and one row as a shard of one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sora_train.config.data import SizeConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.data.schema import IndexRow
from sora_train.data.shard_table import Numbers, ShardTable
from sora_train.encoders.codec_shape import CodecShape

# Rates and ratios are floats from containers: 15.999999 frames are 16.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Stride:
    """Frames and pixels that one token covers: sizes are 1 + n * frames, multiples of height and of width."""

    frames: int
    height: int
    width: int
    # Of the latents that one token is made of. Pre-encoded clips must have as many channels, and whole patches.
    channels: int = 0
    patch_height: int = 1
    patch_width: int = 1


@dataclass(frozen=True)
class ClipSize:
    """What becomes of a clip: frames first_frame + i * frame_step, scaled, then cropped in the middle.

    Where the rate varies, frames are counted in nominal ones of 1 / row.fps seconds. Of a pre-encoded clip the leading
    latent frames are taken, neither scaled nor cropped.
    """

    num_frames: int
    height: int
    width: int
    scaled_height: int
    scaled_width: int
    first_frame: int
    # Source frames a sampled frame: source rate / sampling rate, >= 1.
    frame_step: float

    @property
    def frame_indices(self) -> list[int]:
        """The source frames, nearest to their times, ascending."""
        return [self.first_frame + math.floor(i * self.frame_step + 0.5 - TOLERANCE) for i in range(self.num_frames)]


@dataclass(frozen=True)
class SourceSizes:
    """What the rule asks of n clips as columns; of a whole shard, ShardTable has them under the same names."""

    num_frames: Numbers
    fps: NDArray[np.float64]
    height: Numbers
    width: Numbers
    latent_shape: Numbers  # [n, 4]
    is_latent: NDArray[np.bool_]

    @staticmethod
    def of(rows: Sequence[IndexRow]) -> "SourceSizes":
        """Of some clips."""
        return SourceSizes(
            num_frames=np.array([row.num_frames for row in rows], dtype=np.int64),
            fps=np.array([row.fps for row in rows], dtype=np.float64),
            height=np.array([row.height for row in rows], dtype=np.int64),
            width=np.array([row.width for row in rows], dtype=np.int64),
            latent_shape=np.array([row.latent_shape or (0, 0, 0, 0) for row in rows], dtype=np.int64).reshape(-1, 4),
            is_latent=np.array([row.latent_shape is not None for row in rows], dtype=np.bool_),
        )


@dataclass(frozen=True)
class ClipSizes:
    """The sizes of n clips as columns."""

    num_frames: Numbers
    height: Numbers
    width: Numbers
    scaled_height: Numbers
    scaled_width: Numbers
    frame_step: NDArray[np.float64]
    spare_frames: Numbers  # the clip may begin at source frames 0 to this
    num_tokens: Numbers  # 0: cannot be trained on

    def clip(self, i: int, part: float | None = None) -> ClipSize:
        """The size of clip i. `part` in [0, 1) says which part of a longer one is taken; None: the middle."""
        spare = int(self.spare_frames[i])
        return ClipSize(
            int(self.num_frames[i]),
            int(self.height[i]),
            int(self.width[i]),
            int(self.scaled_height[i]),
            int(self.scaled_width[i]),
            spare // 2 if part is None else min(int(part * (spare + 1)), spare),
            float(self.frame_step[i]),
        )


def token_stride(model: ModelConfig, codec: CodecShape) -> Stride:
    """What one token covers. Raises ConfigError for patches over several latent frames and for another codec."""
    if model.patch_frames != 1:
        # The first latent frame stands for one frame, the others for temporal_ratio: they share no patch.
        raise ConfigError(f"model.patch_frames={model.patch_frames} is not supported: set it to 1")
    if model.in_channels != codec.channels:
        raise ConfigError(
            f"model.in_channels={model.in_channels} but the codec's latents have {codec.channels}: make them equal"
        )
    return Stride(
        codec.temporal_ratio,
        codec.spatial_ratio * model.patch_height,
        codec.spatial_ratio * model.patch_width,
        codec.channels,
        model.patch_height,
        model.patch_width,
    )


def clip_sizes(sources: ShardTable | SourceSizes, config: SizeConfig, stride: Stride) -> ClipSizes:
    """Aspect kept, never enlarged, at most max_pixels and max_frames, in whole tokens; `num_tokens` 0 where less than
    one token is left, or where latents do not fit the codec and the patches."""
    pixels = np.maximum(sources.height * sources.width, 1)
    scale = np.minimum(1.0, np.sqrt(config.max_pixels / pixels))
    # Of numbers >= 0, what astype cuts off is what floor does.
    scaled_height = (sources.height * scale + TOLERANCE).astype(np.int64)
    scaled_width = (sources.width * scale + TOLERANCE).astype(np.int64)
    height, width = scaled_height // stride.height * stride.height, scaled_width // stride.width * stride.width
    frame_step = np.maximum(1.0, sources.fps / config.sampling_fps)
    sampled = np.floor((sources.num_frames - 1) / frame_step + (1 + TOLERANCE)).astype(np.int64)
    sampled = np.minimum(sampled, config.max_frames)
    num_frames = 1 + (sampled - 1) // stride.frames * stride.frames
    spare = np.maximum((sources.num_frames - 1) - (num_frames - 1) * frame_step + TOLERANCE, 0).astype(np.int64)
    is_latent = sources.is_latent
    if is_latent.any():
        channels, frames, rows, columns = sources.latent_shape.T
        fits = (channels == stride.channels) & (rows % stride.patch_height == 0) & (columns % stride.patch_width == 0)
        longest = 1 + (config.max_frames - 1) // stride.frames
        # Of a causal codec: the leading latents stand for the leading frames, whatever follows.
        num_frames = np.where(is_latent, 1 + (np.minimum(frames, longest) - 1) * stride.frames, num_frames)
        height = np.where(is_latent, rows * fits * (stride.height // stride.patch_height), height)
        width = np.where(is_latent, columns * fits * (stride.width // stride.patch_width), width)
        scaled_height, scaled_width = np.where(is_latent, (height, width), (scaled_height, scaled_width))
        frame_step, spare = np.where(is_latent, 1.0, frame_step), np.where(is_latent, 0, spare)
    frames = np.maximum(1 + (num_frames - 1) // stride.frames, 0)
    num_tokens = frames * (height // stride.height) * (width // stride.width)
    return ClipSizes(num_frames, height, width, scaled_height, scaled_width, frame_step, spare, num_tokens)


def clip_size(row: IndexRow, config: SizeConfig, stride: Stride, part: float | None = None) -> ClipSize:
    """The size of one clip, see `clip_sizes`; `part` in [0, 1) of what is longer, None: the middle.

    Raises:
        ConfigError: it cannot be trained on.
    """
    sizes = clip_sizes(SourceSizes.of([row]), config, stride)
    if sizes.num_tokens[0] == 0:
        raise does_not_fit(row, stride)
    return sizes.clip(0, part)


def does_not_fit(row: IndexRow, stride: Stride) -> ConfigError:
    """The error that names a clip of no tokens."""
    if row.latent_shape is None:
        return ConfigError(
            f"clip {row.key} ({row.num_frames} frames of {row.height}x{row.width}) is smaller than one token "
            f"({stride.height}x{stride.width}) under data.size: leave it out or raise data.size.max_pixels"
        )
    shape = "x".join(str(length) for length in row.latent_shape)
    return ConfigError(
        f"clip {row.key} has latents of {shape} (channels, frames, height, width): the codec's have {stride.channels} "
        f"channels, and patches take multiples of {stride.patch_height}x{stride.patch_width}: encode it again"
    )


def check_size(config: SizeConfig, name: str = "data.size") -> None:
    """Raises ConfigError for budgets that fit nothing."""
    for field in ("max_pixels", "max_frames", "sampling_fps"):
        value = getattr(config, field)
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}.{field}={value} fits no clip: choose a positive number")
