"""DeepSpeed against one process of plain torch, and checkpoints against the run that was not interrupted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import DIT

from sora_train.config.parallel import ParallelConfig, Precision
from sora_train.cost.memory import num_parameters, states

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("cases.py")


def run_world(ranks: int, folder: Path, *names: str) -> list[dict[str, Any]]:
    out = folder / f"results-{ranks}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(CASES)]
    done = subprocess.run([*command, str(folder), str(out), *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results: list[dict[str, Any]] = json.loads(out.read_text())
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    names = ("equals_one_process", "resumes_bitwise", "resumes_elsewhere", "falls_back", "keeps_activations_in_any_way")
    return run_world(2, folder, *names)


def of(results: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    found = [result for result in results if result["case"] == case]
    assert len(found) == (8 if case == "resumes_bitwise" else 4), f"every stage (and precision) of {case}"
    return found


def test_loss_and_weights_equal_one_process_at_every_zero_stage(two_ranks: list[dict[str, Any]]) -> None:
    for result in of(two_ranks, "equals_one_process"):
        assert result["loss"] < 1e-6, result
        assert result["average"] < 1e-5, result


def test_resumed_equals_uninterrupted_bitwise(two_ranks: list[dict[str, Any]]) -> None:
    for result in of(two_ranks, "resumes_bitwise"):
        assert result["started_at"] == 2, result
        assert result["losses"], result
        assert result["pieces"], result


def test_another_zero_stage_resumes_without_conversion(two_ranks: list[dict[str, Any]]) -> None:
    for result in of(two_ranks, "resumes_elsewhere"):
        assert result["loss"] < 1e-6, result
        assert result["average"] < 1e-5, result


def test_damage_is_noticed_and_the_checkpoint_before_is_taken(two_ranks: list[dict[str, Any]]) -> None:
    for result in of(two_ranks, "falls_back"):
        assert result["started"] == [1, 1, 1, 1], result
        damaged = [name for name in result["kept"] if name.startswith("replaced-")]
        assert damaged, "what was damaged is kept aside, not overwritten"
        assert "are damaged" in result["refusal"], "with nothing whole left, no run starts over by itself"


def test_checkpointing_changes_nothing_at_any_zero_stage(two_ranks: list[dict[str, Any]]) -> None:
    for result in of(two_ranks, "keeps_activations_in_any_way"):
        assert result["losses"] == result["losses"][:1] * 3, result
        assert result["weights"], result


def test_states_are_as_large_as_the_estimate_says(two_ranks: list[dict[str, Any]]) -> None:
    """Summed over two ranks; gradients and gathered parameters come and go."""
    count = num_parameters(DIT)
    for result in of(two_ranks, "keeps_activations_in_any_way"):
        parallel = ParallelConfig(zero_stage=result["stage"], precision=Precision(result["precision"]))
        needed = states(count, parallel, 2)
        stepped = count if parallel.zero_stage == 0 else count / 2
        passing = 0 if parallel.zero_stage == 0 else 4 * stepped  # fp32 gradients while a step is taken
        masters = 4 * stepped if parallel.zero_stage == 0 else 0  # the weights themselves, counted as parameters
        gathered = 4 * count if parallel.zero_stage == 3 else 0
        assert result["bytes"]["parameters"] == pytest.approx(2 * (needed["parameters"] - gathered), rel=0.01)
        assert result["bytes"]["optimizer"] == pytest.approx(2 * (needed["optimizer"] - passing + masters), rel=0.01)
        assert result["bytes"]["ema"] == pytest.approx(2 * needed["ema"], rel=0.01)


def test_another_number_of_ranks_resumes_without_conversion(tmp_path: Path) -> None:
    for ranks, started_at in ((2, 0), (3, 2), (1, 4)):
        for result in of(run_world(ranks, tmp_path, "continues"), "continues"):
            assert result["started_at"] == started_at, result
            assert result["loss"] < 1e-5, result
            assert result["average"] < 1e-5, result
