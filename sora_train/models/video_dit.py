"""VideoDiT: the transformer of Wan 2.1 and 2.2 over packs of samples of any sizes.

Tokens, their positions and a layout come in, tokens go out: the model knows no grid, no ranks and no padding. Its
parameters match diffusers' WanTransformer3DModel one to one (the patch embedding is the Conv3d, flattened), so Wan's
weights load by renaming (`wan_weights`). What Wan's image-to-video models are given beside noise and text comes as
`conditioning`: latents that enter beside the noisy ones, rows of an image encoder that a second cross-attention reads,
frames that are clean and have their own t. Beyond Wan: the byte text path, whose pooled row is added to the embedding
of t.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sora_train.config.model import ModelConfig, TextKind
from sora_train.config.root import ConfigError
from sora_train.models.inputs import Conditioning, PackedConditioning, Text, pack_inputs, patch_of, unpack_prediction
from sora_train.models.layers import (
    Block,
    Float32LayerNorm,
    Float32Linear,
    ImageProjection,
    TextProjection,
    TimeEmbedding,
    modulate,
    per_token,
)
from sora_train.models.pack_layout import PackLayout
from sora_train.models.rope import rotation
from sora_train.models.text import ByteText


def check_model(config: ModelConfig) -> None:
    """Raises ConfigError for sizes that cannot be built."""
    text = config.text
    if config.width % config.heads or (config.width // config.heads) % 2:
        raise ConfigError(
            f"model.width={config.width} and model.heads={config.heads} do not give an even head width: "
            "choose a width that is a multiple of 2 * heads"
        )
    if config.frequency_width % 2:
        raise ConfigError(f"model.frequency_width={config.frequency_width} is odd: choose an even number")
    for name in ("condition_channels", "image_width", "image_positions"):
        if getattr(config, name) < 0:
            raise ConfigError(f"model.{name}={getattr(config, name)} is negative: use 0 for none")
    if config.image_positions and not config.image_width:
        raise ConfigError(
            f"model.image_positions={config.image_positions} needs images: set model.image_width, or it to 0"
        )
    if text.kind is TextKind.bytes and text.width % text.heads:
        raise ConfigError(f"model.text.width={text.width} does not divide by model.text.heads={text.heads}: change one")


class VideoDiT(nn.Module):
    """Diffusion transformer with adaLN-single modulation, 3-axis RoPE and text cross-attention.

    Wan team 2025, arXiv:2503.20314; DiT: Peebles & Xie 2023, arXiv:2212.09748.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_model(config)
        self.config = config
        width, volume = config.width, math.prod(patch_of(config))
        self.patch_embedding = nn.Linear((config.in_channels + config.condition_channels) * volume, width)
        self.time_embedding = TimeEmbedding(config)
        self.text_projection = TextProjection(config.text.width, width)
        self.image_projection: ImageProjection | None = None
        if config.image_width:
            self.image_projection = ImageProjection(config.image_width, width, config.image_positions)
        self.byte_text: ByteText | None = None
        self.pooled_projection: Float32Linear | None = None
        if config.text.kind is TextKind.bytes:
            self.byte_text = ByteText(config.text, config.eps)
            self.pooled_projection = Float32Linear(config.text.width, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_out = Float32LayerNorm(width, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(width, config.out_channels * volume)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, width))
        # How a block is called; recomputation of activations is applied from outside by replacing this.
        self.run_block: Callable[..., Any] = call_block
        initialize(self)

    def forward(
        self,
        tokens_LP: Tensor,
        positions_L3: Tensor,
        t: Tensor,
        text: Tensor,
        layout: PackLayout,
        conditioning: PackedConditioning | None = None,
    ) -> Tensor:
        """Predicts velocity or latents (config.diffusion.prediction) for every token of the pack.

        Args:
            tokens_LP: noisy patches, P = in_channels * patch volume (`patchify.patchify`).
            positions_L3: int64 (time, row, column) of each token in its own sample.
            t: float32 in [0, 1], one a sample [S] or one a token [L].
            text: int64 ids [M] with text.kind=bytes, float rows [M, text width] with text.kind=encoder.
            layout: where the documents, their texts and their images begin.
            conditioning: what the config's condition_channels and image_width ask for, and which tokens are clean.

        Returns:
            [L, Q] in float32, Q = patch volume * out_channels (`patchify.unpatchify`).

        Raises:
            ValueError: t is neither one a sample nor one a token, or conditioning is missing.
        """
        config = self.config
        dtype = self.patch_embedding.weight.dtype
        given = conditioning or PackedConditioning()
        t_R, row_L = time_rows(t, layout, given.is_clean_L)

        pooled = None
        if self.byte_text is not None and self.pooled_projection is not None:
            text, pooled_SD = self.byte_text(text, layout)
            pooled = self.pooled_projection(pooled_SD)
            if row_L is None:
                pooled = per_token(pooled, layout.sample_L)
            else:
                pooled = pooled.repeat(t_R.shape[0] // layout.num_samples, 1)
        time_RD, modulation_R6D = self.time_embedding(t_R, pooled)
        text_MD = self.text_projection(text.to(dtype))
        image_ID = None
        if self.image_projection is not None:
            if given.image_ID is None:
                raise ValueError(f"model.image_width={config.image_width} needs conditioning.image")
            image_ID = self.image_projection(given.image_ID.to(dtype))
        turn = rotation(positions_L3, config.width // config.heads, config.rope_theta)

        if config.condition_channels:
            if given.tokens_LP is None:
                raise ValueError(f"model.condition_channels={config.condition_channels} needs conditioning.latents")
            tokens_LP = torch.cat([tokens_LP, given.tokens_LP.to(tokens_LP.dtype)], dim=1)
        tokens_LD = self.patch_embedding(tokens_LP.to(dtype))
        for block in self.blocks:
            tokens_LD = self.run_block(block, tokens_LD, text_MD, modulation_R6D, row_L, turn, layout, image_ID)

        shift_RD, scale_RD = (self.scale_shift_table.float() + time_RD[:, None]).unbind(1)
        tokens_LD = modulate(self.norm_out(tokens_LD), scale_RD, shift_RD, row_L).to(dtype)
        return self.proj_out(tokens_LD).float()


def call_block(block: nn.Module, *inputs: Any) -> Any:
    """Runs a block as it is; see `VideoDiT.run_block`."""
    return block(*inputs)


def time_rows(t: Tensor, layout: PackLayout, is_clean_L: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The different t of a pack, [R], and which of them each token has, int64 [L] (None: its own).

    Clean tokens add one row of t = 0 a sample, not one a token: what t is embedded and modulated by stays small.

    Raises:
        ValueError: t is neither [S] nor [L], or is [L] and tokens are named clean too.
    """
    num_samples = layout.num_samples
    if t.shape[0] == num_samples:
        if is_clean_L is None:
            return t, layout.sample_L
        return torch.cat([t, torch.zeros_like(t)]), layout.sample_L + num_samples * is_clean_L
    if t.shape[0] != sum(layout.lengths) or is_clean_L is not None:
        raise ValueError(
            f"t has {t.shape[0]} numbers for {num_samples} samples and {sum(layout.lengths)} tokens: "
            "give one a sample, or one a token and no clean frames"
        )
    return t, None


@torch.no_grad()
def initialize(model: VideoDiT) -> None:
    """Weights for training from scratch.

    Linear layers are Xavier-uniform with zero bias, embeddings small normal, as in Wan and DiT. Gates, the
    cross-attention's output and the last layer start at zero (adaLN-zero, DiT section 3.2): each block begins as
    the identity and the prediction as zero. The pooled text's projection does not: through it colour follows the
    prompt first. On 240 steps of coloured moving squares (one seed, held-out error; in brackets what shuffled
    captions add): this 0.246 (0.065), Wan's own (nothing but the last layer at zero) 0.323 (0.046), gates at one
    0.322 (0.019), pooled projection at zero 0.270 (0.006).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for layer in (model.time_embedding.linear_1, model.time_embedding.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(model.time_embedding.project.weight)
    nn.init.zeros_(model.proj_out.weight)
    for block in model.blocks:
        assert isinstance(block, Block)
        nn.init.zeros_(block.attn2.to_out.weight)


def predict(
    model: VideoDiT, latents: list[Tensor], t_S: Tensor, text: Text, conditioning: Conditioning | None = None
) -> list[Tensor]:
    """Packs samples of any sizes, runs the model once and unpacks.

    Args:
        model: the transformer.
        latents: noisy latents [C, T, H, W], one a sample.
        t_S: noise level in [0, 1], one a sample; or one a token of the pack, [L].
        text: captions (text.kind=bytes) or rows of the text encoder (text.kind=encoder), one a sample.
        conditioning: what an image-to-video model is given beside that.

    Returns:
        float32 [out_channels, T, H, W], one a sample.
    """
    inputs = pack_inputs(latents, text, model.config, conditioning)
    prediction_LQ = model(inputs.tokens_LP, inputs.positions_L3, t_S, inputs.text, inputs.layout, inputs.conditioning)
    return unpack_prediction(prediction_LQ, inputs, model.config)
