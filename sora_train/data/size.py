"""The native size rule: at which size and rate a clip is trained on, and which of its frames. Pure."""

import math
from dataclasses import dataclass

from sora_train.config.data import SizeConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.data.schema import IndexRow
from sora_train.encoders.codec_shape import CodecShape

# Rates and ratios are floats from containers: 15.999999 frames are 16.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Stride:
    """Frames and pixels that one token covers: sizes are 1 + n * frames, multiples of height and of width."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class ClipSize:
    """What becomes of a clip: frames first_frame + i * frame_step, scaled, then cropped in the middle."""

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
        codec.temporal_ratio, codec.spatial_ratio * model.patch_height, codec.spatial_ratio * model.patch_width
    )


def clip_size(row: IndexRow, config: SizeConfig, stride: Stride) -> ClipSize:
    """Aspect kept, never enlarged, at most max_pixels and max_frames, in whole tokens; the middle of what is longer.

    Raises:
        ConfigError: less than one token is left of the clip.
    """
    scale = min(1.0, math.sqrt(config.max_pixels / (row.height * row.width)))
    scaled_height = math.floor(row.height * scale + TOLERANCE)
    scaled_width = math.floor(row.width * scale + TOLERANCE)
    height, width = scaled_height // stride.height * stride.height, scaled_width // stride.width * stride.width
    frame_step = max(1.0, row.fps / config.sampling_fps)
    sampled = min(math.floor((row.num_frames - 1) / frame_step + TOLERANCE) + 1, config.max_frames)
    if height == 0 or width == 0 or sampled < 1:
        raise ConfigError(
            f"clip {row.key} ({row.num_frames} frames of {row.height}x{row.width}) is smaller than one token "
            f"({stride.height}x{stride.width}) under data.size: leave it out or raise data.size.max_pixels"
        )
    num_frames = 1 + (sampled - 1) // stride.frames * stride.frames
    spare = (row.num_frames - 1) - (num_frames - 1) * frame_step
    return ClipSize(
        num_frames, height, width, scaled_height, scaled_width, math.floor(spare / 2 + TOLERANCE), frame_step
    )


def check_size(config: SizeConfig) -> None:
    """Raises ConfigError for budgets that fit nothing."""
    for name, value in (
        ("max_pixels", config.max_pixels),
        ("max_frames", config.max_frames),
        ("sampling_fps", config.sampling_fps),
    ):
        if value <= 0:
            raise ConfigError(f"data.size.{name}={value} fits no clip: choose a positive number")
