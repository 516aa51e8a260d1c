"""From prompts to frames: noise and captions become packs, packs go through the sampler, latents become pixels.

Used by `sample`, `evaluate` and the validation of training. Prompts of any sizes share one pack; with guidance each
prompt stands in it twice, once with its text and once with none. The noise of a prompt comes from its own seed, so it
gives the same video whatever stands beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from sora_train.config.diffusion import DiffusionConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.config.validation import SamplingConfig
from sora_train.diffusion.conditioning import guided_samples
from sora_train.diffusion.flow_matching import to_velocity
from sora_train.diffusion.samplers import num_evaluations, sample_latents
from sora_train.encoders.codec_shape import CodecShape
from sora_train.encoders.video_codec import VideoCodec, to_pixels
from sora_train.models.inputs import Text, patch_of
from sora_train.models.patchify import num_tokens
from sora_train.models.video_dit import VideoDiT, predict

Frames = NDArray[np.uint8]
# Captions to what the model takes for them: themselves for text.kind=bytes, rows of a frozen encoder otherwise.
EncodeText = Callable[[list[str]], Text]


@dataclass(frozen=True)
class Request:
    """One video to generate."""

    prompt: str
    height: int
    width: int
    num_frames: int
    seed: int


@torch.no_grad()
def generate(
    model: VideoDiT,
    codec: VideoCodec,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    *,
    encode_text: EncodeText = list,
    max_tokens_per_pack: int = 32768,
    show_progress: bool = False,
) -> list[Frames]:
    """Generates the requested videos, in their order.

    Args:
        model: on the device that shall do the work.
        codec: between latents and pixels, on the same device.
        requests: any sizes that `check_sizes` accepts.
        sampling: steps, solver, guidance, shift of the grid of t.
        diffusion: what the model was trained to predict.
        encode_text: turns captions into the model's text.
        max_tokens_per_pack: bounds memory; a request that alone has more is a pack of its own.
        show_progress: a bar over the evaluations of the model, on a terminal.

    Returns:
        uint8 [T, H, W, 3] for each request.
    """
    is_training = model.training
    model.eval()
    videos: list[Frames] = []
    parts = list(packs(requests, model.config, codec.shape, sampling.guidance_scale, max_tokens_per_pack))
    console = Console(stderr=True)
    with Progress(console=console, disable=not (show_progress and console.is_terminal)) as progress:
        bar = progress.add_task("sampling", total=len(parts) * num_evaluations(sampling))
        for pack in parts:
            for latents in sample_pack(
                model, codec, pack, sampling, diffusion, encode_text, lambda: progress.advance(bar)
            ):
                videos.append(to_pixels(codec.decode(latents)).cpu().numpy())
    model.train(is_training)
    return videos


def sample_pack(
    model: VideoDiT,
    codec: VideoCodec,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    encode_text: EncodeText,
    advance: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Latents [C, T, H, W] of requests that are one pack; `advance` is called after each run of the model."""
    device = next(model.parameters()).device
    noise = [draw_noise(request, codec.shape).to(device) for request in requests]
    is_guided = sampling.guidance_scale != 1.0
    captions = [request.prompt for request in requests]
    text = encode_text(captions + [""] * len(captions) if is_guided else captions)

    def velocity(noisy: list[Tensor], t: float) -> list[Tensor]:
        copies = noisy + noisy if is_guided else noisy
        t_S = torch.full((len(copies),), t, device=device)
        predictions = predict(model, copies, t_S, text)
        advance()
        velocities = [
            to_velocity(prediction, latents, t, diffusion.prediction)
            for prediction, latents in zip(predictions, copies, strict=True)
        ]
        if not is_guided:
            return velocities
        half = len(noisy)
        return guided_samples(velocities[:half], velocities[half:], sampling.guidance_scale)

    return sample_latents(velocity, noise, sampling)


def packs(
    requests: Sequence[Request], model: ModelConfig, codec: CodecShape, guidance_scale: float, max_tokens: int
) -> Iterator[list[Request]]:
    """Neighbouring requests whose tokens, twice over with guidance, stay within `max_tokens` together."""
    pack: list[Request] = []
    held = 0
    for request in requests:
        shape = codec.latent_shape(request.num_frames, request.height, request.width)
        tokens = num_tokens(shape, patch_of(model)) * (2 if guidance_scale != 1.0 else 1)
        if pack and held + tokens > max_tokens:
            yield pack
            pack, held = [], 0
        pack.append(request)
        held += tokens
    if pack:
        yield pack


def draw_noise(request: Request, codec: CodecShape) -> Tensor:
    """Standard normal latents [C, T, H, W] of the request's own seed; drawn on the CPU, so equal on every device."""
    shape = codec.latent_shape(request.num_frames, request.height, request.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))


def check_sizes(requests: Sequence[Request], model: ModelConfig, codec: CodecShape) -> None:
    """Raises ConfigError, naming the nearest sizes that work, for one that codec and patch do not divide."""
    strides = {
        "height": codec.spatial_ratio * model.patch_height,
        "width": codec.spatial_ratio * model.patch_width,
    }
    ratio = codec.temporal_ratio
    for request in requests:
        for name, stride in strides.items():
            size = getattr(request, name)
            if size < stride or size % stride:
                low = max(size // stride, 1) * stride
                raise ConfigError(f"{name}={size} is not a multiple of {stride}: use {low} or {low + stride}")
        frames = request.num_frames
        if frames < 1 or (frames - 1) % ratio:
            low = max(frames - 1, 0) // ratio * ratio + 1
            raise ConfigError(f"frames={frames} is not 1 plus a multiple of {ratio}: use {low} or {low + ratio}")
