"""Clips shared by neighbouring ranks, in groups that change from micro-step to micro-step, against one process; and
what bounds the groups."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from group_cases import MUTANTS, engine_cases
from group_steps import BYTES, SCHEDULES

from sora_train.config.limits import check_parallel
from sora_train.config.parallel import ParallelConfig, group_size, regroups
from sora_train.config.root import ConfigError
from sora_train.distributed.parallelize import groups_line, parallelize
from sora_train.distributed.sequence_parallel import SequenceGroups, Ulysses
from sora_train.distributed.topology import read_world
from sora_train.models.attention_cores import sdpa_per_document
from sora_train.models.pack_layout import PackLayout, SharedClips
from sora_train.models.video_dit import VideoDiT

# Worlds of several processes, each with many cases.
pytestmark = pytest.mark.timeout(900)

CASES = Path(__file__).with_name("group_cases.py")
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("groups") / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    done = subprocess.run([*command, str(CASES), str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: Results = json.loads(out.read_text())
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_loss_and_gradients_equal_one_process_at_every_zero_stage(results: Results) -> None:
    """Every variant of the model and of what is kept. Of single parameters, small gradients have more rounding."""
    assert len(results["engine"]) in (len(engine_cases(2)), len(engine_cases(4)))
    for result in results["engine"]:
        assert result["loss"] < 1e-6, result
        assert result["gradient"] < 1e-6, result
        assert result["parameter"] < 1e-5, result


@pytest.mark.slow
@pytest.mark.distributed
def test_in_float64_every_gradient_is_exact(results: Results) -> None:
    for result in results["exact"]:
        assert max(result["loss"], result["gradient"], result["parameter"]) < 1e-12, result
    # All that makes sharing hard comes up.
    for name in ("empty shares", "fillers", "whole beside a share", "cuts inside a clip", "uneven shares"):
        assert sum(result[name] for result in results["exact"]) > 2, name


@pytest.mark.slow
@pytest.mark.distributed
def test_mistakes_would_be_noticed(results: Results) -> None:
    """Wrong cores, wrong splits, wrong losses: the same comparison finds all of them wrong, a thousand times over."""
    assert [result["mutant"] for result in results["mutants"]] in (list(MUTANTS), list(MUTANTS[:3]))
    for result in results["mutants"]:
        assert result["gradient"] > 1e-3, result
        assert result["parameter"] > 1e-2, result


@pytest.mark.slow
@pytest.mark.distributed
def test_what_is_kept_is_as_much_as_the_estimate_says_and_nothing_travels_twice(results: Results) -> None:
    """One all-to-all there, one back, and the same in the backward pass; only blocks computed again send again."""
    assert len(results["memory"]) == 6
    for result in results["memory"]:
        assert all(abs(ratio - 1) < 0.05 for ratio in result["ratio"]), result
        assert result["forward"] == 2, result
        assert result["backward"] == (4 if result["mode"] == "block" else 2), result


def test_schedules_change_from_step_to_step() -> None:
    for ranks, schedule in SCHEDULES.items():
        assert all(sum(sizes) == ranks for step in schedule for sizes in step)
    assert {sizes for step in SCHEDULES[4] for sizes in step} == {(2, 1, 1), (4,), (1, 1, 2), (2, 2), (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("asked", "ranks", "heads", "size", "line"),
    [
        (8, 8, 40, 8, "sequence groups: up to 8 ranks"),
        (8, 8, 6, 2, "sequence groups: up to 2 ranks (parallel.largest_group=8, but model.heads=6 divide by 2 only)"),
        (8, 8, 9, 1, "sequence groups: none (parallel.largest_group=8, but model.heads=9 divide by 1 only)"),
        (8, 6, 40, 4, "sequence groups: up to 4 ranks, there being 6 ranks"),
        (8, 4, 4, 4, "sequence groups: up to 4 ranks, there being 4 ranks"),
        (2, 64, 12, 2, "sequence groups: up to 2 ranks"),
        (1, 64, 12, 1, "sequence groups: none"),
    ],
)
def test_groups_are_as_large_as_is_asked_or_a_line_says_why_not(
    asked: int, ranks: int, heads: int, size: int, line: str
) -> None:
    assert group_size(asked, ranks, heads) == size
    assert groups_line(asked, ranks, heads) == line


def test_other_sizes_of_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.largest_group=3: choose 1, 2, 4 or 8"):
        check_parallel(ParallelConfig(largest_group=3))


def test_groups_stay_within_a_step_under_zero_3_on_cuda_unless_asked() -> None:
    for stage in range(4):
        config = ParallelConfig(zero_stage=stage)
        assert regroups(config, on_cuda=False)
        assert regroups(config, on_cuda=True) == (stage < 3)
    assert regroups(ParallelConfig(zero_stage=3, regroup_within_step=True), on_cuda=True)
    assert not regroups(ParallelConfig(zero_stage=0, regroup_within_step=False), on_cuda=False)


def test_without_groups_the_core_is_the_kernel_alone() -> None:
    model = VideoDiT(BYTES)
    parallelize(model, ParallelConfig(), read_world({}), SequenceGroups({}), is_quiet=True)
    assert model.blocks[0].attn1.core is sdpa_per_document
    assert SequenceGroups.build(read_world({}), 8).largest == 1, "a world of one has no neighbours"


def test_a_layout_knows_which_parts_a_rank_holds() -> None:
    shares = (0, 5, 1, 4)  # of clips of 2, 6, 2 tokens
    held = [SharedClips.build([2, 6, 2], shares, 0, rank).parts for rank in range(4)]
    assert held == [[], [(0, range(2)), (1, range(3))], [(1, range(3, 4))], [(1, range(4, 6)), (2, range(2))]]
    layout = layout_with([4, 1, 2, 3], SharedClips.build([2, 6, 2], shares, 0, 1))
    whole = layout.of_whole
    assert whole is not None
    assert (whole.lengths, whole.text_lengths, whole.shared) == ((4, 1), (2, 2), None)
    assert (whole.cu_seqlens.tolist(), whole.sample_L.tolist()) == ([0, 4, 5], [0, 0, 0, 0, 1])
    assert layout_with([2, 3], layout.shared).of_whole is None, "nothing is whole here"
    whole = layout_with([4], SharedClips.build([10], (10, 0), 0, 1)).of_whole
    assert whole is not None
    assert whole.lengths == (4,)
    moved = layout.to("meta")
    assert moved.shared is not None
    assert moved.shared.of_all.cu_seqlens.device.type == "meta"


def layout_with(lengths: list[int], shared: SharedClips | None) -> PackLayout:
    return replace(PackLayout.build(lengths, [2] * len(lengths)), shared=shared)


def test_layouts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shares of \(5, 4\) do not divide 10 tokens"):
        SharedClips.build([2, 8], (5, 4), 0, 0)
    layout = layout_with([4, 1, 2, 2], SharedClips.build([2, 6, 2], (0, 5, 1, 4), 0, 1))
    with pytest.raises(ValueError, match="does not end in its parts"):
        assert layout.of_whole
    groups, shared = SequenceGroups({}), SharedClips.build([2, 8], (5, 5), 2, 0)
    layout = layout_with([2, 3], shared)
    rows = layout.sample_L[:, None, None].expand(5, 4, 8).float()
    with pytest.raises(ValueError, match="no sequence group of 2 ranks from rank 2: this rank has none"):
        Ulysses(sdpa_per_document, groups)(rows, rows, rows, layout, False)
