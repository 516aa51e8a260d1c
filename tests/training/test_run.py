"""What a run refuses, in one line, before a device is touched."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sora_train.config.limits import POSITIVE, RANGES
from sora_train.config.root import ConfigError, TrainConfig, build_config, known_keys, load_config, save_config
from sora_train.data.schema import DatasetManifest, ShardEntry
from sora_train.training import run
from sora_train.training.checkpoint_reading import checkpoints_of
from sora_train.training.fragment_files import FORMAT_VERSION, MANIFEST, digest

CHANNELS = {"in_channels": 96, "out_channels": 96}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    manifest = DatasetManifest((ShardEntry("shard-000000.tar", 10, "ab" * 32, 1),))
    (folder / "dataset.json").write_text(manifest.to_json())
    return folder


@pytest.fixture
def build(shards: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def builder(**values: Any) -> TrainConfig:
        data = {"shards": str(shards), **values.pop("data", {})}
        model = {**CHANNELS, **values.pop("model", {})}
        return build_config(TrainConfig, {"run_dir": str(tmp_path / "run"), "data": data, "model": model, **values})

    return builder


def save_checkpoint_of(config: TrainConfig, step: int = 5, before: tuple[str, ...] = ()) -> None:
    """`before`: settings that there were not yet."""
    folder = Path(config.run_dir) / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": [], **run.facts(config)}
    for section, _, name in (key.partition(".") for key in before):
        if name:
            del manifest["config"][section][name]
        else:
            del manifest["config"][section]
    manifest["sha256"] = digest(json.loads(json.dumps(manifest)))
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"in_channels": 16}}, "model.in_channels=16, but codec=wavelet has 96 channels"),
        ({"model": {"width": 100, "heads": 3}}, "model.width=100"),
        ({"parallel": {"zero_stage": 4}}, "parallel.zero_stage=4: choose 0 to 3"),
        ({"threads": -1}, "threads=-1: choose 0 or more"),
        ({"model": {"heads": 0}}, "model.heads=0: choose 1 or more"),
        ({"optim": {"learning_rate": -1.0}}, "optim.learning_rate=-1.0: choose more than 0"),
        ({"optim": {"learning_rate": math.nan}}, "optim.learning_rate=nan"),
        ({"optim": {"beta1": 1.0}}, "optim.beta1=1"),
        ({"diffusion": {"timesteps": {"shift": 0.0}}}, "diffusion.timesteps.shift=0.0"),
        ({"validation": {"prompts": ["a"], "height": 63}}, "height=63 is not a multiple of 8"),
        ({"data": {"captions": {"weights": {"recaption/shrt": 1.0}}}}, "the kinds are"),
        ({"data": {"workers": -1}}, "data.workers=-1: choose 0 or more"),
        ({"data": {"held_out_fraction": 2.0}}, "data.held_out_fraction=2.0"),
        ({"steps": 0}, "steps=0: choose 1 or more"),
        ({"checkpoint": {"save_every": 0}}, "checkpoint.save_every=0"),
        ({"data": {"shards": "/nowhere"}}, "data.shards=/nowhere"),
        ({"allow_changes": ["modle"]}, "allow_changes: modle is not a setting"),
    ],
)
def test_one_line_names_field_and_value(build: Callable[..., TrainConfig], values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run.check(build(**values))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_with_the_same_settings_and_with_harmless_changes(build: Callable[..., TrainConfig]) -> None:
    save_checkpoint_of(build())
    run.check(build())
    loading = {"workers": 0, "worker_memory_gib": 8.0}
    run.check(build(steps=9, parallel={"zero_stage": 3}, data=loading, tracking={"log_every": 1}))


def test_snapshots_of_the_averages_may_be_taken_more_often_when_a_run_goes_on(
    build: Callable[..., TrainConfig],
) -> None:
    save_checkpoint_of(build(ema={"profile": "power"}))
    run.check(build(ema={"profile": "power", "snapshot_every": 7}))
    with pytest.raises(ConfigError, match=r"allow_changes=\[ema\.lengths\]"):
        run.check(build(ema={"profile": "power", "lengths": [0.05, 0.2]}))


def test_other_settings_are_refused_with_the_difference_and_can_be_allowed_by_name(
    build: Callable[..., TrainConfig],
) -> None:
    save_checkpoint_of(build())
    changed = {"optim": {"learning_rate": 0.5}, "seed": 3}
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: 0\.0001 -> 0\.5; seed: 0 -> 3"):
        run.check(build(**changed))
    with pytest.raises(ConfigError, match="seed: 0 -> 3"):
        run.check(build(**changed, allow_changes=["optim.learning_rate"]))
    run.check(build(**changed, allow_changes=["optim.learning_rate", "seed"]))


def test_a_run_of_before_a_setting_existed_goes_on_as_by_its_default(build: Callable[..., TrainConfig]) -> None:
    save_checkpoint_of(build(), before=("init", "optim.kind", "ema.lengths", "ema.profile", "data.datasets"))
    run.check(build())
    with pytest.raises(ConfigError, match=r"\(optim\.kind: 'adamw' -> 'muon'\)"):
        run.check(build(optim={"kind": "muon"}))


def test_settings_of_data_sets_are_no_lack_of_data_sets(build: Callable[..., TrainConfig], shards: Path) -> None:
    named = {"data": {"shards": "", "datasets": {"main": {"shards": str(shards)}}}}
    save_checkpoint_of(build(**named))
    run.check(build(**named))


def test_checkpoints_that_would_not_be_found_are_not_begun_anew(
    build: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    save_checkpoint_of(build())
    other = {"checkpoint": {"folder": str(tmp_path / "other")}}
    with pytest.raises(ConfigError, match=r"checkpoint\.folder=.*other, but the checkpoints of .* are in .*run/check"):
        run.check(build(**other))
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "other")
    run.check(build(**other))
    save_config(build(**other), tmp_path / "run" / "config.yaml")
    with pytest.raises(ConfigError, match=r"checkpoint\.folder=\(empty\), but the checkpoints of .* are in .*other"):
        run.check(build())


def test_the_checkpoints_of_a_run_are_where_its_config_says_or_where_it_was_moved(
    build: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run_dir, other = tmp_path / "run", tmp_path / "other"
    save_checkpoint_of(build())
    save_config(build(checkpoint={"folder": str(other)}), run_dir / "config.yaml")
    assert checkpoints_of(run_dir) == run_dir / "checkpoints"
    save_checkpoint_of(build(), step=9)
    other.mkdir()
    (run_dir / "checkpoints" / "step-00000009").rename(other / "step-00000009")
    assert checkpoints_of(run_dir) == other


def test_a_run_directory_is_one_runs(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from sora_train.training.run import lock\n"
        "print(lock(Path(sys.argv[1])), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "None\n"
        problem = run.lock(tmp_path, patience_seconds=0)
        assert problem == f"run_dir={tmp_path} is being trained by another process: end that, or choose another run_dir"
        first.kill()
    assert run.lock(tmp_path) is None


def test_packs_may_be_cut_otherwise_when_a_run_goes_on(build: Callable[..., TrainConfig]) -> None:
    save_checkpoint_of(build())
    run.check(build(data={"max_tokens_per_pack": 4096}))


def test_a_damaged_manifest_does_not_keep_a_run_from_the_checkpoint_before(build: Callable[..., TrainConfig]) -> None:
    save_checkpoint_of(build(), step=5)
    save_checkpoint_of(build(), step=9)
    newest = Path(build().run_dir) / "checkpoints" / "step-00000009" / MANIFEST
    newest.write_text(newest.read_text()[:-3])
    run.check(build())
    with pytest.raises(ConfigError, match="seed: 0 -> 3"):
        run.check(build(seed=3))


def test_a_run_directory_that_cannot_be_one_is_refused(
    build: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for run_dir in ("file", "file/run"):
        with pytest.raises(ConfigError, match="file is a file: choose another run_dir"):
            run.check(build(run_dir=str(tmp_path / run_dir)))
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="is not writable"):
        run.check(build())


def test_limits_name_settings_that_exist(build: Callable[..., TrainConfig]) -> None:
    assert {*RANGES, *POSITIVE} <= set(known_keys(TrainConfig))


def test_other_data_is_refused(build: Callable[..., TrainConfig], shards: Path) -> None:
    save_checkpoint_of(build())
    other = DatasetManifest((ShardEntry("shard-000000.tar", 10, "cd" * 32, 1),))
    (shards / "dataset.json").write_text(other.to_json())
    with pytest.raises(ConfigError, match="other data"):
        run.check(build())
    run.check(build(allow_changes=["data"]))


def test_a_data_set_may_be_added_to_a_run(
    build: Callable[..., TrainConfig], shards: Path, tmp_path: Path
) -> None:
    save_checkpoint_of(build())
    other = tmp_path / "other"
    other.mkdir()
    (other / "dataset.json").write_text(DatasetManifest((ShardEntry("b.tar", 10, "cd" * 32, 1),)).to_json())
    grown = {
        "shards": "",
        "datasets": {"main": {"shards": str(shards)}, "new": {"shards": str(other), "weight": 0.0}},
        "stages": [{"start_step": 100, "weights": {"new": 1.0}}],
    }
    with pytest.raises(ConfigError, match=r"allow_changes=\[data\.datasets,data\.stages\]"):
        run.check(build(data=grown))
    run.check(build(data=grown, allow_changes=["data.datasets", "data.stages"]))
    # `data.shards` was the data set `main`; another folder under that name holds other data.
    swapped = {"shards": "", "datasets": {"main": {"shards": str(other)}}}
    with pytest.raises(ConfigError, match=r"data\.datasets: main holds other data"):
        run.check(build(data=swapped, allow_changes=["data.datasets"]))
    save_checkpoint_of(build(data=grown), step=6)
    moved = shards.rename(tmp_path / "moved")
    run.check(build(data={**grown, "datasets": {**grown["datasets"], "main": {"shards": str(moved)}}}))


def test_the_config_file_of_a_run_reads_back_equal(build: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = build(model={"text": {"kind": "encoder"}})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config
