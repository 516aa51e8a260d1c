"""From a list of samples to one pack of model inputs, and from its prediction back to a list."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_train.config.model import ModelConfig, TextKind
from sora_train.models.attention import PackLayout
from sora_train.models.patchify import Patch, Shape, num_tokens, patchify, positions, shape_of, unpatchify
from sora_train.models.text import pack_bytes

Text = Sequence[str] | Sequence[Tensor]  # captions (kind=bytes) or rows [M, text width] (kind=encoder), one a sample


@dataclass(frozen=True)
class PackInputs:
    """What `VideoDiT.forward` takes, t aside."""

    tokens_LP: Tensor
    positions_L3: Tensor
    text: Tensor
    layout: PackLayout
    shapes: tuple[Shape, ...]


def patch_of(config: ModelConfig) -> Patch:
    """Latent frames, rows and columns of one token."""
    return config.patch_frames, config.patch_height, config.patch_width


def pack_inputs(latents: Sequence[Tensor], text: Text, config: ModelConfig) -> PackInputs:
    """Lays samples of any sizes end to end, on the device of the latents.

    Args:
        latents: [C, T, H, W] each.
        text: captions with text.kind=bytes, rows [M, text width] of a frozen encoder otherwise, one a sample.

    Raises:
        ValueError: the patch does not divide a sample, or text is missing or of the wrong kind.
    """
    patch, device = patch_of(config), latents[0].device
    shapes = tuple(shape_of(sample) for sample in latents)
    if config.text.kind is TextKind.bytes:
        if not all(isinstance(caption, str) for caption in text):
            raise ValueError("model.text.kind=bytes takes captions, got rows of a text encoder")
        packed_text, text_lengths = pack_bytes([str(caption) for caption in text], config.text.max_bytes)
    else:
        rows = [row for row in text if isinstance(row, Tensor)]
        if len(rows) != len(text):
            raise ValueError("model.text.kind=encoder takes rows of the text encoder, got captions")
        packed_text, text_lengths = torch.cat(rows), tuple(row.shape[0] for row in rows)
    layout = PackLayout.build([num_tokens(shape, patch) for shape in shapes], text_lengths, device)
    return PackInputs(
        tokens_LP=torch.cat([patchify(sample, patch) for sample in latents]),
        positions_L3=torch.cat([positions(shape, patch) for shape in shapes]).to(device, non_blocking=True),
        text=packed_text.to(device, non_blocking=True),
        layout=layout,
        shapes=shapes,
    )


def unpack_prediction(prediction_LQ: Tensor, inputs: PackInputs, config: ModelConfig) -> list[Tensor]:
    """The model's output as one [C, T, H, W] a sample."""
    parts = prediction_LQ.split(inputs.layout.lengths)
    shapes = [(config.out_channels, *shape[1:]) for shape in inputs.shapes]
    return [unpatchify(part, shape, patch_of(config)) for part, shape in zip(parts, shapes, strict=True)]
