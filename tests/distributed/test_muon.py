"""Muon under ZeRO against one process of torch's, and runs that are resumed on other ranks and stages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("muon_cases.py")


def run_world(ranks: int, folder: Path, *names: str) -> list[dict[str, Any]]:
    out = folder / f"results-{ranks}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(CASES)]
    done = subprocess.run([*command, str(folder), str(out), *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results: list[dict[str, Any]] = json.loads(out.read_text())
    return results


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Results by number of ranks, in the order in which they take up each other's runs."""
    folder = tmp_path_factory.mktemp("worlds")
    return {ranks: run_world(ranks, folder, "equals_torch") for ranks in (2, 3, 1)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_weights_equal_those_of_torchs_muon(worlds: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    results = [result for result in worlds[ranks] if result["case"] == "equals_torch"]
    assert [result["stage"] for result in results] == [0, 1, 2, 3]
    for result in results:
        assert result["whole"]["rounds"] == 1, "all matrices fit in a buffer"
        assert result["rounds"]["rounds"] >= 3, "and here they do not"
        for way in ("whole", "rounds"):
            assert result[way]["loss"] < 1e-6, result
            assert result[way]["weights"] < 1e-5, result
