"""The diffusers VAEs behind the codec's interface, from tiny random folders."""

import json

import pytest
import torch

from sora_train.config.encoders import CodecConfig, CodecKind
from sora_train.config.root import ConfigError
from sora_train.encoders.codec_shape import CodecShape
from sora_train.encoders.video_codec import build_codec, codec_shape

diffusers = pytest.importorskip("diffusers")

WAN = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 3.0, 4.0],
}
HUNYUAN = {
    "latent_channels": 4,
    "block_out_channels": (4, 4, 4, 4),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.5,
}
COGVIDEOX = {
    "latent_channels": 4,
    "block_out_channels": (4, 4, 4, 4),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 1.5,
}
LTX = {
    "latent_channels": 6,
    "block_out_channels": (4, 4, 4, 4),
    "decoder_block_out_channels": (4, 4, 4, 4),
    "scaling_factor": 2.0,
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "patch_size": 4,
}
FAMILIES = {
    "AutoencoderKLWan": (WAN, CodecShape(4, 4, 8)),
    "AutoencoderKLHunyuanVideo": (HUNYUAN, CodecShape(4, 4, 8)),
    "AutoencoderKLCogVideoX": (COGVIDEOX, CodecShape(4, 4, 8)),
    "AutoencoderKLLTXVideo": (LTX, CodecShape(6, 8, 32)),
}


def save_tiny(family: str, folder) -> CodecConfig:
    torch.manual_seed(0)
    vae = getattr(diffusers, family)(**FAMILIES[family][0])
    if family == "AutoencoderKLLTXVideo":  # mean and spread are weights there
        vae.latents_mean.fill_(0.3)
        vae.latents_std.fill_(1.7)
    vae.save_pretrained(folder)
    return CodecConfig(kind=CodecKind.diffusers, path=str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_and_frames_have_the_sizes_the_config_promises(family, tmp_path):
    config = save_tiny(family, tmp_path)
    shape = codec_shape(config)
    assert shape == FAMILIES[family][1]
    codec = build_codec(config, "cpu")
    assert codec.shape == shape
    side = shape.spatial_ratio
    for n in (0, 1, 2):  # CogVideoX alone miscounts frames when the number of latent frames is even
        frames = torch.rand(3, 1 + n * shape.temporal_ratio, side, 2 * side) * 2 - 1
        latents = codec.encode(frames)
        assert latents.shape == shape.latent_shape(*frames.shape[1:])
        assert latents.dtype == torch.float32
        decoded = codec.decode(latents)
        assert decoded.shape == frames.shape
        assert decoded.abs().max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_normalised_as_the_family_does(family, tmp_path):
    codec = build_codec(save_tiny(family, tmp_path), "cpu")
    side = codec.shape.spatial_ratio
    frames = torch.rand(3, 1, side, side) * 2 - 1
    own = codec.vae.encode(frames[None]).latent_dist.mode()[0]
    channel = torch.arange(own.shape[0]).reshape(-1, 1, 1, 1)
    expected = {
        "AutoencoderKLWan": (own - 0.1 * (channel + 1)) / (channel + 1),
        "AutoencoderKLHunyuanVideo": own * 0.5,
        "AutoencoderKLCogVideoX": own * 1.5,
        "AutoencoderKLLTXVideo": (own - 0.3) * 2.0 / 1.7,
    }[family]
    latents = codec.encode(frames)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(codec.decode(latents), codec.vae.decode(own[None]).sample[0].clamp(-1, 1))


def test_even_numbers_of_latent_frames_in_cogvideox(tmp_path):
    """They are decoded with the first one twice, and the frames in excess at the beginning go."""
    codec = build_codec(save_tiny("AutoencoderKLCogVideoX", tmp_path), "cpu")
    latents = torch.randn(4, 2, 2, 2)
    odd = codec.decode(torch.cat([latents[:, :1], latents], dim=1))
    assert torch.equal(codec.decode(latents), odd[:, -5:])
    assert not torch.equal(odd[:, :5], odd[:, -5:])


def test_identity_follows_the_weights(tmp_path):
    codec = build_codec(save_tiny("AutoencoderKLWan", tmp_path / "a"), "cpu")
    again = build_codec(save_tiny("AutoencoderKLWan", tmp_path / "b"), "cpu")
    assert codec.identity == again.identity
    with torch.no_grad():
        next(again.vae.parameters())[0] += 1e-3
    del again.identity
    assert codec.identity != again.identity


def test_a_vae_is_frozen(tmp_path):
    codec = build_codec(save_tiny("AutoencoderKLWan", tmp_path), "cpu")
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())
    assert not codec.vae.training


def test_folders_of_wan_from_before_and_after_their_ratios_were_stated(tmp_path):
    """The VAE of Wan 2.1 as published names no scale factors; that of Wan 2.2 5B has a patch of its own."""
    wan = {"_class_name": "AutoencoderKLWan", "z_dim": 16, "dim_mult": [1, 2, 4, 4]}
    wan["temperal_downsample"] = [False, True, True]
    (tmp_path / "config.json").write_text(json.dumps(wan))
    config = CodecConfig(kind=CodecKind.diffusers, path=str(tmp_path))
    assert codec_shape(config) == CodecShape(16, 4, 8)
    (tmp_path / "config.json").write_text(json.dumps({**wan, "z_dim": 48, "patch_size": 2, "scale_factor_spatial": 16}))
    assert codec_shape(config) == CodecShape(48, 4, 16)


def test_bad_paths_get_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"codec\.path is not set"):
        codec_shape(CodecConfig(kind=CodecKind.diffusers))
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        codec_shape(CodecConfig(kind=CodecKind.diffusers, path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ConfigError, match="is a AutoencoderKL, not a video VAE"):
        codec_shape(CodecConfig(kind=CodecKind.diffusers, path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", **WAN}))
    with pytest.raises(ConfigError, match=r"codec\.path=.* does not load: .*no file named"):  # no weights there
        build_codec(CodecConfig(kind=CodecKind.diffusers, path=str(tmp_path)), "cpu")
