"""One micro-step: a pack in, this rank's share of the step's loss out.

latents    the codec's, of each clip's frames                    C T H W each
noisy      (1 - t) latents + t noise                             C T H W each, then L P
prediction of the model, called through the engine               L Q
loss       weighted squared error, summed, / planned global count
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor

from sora_train.config.diffusion import CountedBy, DiffusionConfig
from sora_train.config.model import ModelConfig, TextKind
from sora_train.config.root import TrainConfig
from sora_train.cost.flops import step_flops
from sora_train.data.loader import Pack
from sora_train.data.order import PlannedSample
from sora_train.diffusion.flow_matching import interpolate, squared_error
from sora_train.distributed.topology import World
from sora_train.encoders.text_encoder import TextEncoder, load_text_encoder
from sora_train.encoders.video_codec import VideoCodec, build_codec, to_unit_range
from sora_train.models.inputs import Text, pack_inputs, unpack_prediction
from sora_train.training.metrics import CAPTION_KINDS, PackLoss

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

    def latents(self, pack: Pack) -> list[Tensor]:
        """float32 [C, T, H, W] of each sample: made in advance, or encoded from its frames."""
        return [
            self.codec.encode(to_unit_range(frames)) if frames is not None else cast(Tensor, made).float()
            for frames, made in zip(pack.frames, pack.latents, strict=True)
        ]

    def text_of(self, pack: Pack) -> Text:
        """The text of each sample as the model takes it: rows made in advance, or encoded from its caption."""
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
    model: Any, pack: Pack, encoders: Encoders, model_config: ModelConfig, config: DiffusionConfig
) -> PackLoss:
    """The pack's share of the step's loss: sum over its clips of weight * squared error / the step's planned count.

    Args:
        model: the engine (or a bare VideoDiT), called as `model(tokens_LP, positions_L3, t_S, text, layout)`.
        pack: on the model's device.
        encoders: frozen.
        model_config: sizes of patches and channels.
        config: what is predicted, where the error is squared, what it is divided by.
    """
    with torch.no_grad():
        latents = encoders.latents(pack)
        noisy = [interpolate(x, noise, t) for x, noise, t in zip(latents, pack.noise, pack.t_S, strict=True)]
        inputs = pack_inputs(noisy, encoders.text_of(pack), model_config)

    prediction_LQ = model(inputs.tokens_LP, inputs.positions_L3, pack.t_S, inputs.text, inputs.layout)

    predictions = unpack_prediction(prediction_LQ, inputs, model_config)
    error_S = torch.stack(
        [
            squared_error(
                prediction, x, noise, t, prediction_is=config.prediction, loss_on=config.loss_on, min_t=config.min_t
            ).mean()
            for prediction, x, noise, t in zip(predictions, latents, pack.noise, pack.t_S, strict=True)
        ]
    )
    tokens_S = inputs.layout.cu_seqlens.diff()  # of the device's own copy: nothing to wait for
    if config.counted_by is CountedBy.tokens:
        loss = (pack.weight_S * tokens_S * error_S).sum() / pack.planned_tokens
    else:
        loss = (pack.weight_S * error_S).sum() / pack.planned_samples
    return PackLoss(
        loss=loss,
        sample_loss_S=error_S.detach(),
        t_S=pack.t_S,
        weight_S=pack.weight_S,
        kind_S=torch.tensor([caption_kind(sample) for sample in pack.samples]).to(pack.t_S.device, non_blocking=True),
        tokens=sum(compress(inputs.layout.lengths, pack.is_trained)),
        clips=sum(pack.is_trained),
        frames=sum(sample.size.num_frames for sample in compress(pack.samples, pack.is_trained)),
        flops=sum(
            step_flops(model_config, tokens, text_rows)
            for tokens, text_rows in compress(
                zip(inputs.layout.lengths, inputs.layout.text_lengths, strict=True), pack.is_trained
            )
        ),
        failed=len(pack.failures),
    )


def caption_kind(sample: PlannedSample) -> int:
    """Number in CAPTION_KINDS of the caption that a sample is trained with."""
    return CAPTION_KINDS.index("none" if sample.caption is None else sample.row.captions[sample.caption].kind)
