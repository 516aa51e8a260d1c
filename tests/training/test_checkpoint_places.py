"""Which checkpoints go, which formats are read, and checkpoints behind a URL."""

import errno
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from test_checkpoint_async import checkpoints, full
from torch import nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.root import ConfigError, TrainConfig, build_config, save_config
from sora_train.training import checkpoint as module
from sora_train.training import fragment_files
from sora_train.training.checkpoint import Checkpoints, TrainState
from sora_train.training.checkpoint_folders import beyond_retention, complete_checkpoints, reading
from sora_train.training.checkpoint_reading import latest_checkpoint, load_weights
from sora_train.training.fragment_files import MANIFEST, DamagedCheckpointError, digest, verify
from sora_train.training.places import RemoteFolder
from sora_train.training.writers import SaveError


def save(saved: Checkpoints, *steps: int) -> None:
    for step in steps:
        saved.save(TrainState(step))
    saved.wait()


def steps(saved: Checkpoints) -> list[int]:
    return [int(path.name[5:]) for path in complete_checkpoints(saved.folder)]


def edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": digest(manifest)}))


def test_retention_by_count_age_and_steps() -> None:
    saved = [(step, (100 - step) * 0.5) for step in range(10, 101, 10)]  # 100: now; 10: 45 hours ago
    assert beyond_retention(saved, CheckpointConfig(keep=0)) == []
    assert beyond_retention(saved, CheckpointConfig(keep=8)) == [20, 10]
    assert beyond_retention(saved, CheckpointConfig(keep=1, keep_hours=20)) == [60, 50, 40, 30, 20, 10]
    assert beyond_retention(saved, CheckpointConfig(keep=2, keep_every=40)) == [70, 60, 50, 30, 20, 10]
    both = CheckpointConfig(keep=1, keep_hours=10.5, keep_every=30)
    assert beyond_retention(saved, both) == [70, 50, 40, 20, 10]


def test_the_newest_is_never_beyond_retention() -> None:
    draw = random.Random(0)
    for _ in range(300):
        saved = [(step, draw.uniform(0, 99)) for step in draw.sample(range(1000), draw.randint(1, 9))]
        hours, every = draw.choice([0, 50]), draw.choice([0, 7])
        config = CheckpointConfig(keep=draw.randint(1, 3), keep_hours=hours, keep_every=every)
        gone = beyond_retention(saved, config)
        newest = sorted((step for step, _ in saved), reverse=True)[: config.keep]
        assert not set(gone) & set(newest)
        assert beyond_retention([item for item in saved if item[0] not in gone], config) == []


def test_old_ones_go_but_those_of_every_so_many_steps_stay(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, keep=1, keep_every=20)
    save(saved, 10, 20, 30, 40, 50)
    assert steps(saved) == [50, 40, 20]
    saved = checkpoints(tmp_path / "young", keep=1, keep_hours=1)
    save(saved, 10, 20)
    edit(saved.folder / "step-00000010", saved_at=0.0)
    save(saved, 30)
    assert steps(saved) == [30, 20]


def test_only_what_a_run_wrote_is_removed(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, keep=1)
    save(saved, 1)
    foreign = saved.folder / "step-00000000"
    foreign.mkdir()
    (foreign / MANIFEST).write_text('{"precious": true}')
    elsewhere = tmp_path / "elsewhere"
    (saved.folder / "step-00000001").rename(elsewhere)
    (saved.folder / "step-00000001").symlink_to(elsewhere)
    (saved.folder / "notes").mkdir()
    edit(elsewhere)
    save(saved, 2, 3)
    names = sorted(path.name for path in saved.folder.iterdir())
    assert names == ["latest", "notes", "step-00000000", "step-00000001", "step-00000003"]
    assert (elsewhere / MANIFEST).exists()


def test_a_checkpoint_of_another_name_than_its_step_is_not_ours_to_remove(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, keep=1)
    save(saved, 2)
    (saved.folder / "step-00000002").rename(saved.folder / "step-00000001")
    save(saved, 3, 4)
    assert steps(saved) == [4, 1]


