"""The shipped sizes have the parameters they say, counted on the meta device."""

import re
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.config_store import ConfigStore

from sora_train.config.encoders import CodecKind
from sora_train.config.initial import Expert
from sora_train.config.limits import check_limits
from sora_train.config.model import ModelConfig
from sora_train.config.root import TrainConfig, build_config, schema_name, writable
from sora_train.encoders.codec_shape import CodecShape
from sora_train.models.video_dit import VideoDiT
from sora_train.training.first_frames import check_first_frames

ROOT = Path(__file__).parents[2]
# Of diffusers' VAEs: 16 channels, but for TI2V-5B's own.
WAN = {"1.3b": 1_418_996_800, "14b": 14_288_491_584, "i2v_14b": 16_394_878_784, "5b": 4_999_787_712}
# With the wavelet codec and the byte text path, as they are trained by default.
OWN = {"tiny": 2_352_256, "s": 30_566_784, "b": 119_652_480, "l": 413_444_736, "xl": 607_920_000}


def compose(size: str, *overrides: str) -> ModelConfig:
    ConfigStore.instance().store(name=schema_name(TrainConfig), node=writable(TrainConfig))
    with hydra.initialize_config_module("sora_train.configs", version_base="1.3"):
        return build_config(TrainConfig, hydra.compose("train", ["data.shards=x", f"model={size}", *overrides])).model


def num_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VideoDiT(config).parameters())


@pytest.mark.parametrize("size", WAN)
def test_wans_sizes_have_wans_parameters(size: str) -> None:
    config = compose(size, "codec=wan2.2" if size == "5b" else "codec=diffusers", "codec.path=x")
    assert config.name == size
    assert num_parameters(config) == WAN[size]
    assert f"{WAN[size]:,}" in (ROOT / "configs" / "model" / f"{size}.yaml").read_text()


@pytest.mark.parametrize("size", OWN)
def test_own_sizes_have_the_parameters_they_say(size: str) -> None:
    assert num_parameters(compose(size)) == OWN[size]


EXPERIMENTS = {
    "wan2.1_t2v_1.3b": 1_418_996_800,
    "wan2.1_t2v_14b": 14_288_491_584,
    "wan2.1_i2v_14b": 16_394_878_784,
    "wan2.2_t2v_a14b_high": 14_288_491_584,
    "wan2.2_t2v_a14b_low": 14_288_491_584,
    # 20 more channels in 4 numbers of a patch.
    "wan2.2_i2v_a14b_high": 14_288_491_584 + 5120 * 20 * 4,
    "wan2.2_i2v_a14b_low": 14_288_491_584 + 5120 * 20 * 4,
    "wan2.2_ti2v_5b": 4_999_787_712,
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_trains_the_whole_of_wans_model(experiment: str) -> None:
    """One argument beside the folder: model, codec, text, first frames and noise go together."""
    ConfigStore.instance().store(name=schema_name(TrainConfig), node=writable(TrainConfig))
    with hydra.initialize_config_module("sora_train.configs", version_base="1.3"):
        values = hydra.compose("train", ["data.shards=x", f"experiment={experiment}", "init.weights=/wan"])
    config = build_config(TrainConfig, values)
    check_limits(config)
    assert num_parameters(config.model) == EXPERIMENTS[experiment]
    assert (config.codec.kind, config.codec.path) == (CodecKind.diffusers, "/wan/vae")
    assert (config.text_encoder.path, config.text_encoder.pad_to_max) == ("/wan", True)
    assert config.name == experiment
    is_5b = config.model.in_channels == 48
    codec = CodecShape(config.model.in_channels, 4, 16 if is_5b else 8)
    check_first_frames(config, codec)
    assert (config.diffusion.first_frame_probability > 0) == ("i2v" in experiment)
    t, half = config.diffusion.timesteps, experiment.rpartition("_")[2]
    boundary = 0.9 if "i2v" in experiment else 0.875
    assert (t.low, t.high) == {"high": (boundary, 1), "low": (0, boundary)}.get(half, (0, 1))
    assert config.init.expert == (Expert(half) if half in ("high", "low") else None)
    # The largest clip fits a pack.
    size, ratio = config.data.size, codec.spatial_ratio
    tokens = (1 + (size.max_frames - 1) // 4) * size.max_pixels // (2 * ratio) ** 2
    assert tokens <= config.data.max_tokens_per_pack


def test_the_readme_has_these_numbers() -> None:
    found = re.findall(r"`([\w.]+)` \| ([\d,]+) \|", (ROOT / "README.md").read_text())
    assert {name: int(number.replace(",", "")) for name, number in found} == {**WAN, **OWN}


def test_every_shipped_size_is_counted() -> None:
    assert {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")} == {*WAN, *OWN}
