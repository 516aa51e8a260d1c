"""Video VAEs of diffusers behind the interface of a codec.

The families name the same facts differently (ratios, mean and spread of the latents); this is the one place that
knows. To add a family: give it a case in `read_shape` and one in `normalization`, and its class in `FAMILIES`.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_train.config.root import ConfigError
from sora_train.encoders.codec_shape import CodecShape

FAMILIES = ("AutoencoderKLWan", "AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX", "AutoencoderKLLTXVideo")


def vae_shape(path: str) -> CodecShape:
    """Channels and ratios of the VAE in a folder or hub repository, from its config.json.

    Raises ConfigError when there is none, or it is of a family not known here.
    """
    return read_shape(read_vae_config(path))


def read_vae_config(path: str) -> dict[str, Any]:
    """config.json of a VAE, checked to be of a known family."""
    if not path:
        raise ConfigError("codec.path is not set: give the folder of a diffusers video VAE, or use codec=wavelet")
    file = Path(path) / "config.json"
    if file.is_file():
        values: dict[str, Any] = json.loads(file.read_text())
    elif Path(path).exists() or path.startswith((".", "/", "~")):
        raise ConfigError(f"codec.path={path} holds no config.json: give the folder of a diffusers video VAE")
    else:
        values = _hub_config(path)
    if values.get("_class_name") not in FAMILIES:
        raise ConfigError(
            f"codec.path={path} is a {values.get('_class_name')}, not a video VAE known here: use one of "
            + ", ".join(FAMILIES)
        )
    return values


def _hub_config(repository: str) -> dict[str, Any]:
    from diffusers.configuration_utils import ConfigMixin

    try:
        loaded: dict[str, Any] = ConfigMixin.load_config(repository)  # type: ignore[assignment]
    except OSError as error:
        raise ConfigError(
            f"codec.path={repository} is no folder here and could not be fetched: {str(error).splitlines()[0]}"
        ) from error
    return loaded


def read_shape(values: dict[str, Any]) -> CodecShape:
    """Channels and ratios from the values of a config.json."""
    family = values["_class_name"]
    if family == "AutoencoderKLWan":  # the folders of Wan 2.1 state no ratios: count the halvings
        spatial = 2 ** (len(values["dim_mult"]) - 1) * (values.get("patch_size") or 1)
        return CodecShape(values["z_dim"], 2 ** sum(values["temperal_downsample"]), spatial)
    if family == "AutoencoderKLHunyuanVideo":
        return CodecShape(
            values["latent_channels"], values["temporal_compression_ratio"], values["spatial_compression_ratio"]
        )
    if family == "AutoencoderKLCogVideoX":  # states no spatial ratio: every block but the last halves
        halvings = len(values["block_out_channels"]) - 1
        return CodecShape(values["latent_channels"], int(values["temporal_compression_ratio"]), 2**halvings)
    halvings = sum(values["spatio_temporal_scaling"])  # LTX-Video: stated, or implied by the patches and halvings
    return CodecShape(
        values["latent_channels"],
        values.get("temporal_compression_ratio") or values["patch_size_t"] * 2**halvings,
        values.get("spatial_compression_ratio") or values["patch_size"] * 2**halvings,
    )


def normalization(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and spread of the VAE's own latents, [C, 1, 1, 1] each; ours are (latents - mean) / spread."""
    config, family = vae.config, type(vae).__name__
    if family == "AutoencoderKLWan":
        mean, spread = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    elif family == "AutoencoderKLLTXVideo":
        mean, spread = vae.latents_mean.cpu(), vae.latents_std.cpu() / config.scaling_factor
    else:
        mean = torch.zeros(config.latent_channels)
        spread = torch.full((config.latent_channels,), 1 / config.scaling_factor)
    return mean.float().reshape(-1, 1, 1, 1), spread.float().reshape(-1, 1, 1, 1)


def load_vae(path: str, device: torch.device | str) -> "DiffusersCodec":
    """Loads the VAE of a folder or hub repository, frozen, in float32.

    Raises ConfigError for a family not known here, weights that are not there, or when diffusers is not installed.
    """
    family = read_vae_config(path)["_class_name"]
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError("codec=diffusers needs diffusers: pip install 'sora_train[encoders]'") from error
    try:
        vae = getattr(diffusers, family).from_pretrained(path, torch_dtype=torch.float32)
    except OSError as error:
        raise ConfigError(f"codec.path={path} does not load: {str(error).splitlines()[0]}") from error
    return DiffusersCodec(vae.to(device))


class DiffusersCodec:
    """A frozen AutoencoderKL* of diffusers. Latents are the mode of the posterior, so encoding draws nothing."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.shape = read_shape({**vae.config, "_class_name": type(vae).__name__})
        mean, spread = normalization(vae)
        self.mean, self.spread = mean.to(vae.device), spread.to(vae.device)

    @cached_property
    def identity(self) -> str:
        """Family and a hash of its settings and weights."""
        settings = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, value in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().numpy().tobytes())
        return f"{type(self.vae).__name__}-{digest.hexdigest()[:16]}"

    @torch.no_grad()
    def encode(self, frames_3THW: Tensor) -> Tensor:
        """Frames [3, T, H, W] in [-1, 1] -> normalised latents; ValueError when the size does not fit the ratios."""
        self.shape.latent_shape(*frames_3THW.shape[1:])
        posterior = self.vae.encode(frames_3THW.to(self.vae.dtype)[None]).latent_dist
        return (posterior.mode()[0].float() - self.mean) / self.spread

    @torch.no_grad()
    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """Normalised latents -> frames in [-1, 1]."""
        latents = (latents_CTHW.float() * self.spread + self.mean).to(self.vae.dtype)[None]
        num_frames = 1 + (latents_CTHW.shape[1] - 1) * self.shape.temporal_ratio
        if type(self.vae).__name__ == "AutoencoderKLCogVideoX" and latents_CTHW.shape[1] % 2 == 0:
            # It gives the first latent one frame only when their number is odd; the frames in excess are cut below.
            latents = torch.cat([latents[:, :, :1], latents], dim=2)
        # LTX-Video's newer decoders also denoise a little and want to be told from which level: none.
        level = (latents.new_zeros(1),) if getattr(self.vae.config, "timestep_conditioning", False) else ()
        return self.vae.decode(latents, *level).sample[0, :, -num_frames:].float().clamp(-1, 1)
