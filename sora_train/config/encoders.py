"""Settings of the frozen encoders: the codec between frames and latents, and the text encoder."""

from dataclasses import dataclass
from enum import Enum


class CodecKind(Enum):
    wavelet = "wavelet"  # invertible Haar wavelet, no weights
    diffusers = "diffusers"  # an AutoencoderKL* folder


@dataclass(frozen=True)
class CodecConfig:
    kind: CodecKind = CodecKind.wavelet
    # kind=diffusers: a local folder (or hub id) holding the VAE.
    path: str = ""
    # kind=wavelet: powers of two. Channels = 3 * temporal_ratio * spatial_ratio^2; 1 + n * temporal_ratio frames
    # give 1 + n latent frames (the first frame stands alone, so an image is a video of one frame).
    temporal_ratio: int = 2
    spatial_ratio: int = 4


@dataclass(frozen=True)
class TextEncoderConfig:
    """A frozen text encoder from a transformers folder; used when model.text.kind is `encoder`."""

    path: str = ""
    max_tokens: int = 512
    # Wan attends to all max_tokens rows, zeros after the text's end; our own models attend to the text alone.
    pad_to_max: bool = False


@dataclass(frozen=True)
class ImageEncoderConfig:
    """A frozen CLIP vision encoder, used when model.image_width is above 0."""

    # A local folder, or that of a pipeline with image_encoder/ and image_processor/ in it.
    path: str = ""
