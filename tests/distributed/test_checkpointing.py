"""Ranks that save together while training goes on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("checkpoint_cases.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpointing")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(CASES)]
    done = subprocess.run(
        [*command, str(folder), str(folder / "out.json")], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


def of(results: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    found = [result for result in results if result["case"] == case]
    assert [result["stage"] for result in found] == [0, 1, 2, 3]
    return found


def test_what_a_slow_rank_writes_is_the_step_s_while_training_goes_on(results: list[dict[str, Any]]) -> None:
    for result in of(results, "trains_while_a_rank_writes_slowly"):
        assert result["went_on"] >= 3, result
        assert result["same"], "saving changes nothing"
        assert result["written"], "every checkpoint holds its own step, on every rank"


def test_a_full_disk_of_one_rank_stops_all_after_the_same_step(results: list[dict[str, Any]]) -> None:
    for result in of(results, "one_rank_cannot_write"):
        assert result["told"][0] == result["told"][1], result
        assert "step 2 could not be written: rank 1: [Errno 28] No space left on device" in result["told"][0]
        assert "step-00000001 is the last good one" in result["told"][0]
        assert result["stopped_at"][0] == result["stopped_at"][1] < 2000, result
        assert result["names"] == ["latest", "step-00000001"], "nothing partial is left"
        assert result["again"] == 1


def test_what_is_not_finite_on_one_rank_is_saved_by_none(results: list[dict[str, Any]]) -> None:
    for result in of(results, "one_rank_is_not_finite"):
        assert result["told"][0] == result["told"][1], result
        assert "is not finite after step 1" in result["told"][0], result
        assert result["names"] == [], result


def test_behind_a_url_a_run_resumes_bitwise(results: list[dict[str, Any]]) -> None:
    for result in of(results, "resumes_behind_a_url"):
        assert result["started_at"] == 2, result
        assert result["same"], result
        assert not result["elsewhere"], result


def test_a_signal_while_saving_loses_no_step(results: list[dict[str, Any]]) -> None:
    for result in of(results, "stops_while_saving"):
        assert result["stopped_at"] == [result["again"]] * 2, result
        assert result["found"] == [f"step-{result['again']:08d}", "step-00000002"], result
