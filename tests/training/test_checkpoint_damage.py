"""A checkpoint that is not as it was written is refused by the name of a file, and the one before is taken; nothing in
it is ever run."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from damage import DAMAGES, NEW, build_model, damaged, write_run
from faults import ERRORS, OFFSETS, exceeds_the_system_s_limit, fails_at, is_read_only, size_of_a_save
from hostile import PAYLOADS, Planted

from sora_train.training.checkpoint_reading import latest_checkpoint, load_weights
from sora_train.training.fragment_files import DamagedCheckpointError, verify


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("pristine") / "run"
    write_run(run_dir)
    return run_dir


def test_two_ranks_in_one_process_write_what_one_reads(pristine: Path) -> None:
    folder = latest_checkpoint(pristine)
    assert folder.name == f"step-{NEW:08d}"
    verify(folder)
    model = build_model()
    assert load_weights(folder, model, "master") == NEW
    assert torch.isfinite(model.weight).all()


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_refused_by_name_and_the_one_before_is_taken(pristine: Path, tmp_path: Path, kind: str) -> None:
    first = list(DAMAGES).index(kind)
    for case in range(first, 60, len(DAMAGES)):
        assert damaged(pristine, tmp_path / str(case), case) == ""


def test_the_walk_walks_and_what_is_planted_would_run(pristine: Path, tmp_path: Path) -> None:
    planted = Planted(pristine, tmp_path)
    assert planted.walk() == ""
    assert planted.refused == [], "without a payload, nothing is refused"
    pickle.loads(planted.pickle)
    assert planted.ran.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_planted_in_a_checkpoint_or_config_runs(pristine: Path, tmp_path: Path, name: str) -> None:
    planted = Planted(pristine, tmp_path)
    PAYLOADS[name](planted)
    assert planted.walk() == ""


@pytest.mark.parametrize("error", ERRORS)
def test_a_disk_that_fails_at_any_byte_costs_that_save_alone(pristine: Path, tmp_path: Path, error: str) -> None:
    size = size_of_a_save(pristine)
    for number in range(OFFSETS):
        run_dir = tmp_path / str(number)
        shutil.copytree(pristine, run_dir, symlinks=True)
        assert fails_at(run_dir, size * number // OFFSETS, ERRORS[error]) == ""


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_limit_of_the_system_and_a_read_only_disk(pristine: Path, tmp_path: Path, limit: int) -> None:
    shutil.copytree(pristine, tmp_path / "limit", symlinks=True)
    assert exceeds_the_system_s_limit(tmp_path / "limit", limit) == ""
    shutil.copytree(pristine, tmp_path / "read-only", symlinks=True)
    assert is_read_only(tmp_path / "read-only") == ""


def test_a_link_is_refused_whatever_it_leads_to(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path / "run", symlinks=True)
    folder = tmp_path / "run" / "checkpoints" / f"step-{NEW:08d}"
    path = folder / "rank-00000.safetensors"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(DamagedCheckpointError, match="is a link, not a file"):
        verify(folder)


@pytest.mark.parametrize("name", ["../../../outside/precious", "..", ""])
def test_a_file_elsewhere_is_refused_even_if_it_is_as_the_manifest_says(
    pristine: Path, tmp_path: Path, name: str
) -> None:
    planted = Planted(pristine, tmp_path)
    planted.files(name)
    with pytest.raises(DamagedCheckpointError, match=r"no plain file name|is missing"):
        verify(planted.folder)
