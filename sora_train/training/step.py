"""One micro-step: a pack in, this rank's share of the step's loss out.

latents    the codec's, of the frames of each clip read here     C T H W each
clean      their patches, and those of the noise; of clips that
noise      a neighbour read, the part that this rank holds       L P
prediction of the model for (1 - t) clean + t noise, through
           the engine                                            L Q
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
from sora_train.encoders.text_encoder import TextEncoder, load_text_encoder
from sora_train.encoders.video_codec import VideoCodec, build_codec, to_unit_range
from sora_train.models.inputs import Text, as_patches, lay_out, patch_of
from sora_train.models.patchify import patchify
from sora_train.training.metrics import CAPTION_KINDS, PackLoss
from sora_train.training.shared_tokens import shared_clips, tokens_here

# Of the text encoder and its rows, whoever made them.
TEXT_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Encoders:
    """What is frozen: between pixels and latents, and, unless the model reads bytes, between captions and rows."""

    codec: VideoCodec
    text: TextEncoder | None

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
    codec = build_codec(config.codec, world.device)
    if config.model.text.kind is TextKind.bytes:
        return Encoders(codec, None)
    width = config.model.text.width
    return Encoders(codec, load_text_encoder(config.text_encoder, width, world.device, TEXT_DTYPE))


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
    with torch.no_grad():
        columns = [
            [None if clip is None else patchify(clip, patch) for clip in clips]
            for clips in (encoders.latents(pack), pack.noise)
        ]
        width = model_config.in_channels * prod(patch)
        (clean_LP, noise_LP), weight_S = tokens_here(pack, columns, (width, width), groups)
        shapes, shared = [sample.latent_shape for sample in pack.samples], shared_clips(pack.plan, device)
        inputs = lay_out(clean_LP, shapes, pack.parts, encoders.text_of(pack), model_config, shared=shared)
        t_L1 = pack.t_S[inputs.layout.sample_L][:, None]
        noisy_LP = interpolate(clean_LP, noise_LP, t_L1)

    prediction_LQ = model(noisy_LP, inputs.positions_L3, pack.t_S, inputs.text, inputs.layout)

    error_L = squared_error(
        as_patches(prediction_LQ, model_config),
        clean_LP,
        noise_LP,
        t_L1,
        prediction_is=config.prediction,
        loss_on=config.loss_on,
        min_t=config.min_t,
    ).mean(1)
    error_S = torch.stack([errors.mean() for errors in error_L.split(inputs.layout.lengths)])
    counts_S5 = _counts(pack, inputs.layout.text_lengths, model_config).to(device, non_blocking=True)
    # Of its clip's tokens the share that is here: all over all ranks, a clip weighs 1.
    clip_weight_S = weight_S * counts_S5[:, 0].float()
    if config.counted_by is CountedBy.tokens:
        tokens_S = inputs.layout.cu_seqlens.diff()  # of the device's own copy: nothing to wait for
        loss = (weight_S * tokens_S * error_S).sum() / pack.plan.planned_tokens
    else:
        loss = (clip_weight_S * error_S).sum() / pack.plan.planned_samples
    return PackLoss(
        loss=loss,
        sample_loss_S=error_S.detach(),
        t_S=pack.t_S,
        weight_S=clip_weight_S,
        kind_S=torch.tensor([caption_kind(sample) for sample in pack.samples]).to(device, non_blocking=True),
        counts=weight_S.double() @ counts_S5[:, 1:],
        tried=sum(tried and _is_first(piece) for tried, piece in zip(pack.is_tried, pack.pieces, strict=True)),
    )


def _counts(pack: Pack, text_lengths: Sequence[int], config: ModelConfig) -> Tensor:
    """float64 [S, 5]: the share of its clip that a document is; then, as in metrics.COUNTED, what it counts for if it
    is trained on. A shared clip and the work on it are counted by the rank that holds its first token."""
    rows = []
    for document, text in zip(pack.documents, text_lengths, strict=True):
        sample, held = document.sample, len(document.part)
        flops = step_flops(config, sample.num_tokens, text)
        clip = (1, sample.size.num_frames, flops) if _is_first(document) else (0, 0, 0)
        rows.append((held / sample.num_tokens, held, *clip))
    return torch.tensor(rows, dtype=torch.float64)


def _is_first(piece: Piece) -> bool:
    return len(piece.part) > 0 and piece.part.start == 0


def caption_kind(sample: PlannedSample) -> int:
    """Number in CAPTION_KINDS of the caption that a sample is trained with."""
    return CAPTION_KINDS.index("none" if sample.caption is None else sample.row.captions[sample.caption].kind)
