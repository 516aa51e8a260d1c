"""From a Wan folder to a trained run, its export and its samples, by the commands of the README, on a tiny folder."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_folder import random_model, save_pipeline, save_shards, settings_of, tiny_model

from sora_train.config.root import TrainConfig, build_config
from sora_train.export import export_weights
from sora_train.generation import Experts
from sora_train.models.video_dit import VideoDiT
from sora_train.models.wan_weights import load_wan
from sora_train.sample import open_run
from sora_train.training.checkpoint_reading import latest_checkpoint, load_weights

pytestmark = pytest.mark.distributed  # one process of training, whose start compiles as those of several do
diffusers = pytest.importorskip("diffusers")

MODEL = tiny_model()
SMALL = [
    *settings_of(MODEL),
    "text_encoder.max_tokens=16",
    "data.tokens_per_step=120",
    "data.max_tokens_per_pack=120",
    "data.size.max_pixels=6400",
    "data.size.max_frames=9",
    "data.held_out_fraction=0",
    "data.workers=0",
    "parallel.precision=fp32",
    "validation.evaluate_every=0",
    "validation.height=16",
    "validation.width=16",
    "validation.frames=5",
    "tracking.wandb=disabled",
    "optim.weight_decay=0",
    "threads=1",
]
STANDING_STILL = "optim.learning_rate=1e-30"  # too small to change any weight


def train(wan: Path, shards: Path, run_dir: Path, *arguments: str, experiment: str = "wan2.1_t2v_1.3b") -> str:
    settings = [f"experiment={experiment}", f"init.weights={wan}", f"data.shards={shards}", f"run_dir={run_dir}"]
    command = [sys.executable, "-m", "sora_train.train", *settings, *SMALL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("folder") / "wan")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def run_dir(wan: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps from the folder, at ZeRO-2."""
    folder = tmp_path_factory.mktemp("run") / "run"
    said = train(wan, shards, folder, STANDING_STILL, "steps=2")
    number = sum(parameter.numel() for parameter in VideoDiT(MODEL).parameters())
    assert f"weights: {number:,} parameters of {wan}/transformer" in said
    return folder


def weights_of(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    model = VideoDiT(MODEL)
    load_weights(latest_checkpoint(folder), model, kind)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["master", "ema"])
def test_a_run_starts_from_the_folder_bitwise(run_dir: Path, wan: Path, kind: str) -> None:
    """Two steps of a length that no weight feels leave what it started from."""
    started = weights_of(run_dir, kind)
    for name, parameter in load_wan(wan).named_parameters():
        assert torch.equal(started[name], parameter), name


def test_a_run_that_goes_on_has_its_own_weights(run_dir: Path, wan: Path, shards: Path, tmp_path: Path) -> None:
    """The transformer's folder is not even there."""
    shutil.copytree(run_dir, tmp_path / "run")
    (wan / "transformer").rename(wan / "elsewhere")
    try:
        said = train(wan, shards, tmp_path / "run", STANDING_STILL, "steps=3")
    finally:
        (wan / "elsewhere").rename(wan / "transformer")
    assert f"init.weights={wan} is not read: going on from the checkpoint of step 2" in said
    assert "finished after 3 steps" in said


def test_its_export_is_the_folder_again(run_dir: Path, wan: Path, tmp_path: Path) -> None:
    line = export_weights(run_dir, tmp_path / "out")
    assert "averaged weights after step 2, for diffusers' WanTransformer3DModel" in line
    theirs, exported = (
        diffusers.WanTransformer3DModel.from_pretrained(folder).state_dict()
        for folder in (wan / "transformer", tmp_path / "out")
    )
    assert theirs.keys() == exported.keys()
    assert all(torch.equal(theirs[name], exported[name]) for name in theirs)


@pytest.mark.parametrize("expert", ["low", "high"])
def test_an_expert_is_sampled_with_the_other_of_its_folder(
    expert: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the run had been of one of two."""
    pipeline = save_pipeline(tmp_path / "a14b", boundary=0.875)

    def as_expert(schema: type[TrainConfig], values: dict[str, Any]) -> TrainConfig:
        return build_config(schema, {**values, "init": {"weights": str(pipeline), "expert": expert}})

    monkeypatch.setattr("sora_train.sample.build_config", as_expert)
    model = open_run(run_dir, torch.device("cpu")).model
    assert isinstance(model, Experts)
    assert model.boundary == 0.875
    trained, other = (model.low, model.high) if expert == "low" else (model.high, model.low)
    assert torch.equal(trained.proj_out.weight, weights_of(run_dir, "ema")["proj_out.weight"])
    assert torch.equal(other.proj_out.weight, random_model(MODEL, 0 if expert == "low" else 1).proj_out.weight)
