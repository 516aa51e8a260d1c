"""An invertible codec without weights: a Haar wavelet over small boxes of frames, rows and columns.

Trains end to end on a laptop, and loses nothing: what a model generates with it is the model's own doing. The first
frame stands alone (repeated to fill its box, as causal video VAEs do), so an image is a video of one frame.
"""

import torch
from torch import Tensor

from sora_train.config.encoders import CodecConfig
from sora_train.config.root import ConfigError
from sora_train.encoders.codec_shape import CodecShape

# Root mean square of natural pixels in [-1, 1] is near 0.5.
PIXEL_RMS = 0.5


def haar_matrix(size: int) -> Tensor:
    """Orthonormal Haar transform, float64 [size, size]; row 0 is the mean times sqrt(size) (Haar 1910)."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = size // 2
    average = torch.kron(haar_matrix(half), torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    detail = torch.kron(torch.eye(half, dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    return torch.cat([average, detail]) / 2**0.5


def check_wavelet(config: CodecConfig) -> None:
    """Raises ConfigError unless both ratios are powers of two."""
    for name, ratio in (("temporal_ratio", config.temporal_ratio), ("spatial_ratio", config.spatial_ratio)):
        if ratio < 1 or ratio & (ratio - 1):
            raise ConfigError(f"codec.{name}={ratio} is not a power of two: choose 1, 2, 4 or 8")


def wavelet_shape(config: CodecConfig) -> CodecShape:
    """3 * temporal_ratio * spatial_ratio^2 channels: as many numbers as pixels."""
    check_wavelet(config)
    return CodecShape(3 * config.temporal_ratio * config.spatial_ratio**2, config.temporal_ratio, config.spatial_ratio)


class WaveletCodec:
    """Haar wavelet over boxes of temporal_ratio x spatial_ratio x spatial_ratio pixels.

    Channels run over coefficients, coarse first, then colour: the first three are the box's mean colour.

    ONE constant scales all channels, such that the mean colour of a box has a spread near 1 and detail far less. With a
    spread of 1 over all channels the mean colour's would be sqrt(box), and noise would hide it only as t nears 1: a
    model then decides each box for itself, in the few levels of t where it should agree with its neighbours. With a
    constant for each channel, most of the loss would be spent on detail that is almost nothing.
    """

    def __init__(self, config: CodecConfig, device: torch.device | str = "cpu") -> None:
        self.shape = wavelet_shape(config)
        temporal, spatial = haar_matrix(config.temporal_ratio), haar_matrix(config.spatial_ratio)
        basis = torch.kron(temporal, torch.kron(spatial, spatial))
        self.basis = basis.to(device=device, dtype=torch.float32)
        self.scale = PIXEL_RMS * basis.shape[0] ** 0.5
        self.identity = f"haar-t{config.temporal_ratio}-s{config.spatial_ratio}-mean-rms{PIXEL_RMS}"

    def encode(self, frames_3THW: Tensor) -> Tensor:
        """Frames [3, 1 + n * temporal_ratio, H, W] in [-1, 1] -> latents [C, 1 + n, H / ratio, W / ratio].

        Raises ValueError when the size does not fit the ratios.
        """
        _, num_frames, height, width = frames_3THW.shape
        channels, t, h, w = self.shape.latent_shape(num_frames, height, width)
        r, s = self.shape.temporal_ratio, self.shape.spatial_ratio
        first = frames_3THW[:, :1].expand(-1, r, -1, -1)
        filled = torch.cat([first, frames_3THW[:, 1:]], dim=1).float() / self.scale
        boxes = filled.reshape(3, t, r, h, s, w, s).permute(2, 4, 6, 0, 1, 3, 5).reshape(r * s * s, -1)
        return (self.basis @ boxes).reshape(channels, t, h, w)

    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """Latents -> frames in [-1, 1], the inverse of `encode`.

        The first latent frame is one frame: of its box only the mean over time counts.
        """
        _, t, h, w = latents_CTHW.shape
        r, s = self.shape.temporal_ratio, self.shape.spatial_ratio
        boxes = self.basis.T @ latents_CTHW.float().reshape(r * s * s, -1)
        filled = boxes.reshape(r, s, s, 3, t, h, w).permute(3, 4, 0, 5, 1, 6, 2).reshape(3, t * r, h * s, w * s)
        first = filled[:, :r].mean(dim=1, keepdim=True)
        return (torch.cat([first, filled[:, r:]], dim=1) * self.scale).clamp(-1, 1)
