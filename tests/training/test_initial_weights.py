"""What a run that starts from a Wan folder refuses, in one line, before anything is built."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sora_train.config.diffusion import TimestepConfig
from sora_train.config.initial import Expert, InitConfig
from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.root import ConfigError
from sora_train.models.video_dit import VideoDiT
from sora_train.models.wan_weights import save_wan
from sora_train.training.initial_weights import check_initial, check_prompts, check_same_model

ALL = TimestepConfig()
WAN_1_3B = ModelConfig(
    width=1536, depth=30, heads=12, mlp_width=8960, text=TextConfig(kind=TextKind.encoder, width=4096)
)
SMALL = ModelConfig(
    width=24, depth=1, heads=2, mlp_width=32, in_channels=4, out_channels=4,
    text=TextConfig(kind=TextKind.encoder, width=12),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_wan(VideoDiT(SMALL), tmp_path / "pipe" / "transformer")
    return tmp_path / "pipe"


def refused(init: InitConfig, model: ModelConfig = SMALL, timesteps: TimestepConfig = ALL) -> str:
    with pytest.raises(ConfigError) as caught:
        check_initial(init, model, timesteps)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_the_models_sizes_is_accepted(folder: Path) -> None:
    check_initial(InitConfig(weights=str(folder)), SMALL, ALL)
    named = replace(SMALL, name="mine", text=replace(SMALL.text, max_bytes=7, layers=9))
    check_initial(InitConfig(weights=str(folder / "transformer")), named, ALL)
    check_initial(InitConfig(), SMALL, ALL)


@pytest.mark.parametrize(
    ("ours", "theirs", "says", "fix"),
    [
        (ModelConfig(), WAN_1_3B, "model.width=192, but init.weights=DIR has 1536", "choose model=1.3b"),
        (replace(WAN_1_3B, depth=3), WAN_1_3B, "model.depth=3, but init.weights=DIR has 30", "choose model=1.3b"),
        (replace(WAN_1_3B, eps=1e-5), WAN_1_3B, "model.eps=1e-05", "choose model=1.3b"),
        (
            WAN_1_3B,
            replace(WAN_1_3B, width=5120, depth=40, heads=40, mlp_width=13824, condition_channels=20),
            "model.width=1536",
            "choose model=14b model.condition_channels=20",
        ),
        (
            WAN_1_3B,
            replace(WAN_1_3B, width=3072, heads=24, mlp_width=14336, in_channels=48, out_channels=48),
            "model.width=1536",
            "choose model=5b",
        ),
        (replace(SMALL, depth=2), SMALL, "model.depth=2", "choose model.depth=1"),
        (replace(SMALL, text=TextConfig(width=12)), SMALL, "model.text.kind=bytes", "choose model.text.kind=encoder"),
    ],
)
def test_other_sizes_are_named_with_the_model_to_choose(
    ours: ModelConfig, theirs: ModelConfig, says: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_same_model(ours, theirs, "DIR")
    assert str(caught.value).startswith(says)
    assert str(caught.value).endswith(fix)


def test_folders_that_are_none_or_not_whole(folder: Path, tmp_path: Path) -> None:
    assert "init.weights: " in refused(InitConfig(weights=str(tmp_path / "nowhere")))
    assert "init.weights: " in refused(InitConfig(weights=str(tmp_path)))
    assert "set init.weights" in refused(InitConfig(expert=Expert.low))
    assert "give no expert" in refused(InitConfig(weights=str(folder), expert=Expert.low))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert "cannot be read" in refused(InitConfig(weights=str(folder)))


def test_an_expert_has_its_own_noise(folder: Path) -> None:
    save_wan(VideoDiT(SMALL), folder / "transformer_2")
    (folder / "model_index.json").write_text('{"boundary_ratio": 0.875}')
    path = str(folder)
    assert "init.expert=high or init.expert=low" in refused(InitConfig(weights=path))
    high, low = TimestepConfig(low=0.875), TimestepConfig(high=0.875)
    for expert, others, fix in (
        (Expert.high, low, "set diffusion.timesteps.low=0.875 diffusion.timesteps.high=1"),
        (Expert.low, high, "set diffusion.timesteps.low=0 diffusion.timesteps.high=0.875"),
    ):
        for drawn in (TimestepConfig(), others):
            with pytest.raises(ConfigError) as caught:
                check_initial(InitConfig(path, expert), SMALL, drawn)
            assert str(caught.value).endswith(fix)
    check_initial(InitConfig(path, Expert.high), SMALL, TimestepConfig(low=0.875))
    check_initial(InitConfig(path, Expert.low), SMALL, TimestepConfig(high=0.9))


def test_an_expert_samples_no_prompts_alone() -> None:
    check_prompts(InitConfig("x", Expert.low), [])
    check_prompts(InitConfig("x"), ["a"])
    with pytest.raises(ConfigError, match=r"validation\.prompts would be sampled with the expert of low noise alone"):
        check_prompts(InitConfig("x", Expert.low), ["a"])


def test_nothing_of_the_folder_is_read_but_its_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> torch.Tensor:
        raise AssertionError("a check reads no weights")

    monkeypatch.setattr("sora_train.models.wan_weights.WanWeights.read", read)
    check_initial(InitConfig(weights=str(folder)), SMALL, ALL)
