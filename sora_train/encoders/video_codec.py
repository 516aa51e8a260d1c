"""Between frames and latents: what every codec promises, and how the configured one is built.

`codec_shape` answers from the config alone (for a VAE: from its config.json), so that planning never loads weights.
"""

from typing import Protocol

import torch
from torch import Tensor

from sora_train.config.encoders import CodecConfig, CodecKind
from sora_train.encoders.codec_shape import CodecShape
from sora_train.encoders.video_vae import load_vae, vae_shape
from sora_train.encoders.wavelet import WaveletCodec, wavelet_shape


class VideoCodec(Protocol):
    """Frozen. Frames are float [3, T, H, W] in [-1, 1]; latents float32 [C, T, H, W], scaled for
    noise of spread 1."""

    shape: CodecShape

    @property
    def identity(self) -> str:
        """Two codecs of one identity give the same latents."""
        ...

    def encode(self, frames_3THW: Tensor) -> Tensor:
        """Raises ValueError when the size does not fit `shape`."""
        ...

    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """Frames in [-1, 1]."""
        ...


def codec_shape(config: CodecConfig) -> CodecShape:
    """Channels and ratios of the configured codec. Raises ConfigError when it cannot be built."""
    return wavelet_shape(config) if config.kind is CodecKind.wavelet else vae_shape(config.path)


def build_codec(config: CodecConfig, device: torch.device | str) -> VideoCodec:
    """The configured codec on a device. Raises ConfigError when it cannot be built."""
    return WaveletCodec(config, device) if config.kind is CodecKind.wavelet else load_vae(config.path, device)


def to_unit_range(frames_THW3: Tensor) -> Tensor:
    """Pixels uint8 [T, H, W, 3] -> frames float32 [3, T, H, W] in [-1, 1], on the same device."""
    return frames_THW3.permute(3, 0, 1, 2).float() / 127.5 - 1


def to_pixels(frames_3THW: Tensor) -> Tensor:
    """Frames [3, T, H, W] in [-1, 1] -> pixels uint8 [T, H, W, 3]; exact inverse of `to_unit_range`."""
    return ((frames_3THW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