def test_what_is_being_read_is_removed_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    saved = checkpoints(tmp_path, keep=1)
    save(saved, 1)
    with reading(saved.folder / "step-00000001"):
        save(saved, 2)
        assert steps(saved) == [2, 1]
        verify(saved.folder / "step-00000001")
    assert "is being read" in caplog.text
    save(saved, 3)
    assert steps(saved) == [3]


def test_none_goes_while_the_newest_is_not_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoints(tmp_path, keep=1)
    save(saved, 1)
    retain = module.apply_retention

    def loses_a_file(store: Any, config: CheckpointConfig) -> None:
        (saved.folder / "step-00000002" / "rank-00000.safetensors").write_bytes(b"")
        retain(store, config)

    monkeypatch.setattr(module, "apply_retention", loses_a_file)
    save(saved, 2)
    assert steps(saved) == [2, 1]


def test_an_old_one_of_another_format_stays_and_stops_nothing(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, keep=1)
    save(saved, 1)
    edit(saved.folder / "step-00000001", format_version=99)
    save(saved, 2, 3)
    assert steps(saved) == [3, 1]


def test_without_locks_checkpoints_are_read_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("sora_train.training.checkpoint_folders.fcntl.flock", flock)
    saved = checkpoints(tmp_path, keep=1)
    save(saved, 1, 2)
    assert steps(saved) == [2]
    assert load_weights(saved.folder / "step-00000002", nn.Linear(3, 2, bias=False)) == 2


def test_what_others_write_there_stays(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path)
    for name in (".writing-export", ".removing-old"):
        (saved.folder / name).mkdir(parents=True)
    save(saved, 1)
    assert {".writing-export", ".removing-old"} < {path.name for path in saved.folder.iterdir()}


def test_a_removal_that_fails_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved = checkpoints(tmp_path, keep=1)

    def refuses(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "apply_retention", refuses)
    save(saved, 1, 2)
    assert steps(saved) == [2, 1]
    assert "could not be removed" in caplog.text


def test_what_a_killed_save_or_removal_left_goes_with_the_next(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path)
    save(saved, 1)
    for name in (".writing-step-00000003", ".removing-step-00000000"):
        (saved.folder / name).mkdir()
        (saved.folder / name / "rank-00000.safetensors").write_bytes(b"half")
    assert steps(saved) == [1]
    save(saved, 2)
    assert sorted(path.name for path in saved.folder.iterdir()) == ["latest", "step-00000001", "step-00000002"]


@pytest.mark.parametrize(("version", "line"), [(2, "reads 3 and later"), (9, "reads up to 5"), ("x", "reads up to 5")])
def test_other_formats_are_refused_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: Any, line: str
) -> None:
    monkeypatch.setattr(fragment_files, "FORMAT_VERSION", 5)
    monkeypatch.setattr(fragment_files, "OLDEST_READABLE", 3)
    monkeypatch.setattr(module, "FORMAT_VERSION", 5)
    saved = checkpoints(tmp_path)
    save(saved, 1, 2)
    edit(saved.folder / "step-00000002", format_version=version)
    for read in (saved.load_latest, lambda: latest_checkpoint(tmp_path)):
        with pytest.raises(ConfigError, match=rf"step-00000002 has format_version {version}.*{line}") as caught:
            read()
        assert "\n" not in str(caught.value)
    edit(saved.folder / "step-00000002", format_version=3)
    verify(saved.folder / "step-00000002")


# --- behind a URL


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield "memory://bucket/run" if request.param == "memory" else f"file://{tmp_path}/store"
    store = fsspec.filesystem("memory")
    if store.exists("/bucket"):
        store.rm("/bucket", recursive=True)


