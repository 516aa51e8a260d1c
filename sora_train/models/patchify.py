"""Latents to tokens and back. One token covers a small box of latent frames, rows and columns of one sample.

The two orders of channels are Wan's: its patch embedding is a Conv3d whose weight flattens to (c, pt, ph, pw), its
output projection gives (pt, ph, pw, c). Keeping them makes the weights' mapping a reshape.
"""

import math

import torch
from torch import Tensor

Patch = tuple[int, int, int]  # latent frames, rows, columns of one token
Shape = tuple[int, int, int, int]  # C T H W


def grid(shape: Shape, patch: Patch) -> tuple[int, int, int]:
    """Tokens along time, height and width. Raises ValueError when the patch does not divide the latents."""
    if any(size % step for size, step in zip(shape[1:], patch, strict=True)):
        raise ValueError(f"latents of {shape[1:]} (frames, rows, columns) do not divide into patches of {patch}")
    return shape[1] // patch[0], shape[2] // patch[1], shape[3] // patch[2]


def num_tokens(shape: Shape, patch: Patch) -> int:
    """L of a sample. Raises ValueError when the patch does not divide the latents."""
    return math.prod(grid(shape, patch))


def patchify(latents_CTHW: Tensor, patch: Patch) -> Tensor:
    """[C, T, H, W] -> tokens [L, P], P = C * pt * ph * pw in that order."""
    channels = latents_CTHW.shape[0]
    t, h, w = grid(shape_of(latents_CTHW), patch)
    boxes = latents_CTHW.reshape(channels, t, patch[0], h, patch[1], w, patch[2])
    return boxes.permute(1, 3, 5, 0, 2, 4, 6).reshape(t * h * w, channels * math.prod(patch))


def unpatchify(prediction_LQ: Tensor, shape: Shape, patch: Patch) -> Tensor:
    """Tokens [L, Q], Q = pt * ph * pw * C in that order, -> [C, T, H, W] of the given shape."""
    t, h, w = grid(shape, patch)
    boxes = prediction_LQ.reshape(t, h, w, *patch, shape[0])
    return boxes.permute(6, 0, 3, 1, 4, 2, 5).reshape(shape)


def positions(shape: Shape, patch: Patch) -> Tensor:
    """Where each token stands on the sample's own grid: int64 [L, 3] of (time, row, column), from zero."""
    return torch.cartesian_prod(*(torch.arange(size) for size in grid(shape, patch))).reshape(-1, 3)


def shape_of(latents_CTHW: Tensor) -> Shape:
    """C T H W as a tuple of known length."""
    c, t, h, w = latents_CTHW.shape
    return c, t, h, w
