"""From prompts to frames: noise and captions become packs, packs go through the sampler, latents become pixels.

Used by `sample`, `evaluate` and the validation of training. Prompts of any sizes share one pack; with guidance each
prompt stands in it twice, once with its text and once with none. The noise of a prompt comes from its own seed, so it
gives the same video whatever stands beside it. A request with an image is a video that begins with it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from sora_train.config.diffusion import DiffusionConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.config.validation import SamplingConfig
from sora_train.diffusion.conditioning import guided_samples
from sora_train.diffusion.flow_matching import to_velocity
from sora_train.diffusion.samplers import num_evaluations, sample_latents
from sora_train.encoders.codec_shape import CodecShape
from sora_train.encoders.first_frame import condition_latents
from sora_train.encoders.video_codec import VideoCodec, to_pixels, to_unit_range
from sora_train.models.inputs import Conditioning, Text, patch_of
from sora_train.models.patchify import num_tokens
from sora_train.models.video_dit import VideoDiT, predict

Frames = NDArray[np.uint8]
# Captions to what the model takes for them: themselves for text.kind=bytes, rows of a frozen encoder otherwise.
EncodeText = Callable[[list[str]], Text]
# A frame [3, H, W] in [-1, 1] to the rows [I, image width] that the model attends to.
EncodeImage = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Request:
    """One video to generate."""

    prompt: str
    height: int
    width: int
    num_frames: int
    seed: int
    image: str = ""  # file with the first frame; scaled to cover the frame and cut to it


class Experts:
    """Two models that share the work: one from pure noise down to `boundary`, one from there on (Wan 2.2 A14B).

    One is on the device, the other waits on the CPU: a sampler changes from one to the other once.
    """

    def __init__(self, high: VideoDiT, low: VideoDiT, boundary: float, device: torch.device | str) -> None:
        self.high, self.low, self.boundary, self.device = high, low, boundary, torch.device(device)
        self.config = high.config

    def at(self, t: float) -> VideoDiT:
        """The model for noise level t, on the device."""
        wanted, other = (self.high, self.low) if t >= self.boundary else (self.low, self.high)
        if self.device.type != "cpu":
            other.to("cpu")
            wanted.to(self.device)
        return wanted

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of both."""
        return chain(self.high.parameters(), self.low.parameters())


@torch.no_grad()
def generate(
    model: VideoDiT | Experts,
    codec: VideoCodec,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    *,
    encode_text: EncodeText = list,
    encode_image: EncodeImage | None = None,
    max_tokens_per_pack: int = 32768,
    show_progress: bool = False,
) -> list[Frames]:
    """Generates the requested videos, in their order.

    Args:
        model: on the device that shall do the work, or two that take turns on it.
        codec: between latents and pixels, on the same device.
        requests: any sizes and images that `check_sizes` and `check_images` accept.
        sampling: steps, solver, guidance, shift of the grid of t.
        diffusion: what the model was trained to predict.
        encode_text: turns captions into the model's text.
        encode_image: turns a first frame into the rows that a model with `image_width` attends to.
        max_tokens_per_pack: bounds memory; a request that alone has more is a pack of its own.
        show_progress: a bar over the evaluations of the model, on a terminal.

    Returns:
        uint8 [T, H, W, 3] for each request.
    """
    models = [model.high, model.low] if isinstance(model, Experts) else [model]
    were_training = [each.training for each in models]
    for each in models:
        each.eval()
    videos: list[Frames] = []
    parts = list(packs(requests, model.config, codec.shape, sampling.guidance_scale, max_tokens_per_pack))
    console = Console(stderr=True)
    with Progress(console=console, disable=not (show_progress and console.is_terminal)) as progress:
        bar = progress.add_task("sampling", total=len(parts) * num_evaluations(sampling))
        for pack in parts:
            for latents in sample_pack(
                model, codec, pack, sampling, diffusion, encode_text, encode_image, lambda: progress.advance(bar)
            ):
                videos.append(to_pixels(codec.decode(latents)).cpu().numpy())
    for each, was_training in zip(models, were_training, strict=True):
        each.train(was_training)
    return videos


