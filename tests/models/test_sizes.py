"""The shipped sizes have the parameters they say, counted on the meta device."""

from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.config_store import ConfigStore

from sora_train.config.model import ModelConfig
from sora_train.config.root import TrainConfig, build_config, schema_name, writable
from sora_train.models.video_dit import VideoDiT

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
    channels = ["model.in_channels=48", "model.out_channels=48"] if size == "5b" else []
    config = compose(size, "codec=diffusers", "codec.path=x", *channels)
    assert config.name == size
    assert num_parameters(config) == WAN[size]
    assert f"{WAN[size]:,}" in (ROOT / "configs" / "model" / f"{size}.yaml").read_text()


@pytest.mark.parametrize("size", OWN)
def test_own_sizes_have_the_parameters_they_say(size: str) -> None:
    assert num_parameters(compose(size)) == OWN[size]


def test_every_shipped_size_is_counted() -> None:
    assert {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")} == {*WAN, *OWN}
