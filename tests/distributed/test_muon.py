"""Muon under ZeRO against one process of torch's, and runs that are resumed on other ranks and stages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from muon_cases import EMA, LEG, SHAPES, STAGES, off, reference
from safetensors.torch import load_file

from sora_train.training.ema_snapshots import rebuild

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]  # a world of many cases

CASES = Path(__file__).with_name("muon_cases.py")


ALL = ("equals_torch", "continues", "resumes_bitwise", "refuses")


def run_world(ranks: int, folder: Path, *names: str) -> list[dict[str, Any]]:
    out = folder / f"results-{ranks}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(CASES)]
    done = subprocess.run([*command, str(folder), str(out), *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results: list[dict[str, Any]] = json.loads(out.read_text())
    return results


class Worlds:
    """Results by number of ranks; worlds take up each other's runs, so one is started after those before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results: dict[int, list[dict[str, Any]]] = {}

    def __getitem__(self, ranks: int) -> list[dict[str, Any]]:
        for number in STAGES:
            if number not in self._results:
                self._results[number] = run_world(number, self.folder, *(ALL if number == 2 else ALL[:2]))
            if number == ranks:
                break
        return self._results[ranks]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(tmp_path_factory.mktemp("worlds"))


def of(results: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    found = [result for result in results if result["case"] == case]
    assert [result["number"] for result in found] == [0, 1, 2, 3]
    return found


@pytest.mark.parametrize("ranks", list(STAGES))
def test_weights_and_averages_equal_those_of_torchs_muon(worlds: Worlds, ranks: int) -> None:
    for result in of(worlds[ranks], "equals_torch"):
        assert result["whole"]["rounds"] == 1, "all matrices fit in a buffer"
        assert result["rounds"]["rounds"] >= 3, "and here they do not"
        for way in ("whole", "rounds"):
            assert result[way]["loss"] < 1e-6, result
            assert result[way]["weights"] < 1e-5, result


def test_resumed_equals_uninterrupted_bitwise(worlds: Worlds) -> None:
    for result in of(worlds[2], "resumes_bitwise"):
        for precision in ("fp32", "bf16"):
            found = result[precision]
            assert found["started_at"] == 3, result
            assert found["losses"], result
            assert found["different"] == [], result
            assert found["kinds"] == ["ema", "ema-0.05", "exp_avg", "exp_avg_sq", "master", "momentum"]


def test_a_run_goes_over_ranks_and_stages(worlds: Worlds) -> None:
    for leg, (ranks, stages) in enumerate(STAGES.items()):
        for result in of(worlds[ranks], "continues"):
            assert result["started_at"] == leg * LEG
            assert result["stage"] == stages[result["number"]]
            assert result["loss"] < 1e-6, result
            assert result["weights"] < 1e-5, result


@pytest.mark.parametrize("number", range(4))
def test_snapshots_of_all_worlds_give_an_average_that_was_not_kept(
    worlds: Worlds, tmp_path: Path, number: int
) -> None:
    assert worlds[1], "the last of them"
    rebuild(worlds.folder / f"continues-{number}", tmp_path / "out", 0.08)
    found = load_file(tmp_path / "out" / "rank-00000.safetensors")
    weights = {name: found[f"ema/{name}@0"].view(shape) for name, shape in SHAPES.items()}
    _, (_, *averages) = reference(3 * LEG, [0.08, *EMA.lengths])
    assert off([weights], averages[:1]) < 1e-3
    assert off([weights], averages[1:2]) > 3e-3, "neighbours are told apart"


def test_the_states_of_another_optimizer_are_not_taken(worlds: Worlds) -> None:
    for result in of(worlds[2], "refuses"):
        assert "holds no exp_avg/blocks.0.up.weight" in result["refusal"]
