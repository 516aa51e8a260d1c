"""VideoDiT: the Wan 2.1 transformer over packs of samples of any sizes.

Tokens, their positions and a layout come in, tokens go out: the model knows no grid, no ranks and no padding. Its
parameters match diffusers' WanTransformer3DModel one to one (the patch embedding is the Conv3d, flattened), so Wan's
weights load by renaming. Beyond Wan: the byte text path, whose pooled row is added to the embedding of t.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sora_train.config.model import ModelConfig, TextKind
from sora_train.config.root import ConfigError
from sora_train.models.attention import PackLayout
from sora_train.models.inputs import Text, pack_inputs, patch_of, unpack_prediction
from sora_train.models.layers import Block, Float32LayerNorm, Float32Linear, TextProjection, TimeEmbedding, per_token
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
        self.patch_embedding = nn.Linear(config.in_channels * volume, width)
        self.time_embedding = TimeEmbedding(config)
        self.text_projection = TextProjection(config.text.width, width)
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

    def forward(self, tokens_LP: Tensor, positions_L3: Tensor, t: Tensor, text: Tensor, layout: PackLayout) -> Tensor:
        """Predicts velocity or latents (config.diffusion.prediction) for every token of the pack.

        Args:
            tokens_LP: noisy patches, P = in_channels * patch volume (`patchify.patchify`).
            positions_L3: int64 (time, row, column) of each token in its own sample.
            t: float32 in [0, 1], one a sample [S] or one a token [L].
            text: int64 ids [M] with text.kind=bytes, float rows [M, text width] with text.kind=encoder.
            layout: where the documents and their texts begin.

        Returns:
            [L, Q] in float32, Q = patch volume * out_channels (`patchify.unpatchify`).
        """
        config = self.config
        dtype = self.patch_embedding.weight.dtype
        row_L = layout.sample_L if t.shape[0] == layout.num_samples else None

        pooled = None
        if self.byte_text is not None and self.pooled_projection is not None:
            text, pooled_SD = self.byte_text(text, layout)
            pooled = self.pooled_projection(pooled_SD)
            pooled = pooled if row_L is not None else per_token(pooled, layout.sample_L)
        time_RD, modulation_R6D = self.time_embedding(t, pooled)
        text_MD = self.text_projection(text.to(dtype))
        turn = rotation(positions_L3, config.width // config.heads, config.rope_theta)

        tokens_LD = self.patch_embedding(tokens_LP.to(dtype))
        for block in self.blocks:
            tokens_LD = self.run_block(block, tokens_LD, text_MD, modulation_R6D, row_L, turn, layout)

        shift_RD, scale_RD = (self.scale_shift_table.float() + time_RD[:, None]).unbind(1)
        tokens_LD = torch.addcmul(
            per_token(shift_RD, row_L), self.norm_out(tokens_LD), per_token(1 + scale_RD, row_L)
        ).to(dtype)
        return self.proj_out(tokens_LD).float()


def call_block(block: nn.Module, *inputs: Any) -> Any:
    """Runs a block as it is; see `VideoDiT.run_block`."""
    return block(*inputs)


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


def predict(model: VideoDiT, latents: list[Tensor], t_S: Tensor, text: Text) -> list[Tensor]:
    """Packs samples of any sizes, runs the model once and unpacks.

    Args:
        model: the transformer.
        latents: noisy latents [C, T, H, W], one a sample.
        t_S: noise level of each in [0, 1].
        text: captions (text.kind=bytes) or rows of the text encoder (text.kind=encoder), one a sample.

    Returns:
        float32 [out_channels, T, H, W], one a sample.
    """
    inputs = pack_inputs(latents, text, model.config)
    prediction_LQ = model(inputs.tokens_LP, inputs.positions_L3, t_S, inputs.text, inputs.layout)
    return unpack_prediction(prediction_LQ, inputs, model.config)
