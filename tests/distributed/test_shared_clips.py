"""Clips that neighbouring ranks share, from shards to weights: as if one process had held them whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))

from corpus import write_corpus
from test_pack import write_mixed

pytestmark = pytest.mark.distributed

CASES = Path(__file__).with_name("shared_clips_cases.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, and clips of which most were made in advance."""
    folder = tmp_path_factory.mktemp("shared_clips")
    for name, write in (("videos", write_corpus), ("mixed", write_mixed)):
        (folder / name).mkdir()
        write(folder / name)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    """By case; of a world of so many ranks, under "ranks"."""
    out = folder / f"results-{request.param}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    done = subprocess.run([*command, str(CASES), str(folder), str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {**json.loads(out.read_text()), "ranks": request.param}


def assert_equal(found: dict[str, Any]) -> None:
    assert found["loss"] < 1e-6, found
    assert found["weights"] < 1e-6, found
    assert found["counts"], found
    assert found["same_values"], found
    assert found["values"] < 1e-6, found


def test_losses_weights_and_metrics_are_those_of_one_process(results: dict[str, Any]) -> None:
    for name, found in results["trains"].items():
        print(results["ranks"], name, found)
        assert_equal(found)
        assert not found["failures"]
        assert found["tried"] == [found["clips"]] * 2
        assert max(found["sizes"]) == results["ranks"]
        # Each clip was read once.
        assert sum(found["owned"]) == found["clips"]
        assert max(found["micro_steps"]) > 1
    assert any(found["lent"] for found in results["trains"].values())
    assert any(len(sizes) > 1 for sizes in results["trains"]["zero 1"]["partitions"]), "groups that change"
    assert all(len(sizes) == 1 for sizes in results["trains"]["one partition a step"]["partitions"])


def test_a_clip_that_fails_anywhere_is_masked_everywhere(results: dict[str, Any]) -> None:
    found, victim = results["masks"], results["masks"]["victim"]
    for name in ("damaged", "damaged, a worker", "replayed", "text lost", "gone"):
        print(results["ranks"], name, found[name])
        assert_equal(found[name])
    assert found["matters"]["loss"] > 1e-3
    for name in ("damaged", "damaged, a worker"):
        assert found[name]["failures"] == [{**victim, "reason": "hash"}], "told by the rank that reads it alone"
        assert found[name]["tried"] == [found[name]["clips"] + 1] * 2
    assert not found["replayed"]["failures"]
    assert found["replayed"]["tried"] == [found["replayed"]["clips"]] * 2
    assert {**victim, "reason": "read"} in found["text lost"]["failures"]
    assert found["text lost"]["tried"][0] == found["text lost"]["clips"] + 1, "counted once"
    # All that need it miss a shard, and each of its clips has failed once.
    assert found["gone"]["tried"][0] == found["gone"]["tried"][1] > found["gone"]["clips"]
    assert {failure["shard"] for failure in found["gone"]["failures"]} == {victim["shard"]}


def test_held_out_loss_does_not_depend_on_who_shares(results: dict[str, Any]) -> None:
    whole, shared = results["validates"]["losses"]
    assert shared == pytest.approx(whole, rel=1e-6)
    assert results["validates"]["shared"] > 0
