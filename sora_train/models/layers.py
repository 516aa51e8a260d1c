"""The pieces of a Wan block around attention: float32 modulation, time embedding, MLP.

Modulation, norms and the embedding of t are computed in float32 also when the weights are bf16, as Wan trains.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.config.model import ModelConfig
from sora_train.models.attention import Attention
from sora_train.models.pack_layout import PackLayout

TIME_SCALE = 1000.0  # Wan's timesteps run from 0 to 1000, our t from 0 to 1


class Float32Linear(nn.Linear):
    """A linear layer on few rows (one a sample) that computes in float32 whatever its weights are stored in."""

    def forward(self, rows: Tensor) -> Tensor:
        """Float32 out, whatever comes in."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(rows.float(), self.weight.float(), bias)


class Float32LayerNorm(nn.LayerNorm):
    """Takes any floating type, gives float32: the modulation that follows stays in float32."""

    def forward(self, rows: Tensor) -> Tensor:
        """Float32 out, whatever comes in."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(rows.float(), self.normalized_shape, weight, bias, self.eps)


def time_features(t_R: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of 1000 t at `width`/2 frequencies from 1 to 1/10000 (Ho et al. 2020): float32 [R, width].

    Phases are float64: in float32 a phase near 1000 is off by up to 3e-5.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t_R.device) / half
    phase = torch.outer(t_R.double() * TIME_SCALE, torch.exp(-math.log(10000.0) * exponents))
    return torch.cat([phase.cos(), phase.sin()], dim=1).float()


def per_token(rows_RD: Tensor, row_L: Tensor | None) -> Tensor:
    """Hands each token the row of its sample, [R, D] -> [L, D]; None when there is already a row a token.

    `embedding`, not indexing: its backward sums rows in a fixed order on CUDA too, so that resume stays bitwise.
    """
    return rows_RD if row_L is None else F.embedding(row_L, rows_RD)


def modulate(rows_LD: Tensor, scale_RD: Tensor, shift_RD: Tensor, row_L: Tensor | None) -> Tensor:
    """rows (1 + scale) + shift, each row by its sample's, in float32.

    Not `addcmul`, here and at the gates: eager autograd multiplies by its factor of 1 in passes of their own.
    """
    return (rows_LD * per_token(1 + scale_RD, row_L)).add_(per_token(shift_RD, row_L))


class TimeEmbedding(nn.Module):
    """t -> the vector that conditions the output, [R, D], and the six that modulate each block, [R, 6, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.frequency_width = config.frequency_width
        self.linear_1 = Float32Linear(config.frequency_width, config.width)
        self.linear_2 = Float32Linear(config.width, config.width)
        self.project = Float32Linear(config.width, 6 * config.width)

    def forward(self, t_R: Tensor, pooled_RD: Tensor | None) -> tuple[Tensor, Tensor]:
        """`pooled_RD`, the pooled text, is added to the embedding of t; Wan has none."""
        time_RD = self.linear_2(F.silu(self.linear_1(time_features(t_R, self.frequency_width))))
        if pooled_RD is not None:
            time_RD = time_RD + pooled_RD
        return time_RD, self.project(F.silu(time_RD)).unflatten(1, (6, -1))


class TextProjection(nn.Module):
    """Text rows of any width -> the model's width (PixArt's caption projection, as in Wan)."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, rows_MD: Tensor) -> Tensor:
        """[M, text width] -> [M, D]."""
        return self.linear_2(F.gelu(self.linear_1(rows_MD), approximate="tanh"))


class ImageProjection(nn.Module):
    """Rows of an image encoder -> the model's width, as in Wan 2.1: norm, linear, GELU (exact), linear, norm."""

    EPS = 1e-5  # of both norms, whatever the model's own is

    def __init__(self, image_width: int, width: int, num_positions: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, num_positions, image_width)) if num_positions else None
        self.norm1 = Float32LayerNorm(image_width, self.EPS)
        self.linear_1 = nn.Linear(image_width, image_width)
        self.linear_2 = nn.Linear(image_width, width)
        self.norm2 = Float32LayerNorm(width, self.EPS)

    def forward(self, rows_ID: Tensor) -> Tensor:
        """[I, image width] -> [I, D]; with positions, every sample has exactly that many rows."""
        dtype = self.linear_1.weight.dtype
        if self.positions is not None:
            rows_ID = (rows_ID.unflatten(0, (-1, self.positions.shape[1])) + self.positions).flatten(0, 1)
        hidden_ID = F.gelu(self.linear_1(self.norm1(rows_ID).to(dtype)))
        return self.norm2(self.linear_2(hidden_ID)).to(dtype)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)

    def forward(self, rows_LD: Tensor) -> Tensor:
        """[L, D] -> [L, D]."""
        return self.down(F.gelu(self.up(rows_LD), approximate="tanh"))


class Block(nn.Module):
    """One transformer block of Wan 2.1: modulated self-attention, text cross-attention, modulated MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps = config.width, config.eps
        self.norm1 = Float32LayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = Attention(width, config.heads, eps, config.qk_norm)
        self.norm2 = Float32LayerNorm(width, eps) if config.cross_attention_norm else nn.Identity()
        self.attn2 = Attention(width, config.heads, eps, config.qk_norm, has_image=config.image_width > 0)
        self.norm3 = Float32LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = FeedForward(width, config.mlp_width)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, width))

    def forward(
        self,
        tokens_LD: Tensor,
        text_MD: Tensor,
        modulation_R6D: Tensor,
        row_L: Tensor | None,
        rotation: Tensor,
        layout: PackLayout,
        image_ID: Tensor | None = None,
    ) -> Tensor:
        """`modulation_R6D` float32: shift, scale, gate of attention, then of the MLP (adaLN-single, PixArt-alpha).

        Products of float32 modulation are rounded to the tokens' type once, after each sub-layer.
        """
        rows = (self.scale_shift_table.float() + modulation_R6D).unbind(1)
        shift1_RD, scale1_RD, gate1_RD, shift2_RD, scale2_RD, gate2_RD = rows
        dtype = tokens_LD.dtype

        hidden_LD = modulate(self.norm1(tokens_LD), scale1_RD, shift1_RD, row_L).to(dtype)
        change_LD = self.attn1(hidden_LD, None, rotation, layout)
        tokens_LD = (per_token(gate1_RD, row_L) * change_LD).add_(tokens_LD).to(dtype)

        hidden_LD = self.norm2(tokens_LD).to(dtype)
        tokens_LD = tokens_LD + self.attn2(hidden_LD, text_MD, None, layout, image_ID)

        hidden_LD = modulate(self.norm3(tokens_LD), scale2_RD, shift2_RD, row_L).to(dtype)
        change_LD = self.ffn(hidden_LD)
        return (per_token(gate2_RD, row_L) * change_LD).add_(tokens_LD).to(dtype)
