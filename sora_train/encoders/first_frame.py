"""What Wan's image-to-video models are told of a clip's first frame.

Wan 2.1 and 2.2 A14B I2V take it beside the noise, as latents of a video that has nothing else, under a mask; Wan 2.1
also as rows of a CLIP image encoder. Wan 2.2 TI2V takes it in place of noise: its latents are the clip's first.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_train.config.encoders import ImageEncoderConfig
from sora_train.config.root import ConfigError
from sora_train.encoders.video_codec import VideoCodec

# Of CLIP's preprocessor_config.json.
CLIP_SIZE, CLIP_MEAN, CLIP_SPREAD = 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def condition_channels(codec_channels: int, temporal_ratio: int) -> int:
    """Channels of `condition_latents`: 20 with Wan 2.1's VAE."""
    return temporal_ratio + codec_channels


def condition_latents(codec: VideoCodec, first_frame_3HW: Tensor, num_frames: int) -> Tensor:
    """The condition of a clip of `num_frames` of which only the first is known.

    Args:
        codec: of the clip's latents.
        first_frame_3HW: float in [-1, 1].
        num_frames: of the clip; the others are given to the codec as zeros, middle gray.

    Returns:
        float32 [temporal_ratio + C, T, H, W]: a mask with a channel for each pixel frame of a latent frame, 1 where
        that is known; then the latents (Wan team 2025, arXiv:2503.20314, section 5.1).
    """
    height, width = first_frame_3HW.shape[1:]
    video = first_frame_3HW.new_zeros(3, num_frames, height, width)
    video[:, 0] = first_frame_3HW
    latents = codec.encode(video)
    mask = latents.new_zeros(codec.shape.temporal_ratio, *latents.shape[1:])
    mask[:, 0] = 1  # the first latent frame has the first pixel frame alone
    return torch.cat([mask, latents])


class ImageEncoder:
    """A frozen CLIP vision encoder: a picture to the rows that Wan 2.1's image-to-video models attend to."""

    def __init__(self, model: Any, size: int = CLIP_SIZE, mean: Any = CLIP_MEAN, spread: Any = CLIP_SPREAD) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size = size
        self.mean, self.spread = (torch.tensor(rgb, device=model.device).reshape(3, 1, 1) for rgb in (mean, spread))
        self.width: int = model.config.hidden_size

    @torch.no_grad()
    def encode(self, frame_3HW: Tensor) -> Tensor:
        """Rows [I, width] of a picture in [-1, 1]: the hidden state before the last layer, class token first.

        As CLIP wants it: its shorter side scaled to `size`, the middle square cut out.
        """
        height, width = frame_3HW.shape[1:]
        scale = self.size / min(height, width)
        scaled = (max(self.size, int(height * scale)), max(self.size, int(width * scale)))
        picture = (frame_3HW.float().to(self.mean.device) + 1) / 2
        picture = F.interpolate(picture[None], scaled, mode="bicubic", antialias=True)[0].clamp(0, 1)
        top, left = (scaled[0] - self.size) // 2, (scaled[1] - self.size) // 2
        picture = (picture[:, top : top + self.size, left : left + self.size] - self.mean) / self.spread
        states = self.model(pixel_values=picture[None].to(self.model.dtype), output_hidden_states=True).hidden_states
        rows: Tensor = states[-2][0]
        return rows


def load_image_encoder(
    config: ImageEncoderConfig, width: int, device: torch.device | str, dtype: torch.dtype
) -> ImageEncoder:
    """Loads a CLIP vision encoder from a folder, or from `image_encoder/` and `image_processor/` of a pipeline.

    Raises ConfigError when the path is missing, holds another model or one whose rows are not as wide as the model
    takes them (`width`), or transformers is not installed.
    """
    if not config.path:
        raise ConfigError("image_encoder.path is not set: give the folder of a CLIP vision encoder or a Wan pipeline")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("model.image_width needs transformers: pip install 'sora_train[encoders]'") from error
    folder = Path(config.path)
    weights = folder / "image_encoder" if (folder / "image_encoder").is_dir() else folder
    if not (weights / "config.json").is_file():
        raise ConfigError(f"image_encoder.path={config.path} holds no config.json: give that of a CLIP vision encoder")
    kind = json.loads((weights / "config.json").read_text()).get("model_type")
    if kind not in ("clip_vision_model", "clip"):
        raise ConfigError(f"image_encoder.path={config.path} is a {kind}: give a CLIP vision encoder")
    try:
        model: Any = transformers.CLIPVisionModel.from_pretrained(weights, dtype=dtype)
    except OSError as error:
        raise ConfigError(f"image_encoder.path={config.path}: {str(error).splitlines()[0]}") from error
    if model.config.hidden_size != width:
        raise ConfigError(
            f"model.image_width={width}, but image_encoder.path={config.path} gives rows of "
            f"{model.config.hidden_size}: set model.image_width={model.config.hidden_size}"
        )
    return ImageEncoder(model.to(device), **_preparation(folder, weights, model.config.image_size))


def _preparation(folder: Path, weights: Path, image_size: int) -> dict[str, Any]:
    """Mean and spread of the pipeline's preprocessor; those of CLIP where it states none."""
    for place in (folder / "image_processor", weights):
        file = place / "preprocessor_config.json"
        if file.is_file():
            values = json.loads(file.read_text())
            mean, spread = values.get("image_mean", CLIP_MEAN), values.get("image_std", CLIP_SPREAD)
            return {"size": image_size, "mean": mean, "spread": spread}
    return {"size": image_size}
