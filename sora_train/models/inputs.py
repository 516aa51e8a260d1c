"""From a list of samples to one pack of model inputs, and from its prediction back to a list."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sora_train.config.model import ModelConfig, TextKind
from sora_train.models.pack_layout import PackLayout, SharedClips
from sora_train.models.patchify import Patch, Shape, num_tokens, patchify, positions, shape_of, unpatchify
from sora_train.models.text import pack_bytes

Text = Sequence[str] | Sequence[Tensor]  # captions (kind=bytes) or rows [M, text width] (kind=encoder), one a sample


@dataclass(frozen=True)
class Conditioning:
    """What samples are conditioned on beside their text, one item a sample; a part the model has not stays empty."""

    # [condition_channels, T, H, W], of the size of the sample's latents. Wan's image-to-video: four channels that mark
    # the known frames (one a pixel frame of the latent frame), then the latents of the known frames.
    latents: Sequence[Tensor] = ()
    image: Sequence[Tensor] = ()  # [I, image width], rows of an image encoder
    # How many latent frames at the start of each sample are clean: they stand among the latents as they are and get
    # t = 0, while the rest is noisy (image-to-video of Wan 2.2 TI2V-5B). Any model takes this.
    clean_frames: Sequence[int] = ()


@dataclass(frozen=True)
class PackedConditioning:
    """The same for a pack, as `VideoDiT.forward` takes it."""

    tokens_LP: Tensor | None = None  # patches of the condition's latents
    image_ID: Tensor | None = None  # image rows end to end
    is_clean_L: Tensor | None = None  # bool, which tokens have t = 0


@dataclass(frozen=True)
class PackInputs:
    """What `VideoDiT.forward` takes, t aside."""

    tokens_LP: Tensor
    positions_L3: Tensor
    text: Tensor
    layout: PackLayout
    shapes: tuple[Shape, ...]
    conditioning: PackedConditioning | None = None


def patch_of(config: ModelConfig) -> Patch:
    """Latent frames, rows and columns of one token."""
    return config.patch_frames, config.patch_height, config.patch_width


def pack_inputs(
    latents: Sequence[Tensor], text: Text, config: ModelConfig, conditioning: Conditioning | None = None
) -> PackInputs:
    """Lays samples of any sizes end to end, on the device of the latents.

    Args:
        latents: [C, T, H, W] each.
        text: captions with text.kind=bytes, rows [M, text width] of a frozen encoder otherwise, one a sample.
        conditioning: what the model asks for beside the text; None when it asks for nothing.

    Raises:
        ValueError: the patch does not divide a sample, or text or conditioning is missing or of the wrong kind.
    """
    patch, device = patch_of(config), latents[0].device
    shapes = tuple(shape_of(sample) for sample in latents)
    conditioning = conditioning or Conditioning()
    check_conditioning(conditioning, shapes, config)
    inputs = lay_out(
        torch.cat([patchify(sample, patch) for sample in latents]),
        shapes,
        [range(num_tokens(shape, patch)) for shape in shapes],
        text,
        config,
        image_lengths=[rows.shape[0] for rows in conditioning.image],
    )
    return replace(inputs, conditioning=pack_conditioning(conditioning, inputs, config, device))


def lay_out(
    tokens_LP: Tensor,
    shapes: Sequence[Shape],
    parts: Sequence[range],
    text: Text,
    config: ModelConfig,
    *,
    shared: SharedClips | None = None,
    image_lengths: Sequence[int] = (),
) -> PackInputs:
    """The inputs of a pack whose tokens are there, on their device. Each token keeps its place in its own sample.

    Args:
        tokens_LP: patches of the documents, end to end.
        shapes: of the whole latents of each sample.
        parts: of each sample, the tokens that are there.
        text: as `pack_inputs` takes it.
        config: of the model.
        shared: of whose clips the last documents are parts.
        image_lengths: rows of each sample's image.

    Raises:
        ValueError: text is missing or of the wrong kind, or a document has no token.
    """
    device = tokens_LP.device
    if config.text.kind is TextKind.bytes:
        if not all(isinstance(caption, str) for caption in text):
            raise ValueError("model.text.kind=bytes takes captions, got rows of a text encoder")
        packed_text, text_lengths = pack_bytes([str(caption) for caption in text], config.text.max_bytes)
    else:
        rows = [row for row in text if isinstance(row, Tensor)]
        if len(rows) != len(text):
            raise ValueError("model.text.kind=encoder takes rows of the text encoder, got captions")
        packed_text, text_lengths = torch.cat(rows), tuple(row.shape[0] for row in rows)
    layout = PackLayout.build([len(part) for part in parts], text_lengths, device, image_lengths)
    places = [positions(shape, patch_of(config)) for shape in shapes]
    positions_L3 = torch.cat([place[part.start : part.stop] for place, part in zip(places, parts, strict=True)])
    return PackInputs(
        tokens_LP=tokens_LP,
        positions_L3=positions_L3.to(device, non_blocking=True),
        text=packed_text.to(device, non_blocking=True),
        layout=replace(layout, shared=shared),
        shapes=tuple(shapes),
    )


def check_conditioning(conditioning: Conditioning, shapes: Sequence[Shape], config: ModelConfig) -> None:
    """Raises ValueError unless `conditioning` is what the model takes, for each of the samples."""
    for name, values, wanted in (
        ("latents", conditioning.latents, config.condition_channels),
        ("image", conditioning.image, config.image_width),
    ):
        if len(values) != (len(shapes) if wanted else 0):
            field = "condition_channels" if name == "latents" else "image_width"
            raise ValueError(
                f"model.{field}={wanted} takes {len(shapes) if wanted else 0} conditioning.{name} for "
                f"{len(shapes)} samples, got {len(values)}"
            )
    for condition, shape in zip(conditioning.latents, shapes, strict=False):
        if tuple(condition.shape) != (config.condition_channels, *shape[1:]):
            raise ValueError(
                f"conditioning.latents of {tuple(condition.shape)} for latents of {shape}: "
                f"give {(config.condition_channels, *shape[1:])}"
            )
    for rows in conditioning.image:
        if rows.shape[1] != config.image_width or config.image_positions not in (0, rows.shape[0]):
            count = config.image_positions or "any number"
            raise ValueError(
                f"conditioning.image of {tuple(rows.shape)}: the model takes {count} of rows of {config.image_width}"
            )
    if conditioning.clean_frames and len(conditioning.clean_frames) != len(shapes):
        raise ValueError(
            f"conditioning.clean_frames has {len(conditioning.clean_frames)} numbers for {len(shapes)} samples"
        )
    if any(frames % config.patch_frames for frames in conditioning.clean_frames):
        raise ValueError(
            f"conditioning.clean_frames={list(conditioning.clean_frames)} does not divide into patches of "
            f"{config.patch_frames} frames"
        )


def pack_conditioning(
    conditioning: Conditioning, inputs: PackInputs, config: ModelConfig, device: torch.device
) -> PackedConditioning | None:
    """A checked conditioning of whole samples laid end to end, or None when there is none."""
    if not (conditioning.latents or conditioning.image or conditioning.clean_frames):
        return None
    tokens_LP = image_ID = is_clean_L = None
    if conditioning.latents:
        tokens_LP = torch.cat([patchify(sample, patch_of(config)) for sample in conditioning.latents])
        tokens_LP = tokens_LP.to(device, non_blocking=True)
    if conditioning.image:
        image_ID = torch.cat(list(conditioning.image)).to(device, non_blocking=True)
    if conditioning.clean_frames:
        clean_S = torch.tensor(conditioning.clean_frames).to(device, non_blocking=True)
        is_clean_L = inputs.positions_L3[:, 0] * config.patch_frames < clean_S[inputs.layout.sample_L]
    return PackedConditioning(tokens_LP, image_ID, is_clean_L)


def as_patches(prediction_LQ: Tensor, config: ModelConfig) -> Tensor:
    """The model's output with its numbers in the order of its input's: patches of latents as `patchify` gives them."""
    volume = math.prod(patch_of(config))
    return prediction_LQ.unflatten(1, (volume, config.out_channels)).transpose(1, 2).flatten(1)


def unpack_prediction(prediction_LQ: Tensor, inputs: PackInputs, config: ModelConfig) -> list[Tensor]:
    """The model's output as one [C, T, H, W] a sample."""
    parts = prediction_LQ.split(inputs.layout.lengths)
    shapes = [(config.out_channels, *shape[1:]) for shape in inputs.shapes]
    return [unpatchify(part, shape, patch_of(config)) for part, shape in zip(parts, shapes, strict=True)]