def test_behind_a_url_saves_load_and_verify(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "apply_loaded", lambda engine, optimizer_steps: None)  # there is no engine
    saved = checkpoints(tmp_path, folder=url, keep=2)
    (tmp_path / "quarantine.jsonl").write_text('{"step": 1, "key": "k", "shard": "s", "reason": "decode"}\n')
    save(saved, 5, 6)
    kept = saved.held[0].master.clone()
    with torch.no_grad():
        saved.held[0].master.add_(1)
    save(saved, 7)
    assert steps(saved) == [7, 6], "retention reaches there"
    assert not (tmp_path / "checkpoints").exists()
    for folder in complete_checkpoints(saved.folder):
        verify(folder)
    (saved.folder / "step-00000007" / "rank-00000.safetensors").open("wb").close()
    with pytest.raises(DamagedCheckpointError, match=r"rank-00000\.safetensors has 0 bytes"):
        verify(saved.folder / "step-00000007")
    assert saved.load_latest() == TrainState(6)
    assert torch.equal(saved.held[0].master, kept)
    save(saved, 7)  # over the damaged one
    verify(complete_checkpoints(saved.folder)[0])
    model = nn.Linear(3, 2, bias=False)
    assert load_weights(complete_checkpoints(saved.folder)[0], model, "master") == 7
    assert torch.equal(model.weight.view(-1), kept)


def test_behind_a_url_the_manifest_goes_last(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    new_file = module.new_file

    def notes(file: Any) -> Any:
        order.append(file.name)
        return new_file(file)

    for name in ("checkpoint", "checkpoint_folders"):
        monkeypatch.setattr(f"sora_train.training.{name}.new_file", notes)
    saved = checkpoints(tmp_path, folder=url)
    (tmp_path / "quarantine.jsonl").write_text("")
    save(saved, 5)
    assert order == ["rank-00000.safetensors", "quarantine.jsonl", MANIFEST]


@pytest.mark.parametrize("part", ["rank-00000", MANIFEST])
def test_behind_a_url_a_failed_save_leaves_nothing(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    saved = checkpoints(tmp_path, folder=url)
    save(saved, 5)
    for name in ("checkpoint", "checkpoint_folders"):
        monkeypatch.setattr(f"sora_train.training.{name}.new_file", full(part))
    with pytest.raises(SaveError, match=r"step-00000005 is the last good"):
        save(saved, 6)
    assert steps(saved) == [5]
    assert [path.name for path in saved.folder.iterdir()] == ["step-00000005"]


def test_behind_a_url_a_failed_removal_costs_no_checkpoint(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoreError(Exception):
        """Stores have their own."""

    def fails(*_: object) -> None:
        raise StoreError("slow down")

    saved = checkpoints(tmp_path, folder=url, keep=1)
    monkeypatch.setattr(module, "apply_retention", fails)
    with pytest.raises(SaveError, match="slow down"):
        save(saved, 5)
    verify(complete_checkpoints(saved.folder)[0])


def test_behind_a_url_a_later_one_that_could_not_be_read_is_not_lost(tmp_path: Path, url: str) -> None:
    saved = checkpoints(tmp_path, folder=url)
    save(saved, 9)
    later = saved.folder / "step-00000009"
    content = (later / MANIFEST).read_bytes()
    save(saved, 7)
    assert steps(saved) == [7]
    assert (later / f"replaced-{MANIFEST}").read_bytes() == content


def test_a_later_one_that_was_damaged_is_no_checkpoint_any_more(tmp_path: Path, url: str) -> None:
    saved = checkpoints(tmp_path, folder=url, keep=1)
    save(saved, 9)
    (saved.folder / "step-00000009" / "rank-00000.safetensors").open("wb").close()
    save(saved, 7)
    assert steps(saved) == [7]


def test_a_protocol_that_there_is_not_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.folder=nowhere://x: Protocol not known"):
        checkpoints(tmp_path, folder="nowhere://x")


def test_the_run_says_where_its_checkpoints_are(tmp_path: Path, url: str) -> None:
    config = build_config(TrainConfig, {"data": {"shards": "x"}, "checkpoint": {"folder": url}})
    save_config(config, tmp_path / "config.yaml")
    save(checkpoints(tmp_path, folder=url), 5)
    assert latest_checkpoint(tmp_path) == RemoteFolder(url) / "step-00000005"
