"""One micro-step: a pack in, this rank's share of the step's loss out.

latents    the codec's, of the frames of each clip read here     C T H W each
clean      their patches, and those of the noise; of clips that
noise      a neighbour read, the part that this rank holds       L P
prediction of the model for (1 - t) clean + t noise, through
           the engine; of known first frames, see first_frames   L Q
loss       weighted squared error, summed, / planned global count
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from sora_train.config.diffusion import CountedBy, DiffusionConfig
from sora_train.config.model import ModelConfig, TextKind
from sora_train.config.root import TrainConfig
from sora_train.cost.flops import step_flops
from sora_train.data.loader import Pack
from sora_train.data.order import PlannedSample
from sora_train.data.packing import Piece
from sora_train.diffusion.flow_matching import interpolate, squared_error
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.distributed.topology import World
from sora_train.encoders.first_frame import ImageEncoder, load_image_encoder
from sora_train.encoders.text_encoder import TextEncoder, load_text_encoder
from sora_train.encoders.video_codec import VideoCodec, build_codec, to_unit_range
from sora_train.models.inputs import PackedConditioning, Text, as_patches, lay_out, patch_of
from sora_train.models.pack_layout import PackLayout
from sora_train.models.patchify import patchify
from sora_train.training.first_frames import (
    NoisyTokens,
    clean_tokens,
    conditions,
    first_frames,
    known_first,
    noisy_tokens,
)
from sora_train.training.metrics import CAPTION_KINDS, PackLoss
from sora_train.training.shared_tokens import shared_clips, tokens_here

# Of the text encoder and its rows, whoever made them.
TEXT_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Encoders:
    """What is frozen: between pixels and latents, unless the model reads bytes between captions and rows, and where it
    attends to images between those and rows."""

    codec: VideoCodec
    text: TextEncoder | None
    image: ImageEncoder | None = None

    @property
    def text_identity(self) -> str | None:
        """Of the text encoder, if there is one."""
        return None if self.text is None else self.text.identity

    def encode_text(self, captions: Sequence[str]) -> Text:
        """The captions as the model takes them."""
        return list(captions) if self.text is None else self.text.encode(list(captions))

    def latents(self, pack: Pack) -> list[Tensor | None]:
        """float32 [C, T, H, W] of each piece: made in advance, or encoded from its frames; None where a neighbour reads
        it."""
        made = [None if latents is None else latents.float() for latents in pack.latents]
        return [
            latents if frames is None else self.codec.encode(to_unit_range(frames))
            for frames, latents in zip(pack.frames, made, strict=True)
        ]

    def text_of(self, pack: Pack) -> Text:
        """The text of each document as the model takes it: rows made in advance, or encoded from its caption."""
        captions = [text for text in pack.text if isinstance(text, str)]
        if len(captions) == len(pack.text):
            return self.encode_text(captions)
        encoded = iter(cast(list[Tensor], self.encode_text(captions)) if captions else [])
        return [next(encoded) if isinstance(text, str) else text.to(TEXT_DTYPE) for text in pack.text]


def build_encoders(config: TrainConfig, world: World) -> Encoders:
    """The frozen encoders of the config, on this rank's device. Raises ConfigError when one cannot be built."""
    model, device = config.model, world.device
    text = image = None
    if model.text.kind is TextKind.encoder:
        text = load_text_encoder(config.text_encoder, model.text.width, device, TEXT_DTYPE)
    if model.image_width:
        image = load_image_encoder(config.image_encoder, model.image_width, device, TEXT_DTYPE)
    return Encoders(build_codec(config.codec, device), text, image)


