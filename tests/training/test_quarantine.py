"""The ledger of clips that could not be read."""

import json
from pathlib import Path

import pytest

from sora_train.config.root import ConfigError
from sora_train.data.pack import Failure
from sora_train.training.fragment_files import FORMAT_VERSION, LEDGER, MANIFEST, digest, entry_of
from sora_train.training.quarantine import Quarantine, read_ledger, restore_ledger

FIRST, SECOND = Failure("clip-1", "a.tar", "frame_count"), Failure("clip-2", "a.tar", "decode")


def places(run_dir: Path) -> list[tuple[int, str, str]]:
    return [(row["step"], row["key"], row["reason"]) for row in read_ledger(run_dir / LEDGER)]


def save_ledger(run_dir: Path, step: int) -> Path:
    """As a checkpoint has it."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / LEDGER).write_bytes((run_dir / LEDGER).read_bytes())
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": [entry_of(folder / LEDGER)]}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": digest(manifest)}))
    return folder / LEDGER


def test_a_resumed_run_masks_what_failed_at_the_same_steps(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 0.05)
    assert not quarantine.masked
    quarantine.add(3, [FIRST, SECOND])
    quarantine.add(90, [FIRST])  # an epoch later
    assert Quarantine(tmp_path, 0.05).masked == {
        3: {("a.tar", "clip-1"), ("a.tar", "clip-2")},
        90: {("a.tar", "clip-1")},
    }


def test_a_line_cut_off_by_a_kill_loses_no_other(tmp_path: Path) -> None:
    Quarantine(tmp_path, 0.05).add(3, [FIRST, SECOND])
    ledger = tmp_path / LEDGER
    ledger.write_text(ledger.read_text()[:-20])
    resumed = Quarantine(tmp_path, 0.05)
    assert resumed.masked == {3: {("a.tar", "clip-1")}}
    resumed.add(3, [SECOND])  # not masked, so it failed again
    assert places(tmp_path) == [(3, "clip-1", "frame_count"), (3, "clip-2", "decode")]


def test_a_lost_ledger_comes_back_from_the_checkpoint_and_a_longer_one_stays(tmp_path: Path) -> None:
    Quarantine(tmp_path, 0.05).add(3, [FIRST])
    save_ledger(tmp_path, 5)
    Quarantine(tmp_path, 0.05).add(7, [SECOND])  # after the checkpoint: known when step 7 is done again
    restore_ledger(tmp_path, tmp_path / "checkpoints")
    assert places(tmp_path) == [(3, "clip-1", "frame_count"), (7, "clip-2", "decode")]
    (tmp_path / LEDGER).unlink()
    restore_ledger(tmp_path, tmp_path / "checkpoints")
    assert places(tmp_path) == [(3, "clip-1", "frame_count")]


def test_a_damaged_ledger_is_passed_over(tmp_path: Path) -> None:
    Quarantine(tmp_path, 0.05).add(3, [FIRST])
    save_ledger(tmp_path, 5)
    newest = save_ledger(tmp_path, 9)
    (tmp_path / LEDGER).unlink()
    newest.write_bytes(newest.read_bytes().replace(b": 3", b"; 3"))
    restore_ledger(tmp_path, tmp_path / "checkpoints")
    assert places(tmp_path) == [(3, "clip-1", "frame_count")]


def test_too_many_bad_clips_stop_the_run_with_a_summary(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 0.05)
    quarantine.add(0, [FIRST, SECOND])
    quarantine.add(0, [SECOND])  # shared with another rank, which could not read it either
    quarantine.add(1, [FIRST])
    quarantine.check(failed=3, clips=20)  # too few to tell
    quarantine.check(failed=2, clips=75)
    with pytest.raises(ConfigError, match=r"6 of 107 clips .*frame_count 2, decode 1.*max_bad_share=0.05") as caught:
        quarantine.check(failed=1, clips=6)
    assert "\n" not in str(caught.value)


def test_lines_are_whole_json(tmp_path: Path) -> None:
    Quarantine(tmp_path, 0.05).add(3, [FIRST])
    row = json.loads((tmp_path / LEDGER).read_text())
    assert row == {"key": "clip-1", "shard": "a.tar", "reason": "frame_count", "step": 3}
