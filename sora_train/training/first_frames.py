"""Clips whose first frame is known, in training: which those are, what the model is told, which tokens count.

Two ways, by the model. Where it has condition_channels (Wan 2.1 I2V, 2.2 I2V A14B), it is given the frame beside the
noise, of every clip; all tokens are noisy and count. Otherwise (Wan 2.2 TI2V) the first latent frame of some clips
stands there clean, with t = 0, and has no error. The loss is divided by the planned count of all tokens, clean ones
included: that count needs no draw, and each noisy token weighs the same, whether or not its clip begins with clean
ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_train.config.diffusion import DiffusionConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError, TrainConfig
from sora_train.data.pack import Pack
from sora_train.encoders.codec_shape import CodecShape
from sora_train.encoders.first_frame import condition_channels, condition_latents
from sora_train.encoders.video_codec import VideoCodec, to_unit_range


def check_first_frames(config: TrainConfig, codec: CodecShape) -> None:
    """Raises ConfigError for settings under which first frames cannot be known, or would not be."""
    model, probability = config.model, config.diffusion.first_frame_probability
    if not model.condition_channels:
        if model.image_width:
            raise ConfigError(
                f"model.image_width={model.image_width} without model.condition_channels is no model of Wan's: set "
                f"model.condition_channels={condition_channels(codec.channels, codec.temporal_ratio)}"
            )
        if probability and model.patch_frames > 1:
            raise ConfigError(
                f"diffusion.first_frame_probability={probability:g} with model.patch_frames={model.patch_frames}: a "
                "token would be half known; set one of them to 0 and 1"
            )
        return
    needed = condition_channels(codec.channels, codec.temporal_ratio)
    if model.condition_channels != needed:
        raise ConfigError(
            f"model.condition_channels={model.condition_channels}: with this codec a first frame has {needed}, a mask "
            f"of {codec.temporal_ratio} and its latents; set model.condition_channels={needed}"
        )
    if probability != 1:
        raise ConfigError(
            f"diffusion.first_frame_probability={probability:g}, but model.condition_channels="
            f"{model.condition_channels} are made of first frames alone: set diffusion.first_frame_probability=1"
        )
    if model.image_width and config.parallel.largest_group > 1:
        raise ConfigError(
            f"parallel.largest_group={config.parallel.largest_group}: rows of images (model.image_width="
            f"{model.image_width}) are not handed to the ranks that share a clip; set parallel.largest_group=1"
        )
    if config.validation.prompts:
        raise ConfigError(
            "validation.prompts have no first frames, which model.condition_channels needs: leave them empty and use "
            "sora_train.sample --image"
        )


@dataclass(frozen=True)
class NoisyTokens:
    """Of each document of a pack the tokens that are not clean: on this rank, and of its whole clip."""

    here: tuple[int, ...]
    of_clip: tuple[int, ...]


def known_first(pack: Pack, model: ModelConfig, config: DiffusionConfig) -> tuple[bool, ...]:
    """Which documents' clips begin with clean latents. Never one of a single latent frame: nothing would be left."""
    if model.condition_channels:
        return (False,) * len(pack.documents)
    return tuple(
        draw < config.first_frame_probability and sample.latent_shape[1] > 1
        for draw, sample in zip(pack.first_frame_draws, pack.samples, strict=True)
    )


def noisy_tokens(pack: Pack, is_known: Sequence[bool], model: ModelConfig) -> NoisyTokens:
    """The tokens of a clip go frame by frame, so the clean ones are the first."""
    here, of_clip = [], []
    for document, known in zip(pack.documents, is_known, strict=True):
        _, _, height, width = document.sample.latent_shape
        clean = (height // model.patch_height) * (width // model.patch_width) if known else 0
        part = document.part
        here.append(len(part) - len(range(part.start, min(part.stop, clean))))
        of_clip.append(document.sample.num_tokens - clean)
    return NoisyTokens(tuple(here), tuple(of_clip))


def clean_tokens(
    is_known: Sequence[bool], positions_L3: Tensor, sample_L: Tensor, model: ModelConfig, config: DiffusionConfig
) -> Tensor | None:
    """bool [L], which tokens are clean; None where no clip of the run has any."""
    if model.condition_channels or not config.first_frame_probability:
        return None
    known_S = torch.tensor(is_known).to(positions_L3.device, non_blocking=True)
    return (positions_L3[:, 0] == 0) & known_S[sample_L]


def first_frames(codec: VideoCodec, pack: Pack) -> list[Tensor | None]:
    """The first frame [3, H, W] in [-1, 1] of each piece of the pack that this rank reads; of latents made in advance,
    as the codec gives it back."""
    found: list[Tensor | None] = []
    for frames, latents in zip(pack.frames, pack.latents, strict=True):
        if frames is not None:
            found.append(to_unit_range(frames[:1])[:, 0])
        else:
            found.append(None if latents is None else codec.decode(latents[:, :1].float())[:, 0])
    return found


def conditions(codec: VideoCodec, pack: Pack, frames: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`condition_latents` of each piece that this rank reads."""
    return [
        None if frame is None else condition_latents(codec, frame, piece.sample.size.num_frames)
        for frame, piece in zip(frames, pack.pieces, strict=True)
    ]