def diffusion_loss(
    model: Any,
    pack: Pack,
    encoders: Encoders,
    model_config: ModelConfig,
    config: DiffusionConfig,
    groups: SequenceGroups,
) -> PackLoss:
    """The pack's share of the step's loss: sum over its tokens of weight * squared error / the step's planned count.

    Args:
        model: the engine (or a bare VideoDiT), called as `model(tokens_LP, positions_L3, t_S, text, layout)`.
        pack: on the model's device. Every rank of its sequence group must be here with its own.
        encoders: frozen.
        model_config: sizes of patches and channels.
        config: what is predicted, where the error is squared, what it is divided by.
        groups: of ranks that may share clips.
    """
    patch, device = patch_of(model_config), pack.t_S.device
    is_known = known_first(pack, model_config, config)
    noisy = noisy_tokens(pack, is_known, model_config)
    with torch.no_grad():
        columns = [encoders.latents(pack), pack.noise]
        channels = [model_config.in_channels, model_config.in_channels]
        image_rows: list[Tensor] = []
        if model_config.condition_channels:
            frames = first_frames(encoders.codec, pack)
            columns.append(conditions(encoders.codec, pack, frames))
            channels.append(model_config.condition_channels)
            if encoders.image is not None:
                image_rows = [encoders.image.encode(frame) for frame in frames if frame is not None]
        (clean_LP, noise_LP, *condition_LP), weight_S = tokens_here(
            pack,
            [[None if clip is None else patchify(clip, patch) for clip in clips] for clips in columns],
            [number * prod(patch) for number in channels],
            groups,
        )
        shapes, shared = [sample.latent_shape for sample in pack.samples], shared_clips(pack.plan, device)
        inputs = lay_out(
            clean_LP,
            shapes,
            [document.part for document in pack.documents],
            encoders.text_of(pack),
            model_config,
            shared=shared,
            image_lengths=[rows.shape[0] for rows in image_rows],
        )
        sample_L = inputs.layout.sample_L
        t_L1 = pack.t_S[sample_L][:, None]
        noisy_LP = interpolate(clean_LP, noise_LP, t_L1)
        is_clean_L = clean_tokens(is_known, inputs.positions_L3, sample_L, model_config, config)
        if is_clean_L is not None:
            noisy_LP = torch.where(is_clean_L[:, None], clean_LP, noisy_LP)
        told = PackedConditioning(
            condition_LP[0] if condition_LP else None, torch.cat(image_rows) if image_rows else None, is_clean_L
        )

    more = () if told == PackedConditioning() else (told,)
    prediction_LQ = model(noisy_LP, inputs.positions_L3, pack.t_S, inputs.text, inputs.layout, *more)

    error_L = squared_error(
        as_patches(prediction_LQ, model_config),
        clean_LP,
        noise_LP,
        t_L1,
        prediction_is=config.prediction,
        loss_on=config.loss_on,
        min_t=config.min_t,
    ).mean(1)
    if is_clean_L is not None:
        error_L = error_L.masked_fill(is_clean_L, 0)
    num_times = 1 if is_clean_L is None else 2
    counts_S6 = _counts(pack, noisy, inputs.layout, num_times, model_config).to(device, non_blocking=True)
    tokens_S = counts_S6[:, 0].float()
    error_S = torch.stack([errors.sum() for errors in error_L.split(inputs.layout.lengths)]) / tokens_S.clamp(min=1)
    # Of its clip's noisy tokens the share that is here: all over all ranks, a clip weighs 1.
    clip_weight_S = weight_S * counts_S6[:, 1].float()
    if config.counted_by is CountedBy.tokens:
        loss = (weight_S * tokens_S * error_S).sum() / pack.plan.planned_tokens
    else:
        loss = (clip_weight_S * error_S).sum() / pack.plan.planned_samples
    return PackLoss(
        loss=loss,
        sample_loss_S=error_S.detach(),
        t_S=pack.t_S,
        weight_S=clip_weight_S,
        kind_S=torch.tensor([caption_kind(sample) for sample in pack.samples]).to(device, non_blocking=True),
        counts=weight_S.double() @ counts_S6[:, 2:],
        tried=sum(tried and _is_first(piece) for tried, piece in zip(pack.is_tried, pack.pieces, strict=True)),
    )


def _counts(pack: Pack, noisy: NoisyTokens, layout: PackLayout, num_times: int, config: ModelConfig) -> Tensor:
    """float64 [S, 6]: a document's noisy tokens, and the share of its clip's that they are; then, as in
    metrics.COUNTED, what it counts for if it is trained on. A shared clip and the work on it are counted by the rank
    that holds its first token."""
    rows = []
    images = layout.image_lengths or (0,) * layout.num_samples
    rows_of = zip(layout.text_lengths, images, strict=True)
    for document, here, of_clip, (text, image) in zip(pack.documents, noisy.here, noisy.of_clip, rows_of, strict=True):
        sample = document.sample
        flops = step_flops(config, sample.num_tokens, text, image, num_times)
        clip = (1, sample.size.num_frames, flops) if _is_first(document) else (0, 0, 0)
        rows.append((here, here / of_clip, len(document.part), *clip))
    return torch.tensor(rows, dtype=torch.float64)


def _is_first(piece: Piece) -> bool:
    return len(piece.part) > 0 and piece.part.start == 0


def caption_kind(sample: PlannedSample) -> int:
    """Number in CAPTION_KINDS of the caption that a sample is trained with."""
    return CAPTION_KINDS.index("none" if sample.caption is None else sample.row.captions[sample.caption].kind)
