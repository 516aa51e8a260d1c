"""Tiny members of the Wan family as diffusers builds them, with random sizes, weights and inputs."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sora_train.models.inputs import Conditioning

TEXT_ROWS = 512  # with images, diffusers takes the last 512 rows for text, whatever it was given


@dataclass(frozen=True)
class Variant:
    """What tells the members apart; `fields` are of WanTransformer3DModel."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    image_rows: int = 0
    clean_frames: int = 0


VARIANTS = [
    Variant("2.1 T2V"),
    Variant("2.1 I2V", {"in_channels": 4 + 3, "image_dim": 10}, image_rows=9),
    Variant("2.1 FLF2V", {"in_channels": 4 + 3, "image_dim": 10, "pos_embed_seq_len": 8}, image_rows=8),
    Variant("2.2 I2V A14B", {"in_channels": 4 + 3}),
    Variant("2.2 TI2V", {"in_channels": 6, "out_channels": 6}, clean_frames=1),
    Variant("tokens of two frames", {"patch_size": (2, 2, 2)}, clean_frames=1),
]


def build_theirs(variant: Variant, seed: int) -> Any:
    """A WanTransformer3DModel of random sizes, its weights not yet drawn."""
    import diffusers

    draw = random.Random(f"{variant.name} {seed}")
    heads, head_width = draw.choice([(2, 12), (3, 16), (1, 24), (2, 20)])
    fields = {
        "patch_size": draw.choice([(1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 1, 2)]),
        "num_attention_heads": heads,
        "attention_head_dim": head_width,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": draw.choice([8, 16]),
        "freq_dim": draw.choice([16, 32]),
        "ffn_dim": draw.choice([24, 40]),
        "num_layers": draw.choice([1, 2, 3]),
        "cross_attn_norm": draw.random() < 0.8,
        "eps": draw.choice([1e-6, 1e-5]),
        "rope_max_seq_len": 64,
        **variant.fields,
    }
    if variant.image_rows:
        fields["added_kv_proj_dim"] = heads * head_width
    return diffusers.WanTransformer3DModel(**fields)


@dataclass(frozen=True)
class Inputs:
    """Two samples of one size, as a batch and as a pack."""

    latents: Tensor
    condition: Tensor | None
    text: Tensor
    image: Tensor | None
    is_clean: Tensor | None  # bool [tokens of a sample]
    clean_frames: int

    @staticmethod
    def draw(variant: Variant, theirs: Any, seed: int, shape: tuple[int, int, int] = (4, 4, 6)) -> "Inputs":
        generator = torch.Generator().manual_seed(seed)
        config = theirs.config
        patch = config.patch_size

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        more = config.in_channels - config.out_channels
        clean = variant.clean_frames * patch[0]
        frame_L = torch.arange(shape[0]).repeat_interleave(shape[1] * shape[2])
        frame_L = frame_L.reshape(shape)[:: patch[0], :: patch[1], :: patch[2]].flatten()
        return Inputs(
            latents=normal(2, config.out_channels, *shape),
            condition=normal(2, more, *shape) if more else None,
            text=normal(2, TEXT_ROWS if variant.image_rows else 7, config.text_dim),
            image=normal(2, variant.image_rows, config.image_dim) if variant.image_rows else None,
            is_clean=frame_L < clean if clean else None,
            clean_frames=clean,
        )

    def tensors(self) -> list[Tensor]:
        """What gradients are asked of."""
        return [x for x in (self.latents, self.condition, self.text, self.image) if x is not None]

    def theirs(self, model: Any, levels: Tensor) -> Tensor:
        """Output of diffusers' class, its way."""
        hidden = self.latents if self.condition is None else torch.cat([self.latents, self.condition], dim=1)
        timestep = levels * 1000
        if self.is_clean is not None:
            timestep = torch.where(self.is_clean, 0.0, timestep[:, None])
        image = self.image
        if image is not None and model.config.pos_embed_seq_len is not None:  # first and last frame stand in the batch
            image = image.reshape(4, -1, image.shape[-1])
        return model(hidden, timestep, self.text, image).sample

    def conditioning(self) -> Conditioning | None:
        """Ours, one item a sample."""
        if self.condition is None and self.image is None and not self.clean_frames:
            return None
        return Conditioning(
            latents=() if self.condition is None else list(self.condition),
            image=() if self.image is None else list(self.image),
            clean_frames=[self.clean_frames] * 2 if self.clean_frames else (),
        )
