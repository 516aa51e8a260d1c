"""Every YAML composes to its schema, and mistakes become one line."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import sora_train.config.data
from sora_train.config.command import check_arguments, fail
from sora_train.config.curation import CurationConfig
from sora_train.config.data import Media, dataset_configs
from sora_train.config.launch import SubmitConfig
from sora_train.config.root import ConfigError, TrainConfig, build_config, schema_name, writable
from sora_train.config.world import WorldConfig
from sora_train.data.schema import IndexRow
from sora_train.data.size import clip_size, token_stride
from sora_train.encoders.video_codec import codec_shape
from sora_train.models.inputs import patch_of
from sora_train.models.patchify import num_tokens

CONFIGS = Path(__file__).parents[2] / "configs"
ROOTS: dict[str, tuple[type, list[str]]] = {
    "train": (TrainConfig, ["data.shards=x"]),
    "submit": (SubmitConfig, ["data.shards=x"]),
    "curate": (CurationConfig, ["input=a", "output=b"]),
    "world": (WorldConfig, ["output=a", "clips=1"]),
}


@pytest.fixture(autouse=True)
def schemas() -> None:
    for schema, _ in ROOTS.values():
        ConfigStore.instance().store(name=schema_name(schema), node=writable(schema))


def group(name: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / name).glob("*.yaml"))


CHOICES = [
    *(("train", f"model={name}") for name in group("model")),
    *(("train", f"codec={name}") for name in group("codec")),
    *(("train", f"experiment={name}") for name in group("experiment")),
    *(("submit", f"cluster={name}") for name in group("cluster")),
]


@pytest.mark.parametrize("root", sorted(ROOTS))
def test_every_root_composes(root: str) -> None:
    schema, needed = ROOTS[root]
    check_arguments(needed, schema, root)


@pytest.mark.parametrize(("root", "choice"), CHOICES)
def test_every_choice_composes(root: str, choice: str) -> None:
    schema, needed = ROOTS[root]
    check_arguments([*needed, choice, "codec.path=x", "init.weights=x"], schema, root)


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (1920, 1080), (1000, 1000), (720, 1700)])
def test_shipped_sizes_fit_the_shipped_pack(height: int, width: int) -> None:
    """A folder of ordinary videos trains with the defaults."""
    config = build_config(TrainConfig, {"data": {"shards": "x"}, "model": {"in_channels": 96, "out_channels": 96}})
    shape = codec_shape(config.codec)
    row = IndexRow("a", "mp4", 0, 0, 600, 30.0, height, width, 20.0, "ab")
    size = clip_size(row, config.data.size, token_stride(config.model, shape))
    latents = shape.latent_shape(size.num_frames, size.height, size.width)
    assert num_tokens(latents, patch_of(config.model)) <= config.data.max_tokens_per_pack


def test_a_curriculum_on_several_data_sets_composes() -> None:
    """The example of sora_train/config/data.py, and what the command line changes of it."""
    documentation = str(sora_train.config.data.__doc__)
    example = OmegaConf.create(textwrap.dedent(documentation[documentation.index("    data:\n") :]))
    data = build_config(TrainConfig, example).data
    assert {name: item.media for name, item in data.datasets.items()} == {"pictures": Media.any, "films": Media.video}
    assert [stage.start_step for stage in data.stages] == [20000, 60000]
    assert data.stages[0].weights == {"pictures": 0.2, "films": 0.8}
    assert (data.stages[0].size.max_frames, data.stages[0].size.max_pixels) == (81, None)
    sets = "+data.datasets={films: {shards: x, media: video}, pictures: {shards: y}}"
    with hydra.initialize_config_module("sora_train.configs", version_base="1.3"):
        data = build_config(TrainConfig, hydra.compose("train", ["experiment=curriculum", sets])).data
    assert data.stages[1].size.max_pixels == 921600
    assert list(dataset_configs(data)) == ["films", "pictures"]
    mistakes = {
        "data.shards=x and data.datasets=a are both set": {"shards": "x", "datasets": {"a": {"shards": "y"}}},
        "data.datasets.a.shards is not set": {"datasets": {"a": {}}},
        "media: Invalid value 'film'": {"datasets": {"a": {"shards": "y", "media": "film"}}},
        "start_step is not set": {"shards": "x", "stages": [{"weights": {"a": 1.0}}]},
        "max_pixel is not a setting": {"shards": "x", "stages": [{"start_step": 1, "size": {"max_pixel": 1}}]},
    }
    for message, values in mistakes.items():
        with pytest.raises(ConfigError, match=message):
            build_config(TrainConfig, {"data": values})


def test_what_an_experiment_sets_wins_over_the_root() -> None:
    with hydra.initialize_config_module("sora_train.configs", version_base="1.3"):
        values = hydra.compose("train", ["data.shards=x", "experiment=demo", "steps=7"])
    config = build_config(TrainConfig, values)
    assert config.name == "demo"
    assert config.run_dir == "runs/demo"
    assert config.steps == 7, "the command line wins over both"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.shardss=x"], "data.shardss is not a setting: did you mean data.shards?"),
        (["+foo=1", "data.shards=x"], "foo is not a setting"),
        ([], "data.shards is not set: pass data.shards=VALUE"),
        (["data.shards=x", "steps=many"], "steps: Value 'many'"),
        (["data.shards=x", "parallel.precision=fp4"], "parallel.precision: Invalid value 'fp4'"),
        (["data.shards=x", "model=huge"], "model/huge"),
        (["data.shards=x", "model=tiny,s"], "add -m"),
        (["data.shards=x", "--config-name", "nope"], "nope"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_arguments(arguments, TrainConfig, "train")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_prints_the_line_and_leaves_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sora_train.train", "data.shardss=x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: data.shardss is not a setting: did you mean data.shards?"
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(("local_rank", "line"), [("0", "error: x=1"), ("1", "error on local rank 1: x=1")])
def test_every_host_says_what_is_wrong_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_rank: str, line: str
) -> None:
    """Shards may be missing on the second host alone, or on a single rank, which speaks unless it is ended first."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit):
        fail(ConfigError("x=1"))
    assert capsys.readouterr().err.splitlines() == [line]
    assert bool(waited) == (local_rank != "0")