def sample_pack(
    model: VideoDiT | Experts,
    codec: VideoCodec,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    encode_text: EncodeText,
    encode_image: EncodeImage | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Latents [C, T, H, W] of requests that are one pack; `advance` is called after each run of the model."""
    device = model.device if isinstance(model, Experts) else next(model.parameters()).device
    noise = [draw_noise(request, codec.shape).to(device) for request in requests]
    conditioning, known = first_frames(model.config, codec, requests, encode_image, device)
    # Known latents stand in their place from the start, and stay.
    starts = [n if k is None else torch.cat([k, n[:, 1:]], dim=1) for n, k in zip(noise, known, strict=True)]
    is_guided = sampling.guidance_scale != 1.0
    captions = [request.prompt for request in requests]
    text = encode_text(captions + [""] * len(captions) if is_guided else captions)
    if is_guided and conditioning is not None:
        parts = (conditioning.latents, conditioning.image, conditioning.clean_frames)
        conditioning = Conditioning(*([*part, *part] for part in parts))

    def velocity(noisy: list[Tensor], t: float) -> list[Tensor]:
        copies = noisy + noisy if is_guided else noisy
        t_S = torch.full((len(copies),), t, device=device)
        chosen = model.at(t) if isinstance(model, Experts) else model
        predictions = predict(chosen, copies, t_S, text, conditioning)
        advance()
        velocities = [
            to_velocity(prediction, latents, t, diffusion.prediction)
            for prediction, latents in zip(predictions, copies, strict=True)
        ]
        if is_guided:
            half = len(noisy)
            velocities = guided_samples(velocities[:half], velocities[half:], sampling.guidance_scale)
        for each, k in zip(velocities, known, strict=True):
            if k is not None:
                each[:, : k.shape[1]] = 0
        return velocities

    return sample_latents(velocity, starts, sampling)


def first_frames(
    config: ModelConfig,
    codec: VideoCodec,
    requests: Sequence[Request],
    encode_image: EncodeImage | None,
    device: torch.device,
) -> tuple[Conditioning | None, list[Tensor | None]]:
    """What the model is told of the requests' images, and the latents [C, 1, H, W] that are clean from the start.

    Raises ConfigError for images that cannot be read, or are missing (`check_images` says so earlier).
    """
    none: list[Tensor | None] = [None] * len(requests)
    if not (config.condition_channels or any(request.image for request in requests)):
        return None, none
    frames = [
        to_unit_range(torch.from_numpy(read_image(request))[None])[:, 0].to(device) if request.image else None
        for request in requests
    ]
    if not config.condition_channels:
        known = [None if frame is None else codec.encode(frame[:, None]) for frame in frames]
        return Conditioning(clean_frames=[int(frame is not None) for frame in frames]), known
    check_images(requests, config, takes_images=True)
    pairs = [(frame, r.num_frames) for frame, r in zip(frames, requests, strict=True) if frame is not None]
    conditioning = Conditioning(latents=[condition_latents(codec, frame, count) for frame, count in pairs])
    if config.image_width:
        if encode_image is None:
            raise ConfigError(f"model.image_width={config.image_width} needs an image encoder: set image_encoder.path")
        conditioning = replace(conditioning, image=[encode_image(frame) for frame, _ in pairs])
    return conditioning, none


def read_image(request: Request) -> Frames:
    """The request's image, upright, scaled to cover its frame and cut to it, uint8 [H, W, 3]."""
    try:
        with Image.open(Path(request.image)) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"image {request.image} cannot be read: give a PNG, JPEG or WebP file") from error
    return np.array(ImageOps.fit(picture, (request.width, request.height), Image.Resampling.LANCZOS))


def check_images(requests: Sequence[Request], config: ModelConfig, takes_images: bool) -> None:
    """Raises ConfigError where the model needs an image and has none, or is given one that it cannot use.

    Args:
        requests: what is asked for.
        config: of the model.
        takes_images: whether it was trained to begin with a given frame.
    """
    for request in requests:
        if config.condition_channels and not request.image:
            raise ConfigError("this model makes videos of images: give one with --image FILE")
        if request.image and not takes_images:
            raise ConfigError(f"--image {request.image}: this model was trained on text alone, leave it out")
        if request.image:
            read_image(request)


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
