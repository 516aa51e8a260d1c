"""Settings of the diffusion transformer: sizes, patches and where its text comes from."""

from dataclasses import dataclass, field
from enum import Enum


class TextKind(Enum):
    """Which text path conditions the model."""

    bytes = "bytes"  # UTF-8 bytes, embedded and encoded inside the model and trained with it
    encoder = "encoder"  # features of a frozen text encoder (config.text_encoder)


@dataclass(frozen=True)
class TextConfig:
    kind: TextKind = TextKind.bytes
    # Channels of the text rows that enter the model (4096 for UMT5-XXL); for bytes, the byte encoder's width.
    width: int = 128
    # Transformer layers and heads of the byte encoder; unused with kind=encoder.
    layers: int = 2
    heads: int = 4
    # Longest caption in bytes; the rest is cut off. A frozen encoder has its own limit.
    max_bytes: int = 256


@dataclass(frozen=True)
class ModelConfig:
    """A Wan-2.1-shaped video DiT (Wan team 2025, arXiv:2503.20314)."""

    name: str = "tiny"
    width: int = 192
    depth: int = 6
    heads: int = 6
    mlp_width: int = 768
    # Channels of the latents that come in and of the prediction that goes out; must equal the codec's.
    in_channels: int = 16
    out_channels: int = 16
    # Channels of what each sample is conditioned on, which enter beside its latents; Wan's image-to-video models have
    # 20: a mask of four and the 16 latents of the known frames. 0: none.
    condition_channels: int = 0
    # Channels of the rows of an image encoder (1280 for CLIP ViT-H) that Wan 2.1's image-to-video models attend to
    # beside the text. 0: none.
    image_width: int = 0
    # Rows of a sample's images that have a learned position: 514 for Wan's first and last frame. 0: no positions.
    image_positions: int = 0
    # One token covers this many latent frames, rows and columns.
    patch_frames: int = 1
    patch_height: int = 2
    patch_width: int = 2
    # Width of the sinusoidal embedding of t.
    frequency_width: int = 256
    # Full-width RMSNorm on queries and keys, and an affine norm before cross-attention.
    qk_norm: bool = True
    cross_attention_norm: bool = True
    eps: float = 1e-6
    rope_theta: float = 10000.0
    text: TextConfig = field(default_factory=TextConfig)
