from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.cost.step_cost import StepCost, of_model
from sora_train.data.order import GlobalBatch, PlannedSample
from sora_train.data.packing import (
    PackLimits,
    PackPlan,
    Piece,
    assign,
    balance,
    largest_clip_tokens,
    rank_features,
    travelling_tokens,
)
from sora_train.data.schema import IndexRow
from sora_train.data.sharing import Block, Group, Layout
from sora_train.data.size import ClipSize

ROOT = Path(__file__).parent.parent.parent
WAN_14B = ModelConfig(width=5120, depth=40, heads=40, mlp_width=13824)
COST = of_model(WAN_14B)
GROUPS_OF_8 = PackLimits(80000, largest_group=8, heads=40)
WEB_MIX = np.loadtxt(ROOT / "benchmarks/workloads/web_mix_tokens.csv", dtype=int, delimiter=",", skiprows=1)


def batch_of(lengths: Sequence[int]) -> GlobalBatch:
    size = ClipSize(1, 8, 8, 8, 8, 0, 1.0)
    row = IndexRow("c", "mp4", 0, 0, 1, 8.0, 8, 8, 1.0, sha256(b"").hexdigest())
    return GlobalBatch(
        0,
        tuple(
            PlannedSample(0, i, 0, 0, replace(row, key=f"c{i}"), size, (96, 1, 2, 2), length, None)
            for i, length in enumerate(lengths)
        ),
    )


def linear(token: float = 1.0, pair: float = 0.0, travelling_token: float = 0.0) -> StepCost:
    return StepCost(WAN_14B, token, pair, 0.0, 0.0, travelling_token)


def web_mix(batch: int, world_size: int, clips_a_rank: int, column: int = 1) -> GlobalBatch:
    count = world_size * clips_a_rank
    return batch_of(WEB_MIX[batch * count : (batch + 1) * count, column].tolist())


def check(batch: GlobalBatch, micro_steps: Sequence[Sequence[PackPlan]], world_size: int, limits: PackLimits) -> None:
    """All that holds of any plan."""
    clips = []
    for number, packs in enumerate(micro_steps):
        assert len(packs) == world_size
        rank = 0
        while rank < world_size:
            first = packs[rank]
            assert first.group_size in (1, 2, 4, 8)
            assert first.group_size <= limits.group_size(world_size)
            assert first.first_rank == rank
            assert rank % first.group_size == 0
            assert sum(first.shares) == sum(sample.num_tokens for sample in first.shared)
            assert min(first.shares) >= 0
            members = packs[rank : rank + first.group_size]
            assert [pack.group_rank for pack in members] == list(range(first.group_size))
            assert len({(pack.first_rank, pack.shared, pack.shares) for pack in members}) == 1
            assert [i for pack in members for i in pack.share] == list(range(sum(first.shares)))
            clips += [sample.index for pack in members for sample in pack.samples]
            clips += [sample.index for sample in first.shared]
            assert first.group_size > 1 or not first.shared
            check_pieces(members)
            rank += first.group_size
        for pack in packs:
            assert pack.num_tokens <= limits.max_tokens_per_pack
            assert (pack.step, pack.micro_step) == (batch.step, number)
            assert pack.is_last is (number == len(micro_steps) - 1)
            assert (pack.planned_tokens, pack.planned_samples) == (batch.num_tokens, len(batch.samples))
    assert sorted(clips) == [sample.index for sample in batch.samples]


def check_pieces(members: Sequence[PackPlan]) -> None:
    """What the ranks of a group hold together is each clip once, read by one of them."""
    held: dict[int, list[int]] = {}
    readers: Counter[int] = Counter()
    for pack in members:
        assert pack.num_tokens == sum(len(piece.part) for piece in pack.pieces)
        whole = [Piece(sample, range(sample.num_tokens), True) for sample in pack.samples]
        assert list(pack.pieces[: len(whole)]) == whole
        has_tokens = [bool(piece.part) for piece in pack.pieces]
        assert has_tokens == sorted(has_tokens, reverse=True)
        for sample, part, is_owned, number in pack.pieces:
            assert part or is_owned
            assert number is None or pack.shared[number] is sample
            held.setdefault(sample.index, []).extend(part)
            readers[sample.index] += is_owned
    clips = {sample.index: sample for pack in members for sample in (*pack.samples, *pack.shared)}
    assert held == {index: list(range(sample.num_tokens)) for index, sample in clips.items()}
    assert readers == dict.fromkeys(clips, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("largest_group", [1, 2, 8])
def test_every_clip_once_within_the_limits(world_size: int, largest_group: int) -> None:
    limits = PackLimits(80000, largest_group, heads=40)
    for clips_a_rank in (1, 2, 4, 8):
        for number in range(2):
            batch = web_mix(number, world_size, clips_a_rank, column=number)
            micro_steps = assign(batch, world_size, limits, COST)
            check(batch, micro_steps, world_size, limits)
            again = assign(batch, world_size, limits, COST)
            # A rank that asks for its own packs alone gets those that it has in the whole plan.
            assert [packs[-1] for packs in again] == [packs[world_size - 1] for packs in micro_steps]
            assert [list(packs) for packs in again] == [list(packs) for packs in micro_steps]


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100) | st.integers(80, 800), min_size=1, max_size=40),
    world_size=st.integers(1, 20),
    largest_group=st.sampled_from([1, 2, 4, 8]),
    heads=st.sampled_from([6, 12, 40]),
    pair=st.sampled_from([0.0, 0.001, 0.1]),
    travelling=st.sampled_from([0.0, 0.5]),
    regroups=st.booleans(),
)
def test_any_clips_on_any_world(
    lengths: list[int],
    world_size: int,
    largest_group: int,
    heads: int,
    pair: float,
    travelling: float,
    regroups: bool,
) -> None:
    limits = PackLimits(100, largest_group, heads, regroups)
    largest = largest_clip_tokens(limits, world_size)
    batch = batch_of([min(length, largest) for length in lengths])
    micro_steps = assign(batch, world_size, limits, linear(1.0, pair, travelling))
    check(batch, micro_steps, world_size, limits)
    assert len(micro_steps) <= len(lengths)
    if not regroups:
        assert len({tuple((pack.first_rank, pack.group_size) for pack in packs) for packs in micro_steps}) == 1


def test_a_group_divides_the_heads_and_fits_the_world() -> None:
    limits = PackLimits(100, largest_group=8, heads=12)
    assert [limits.group_size(world_size) for world_size in (1, 2, 3, 4, 7, 8, 64)] == [1, 2, 2, 4, 4, 4, 4]
    assert PackLimits(100, 8, 40).group_size(12) == 8
    assert PackLimits(100, 2, 40).group_size(12) == 2
    assert PackLimits(100, 8, 9).group_size(12) == 1
    assert largest_clip_tokens(limits, 3) == 200


def test_a_clip_that_fits_no_group_is_named() -> None:
    with pytest.raises(ConfigError, match=r"c1 has 101 tokens, over data.max_tokens_per_pack=100 on each of 1 rank "):
        assign(batch_of([50, 101]), 2, PackLimits(100), COST)
    # The same clips train in a world of 4 and are refused in what is left of it.
    limits = PackLimits(100, largest_group=4, heads=12)
    assign(batch_of([50, 400]), 4, limits, COST)
    with pytest.raises(ConfigError, match=r"clip c1 has 400 tokens, .* on each of 2 ranks that may share it: raise it"):
        assign(batch_of([50, 400]), 3, limits, COST)


def test_a_clip_that_outweighs_a_rank_is_shared_and_only_that_one() -> None:
    (packs,) = assign(batch_of([90, 10, 20, 40]), 4, PackLimits(100, 4, 40), linear())
    assert [sample.num_tokens for sample in packs[0].shared] == [90]
    assert [pack.num_tokens for pack in packs] == [40, 40, 40, 40]
    assert sorted(pack.shares[pack.group_rank] for pack in packs) == [0, 20, 30, 40]


def test_attention_of_a_shared_clip_is_divided_evenly_and_its_tokens_are_not() -> None:
    # n^2 / 10 = 16000 in all, 4000 a rank; 750 + 4000 on the rank with the whole clip leaves it the fewest tokens.
    (packs,) = assign(batch_of([400, 50]), 4, PackLimits(1000, 4, 40), linear(10.0, 0.1))
    assert [sample.num_tokens for sample in packs[0].shared] == [400]
    (whole,) = [pack.group_rank for pack in packs if pack.samples]
    assert packs[0].shares[whole] == min(packs[0].shares) < 45
    assert balance([packs], linear(10.0, 0.1)) > 0.99


def test_a_rank_without_clips_gets_an_empty_plan() -> None:
    (packs,) = assign(batch_of([50, 40]), 4, PackLimits(100), COST)
    assert [pack.num_tokens for pack in packs] == [50, 40, 0, 0]


def test_clips_that_only_just_fit_take_another_micro_step() -> None:
    micro_steps = assign(batch_of([60, 60, 60, 40, 40]), 1, PackLimits(100), linear())
    assert [[pack.num_tokens for pack in row] for row in micro_steps] == [[100], [100], [60]]


def test_micro_steps_hold_packs_of_like_cost() -> None:
    # One clip outweighs what any other pack may hold; only its own micro-step waits for it.
    micro_steps = assign(batch_of([100] + [40] * 8), 2, PackLimits(100), linear(0.0, 1.0))
    rows = sorted(sorted(pack.num_tokens for pack in row) for row in micro_steps)
    assert [80, 80] in rows
    assert [row for row in rows if 100 in row] in ([[40, 100]], [[80, 100]])


def test_level_micro_steps_group_packs_of_like_cost() -> None:
    micro_steps = assign(batch_of([90, 30, 90, 30]), 2, PackLimits(90), linear())
    assert [[pack.num_tokens for pack in row] for row in micro_steps] == [[90, 90], [30, 30]]


@pytest.mark.parametrize(("clips_a_rank", "least"), [(8, 0.995), (4, 0.99), (2, 0.99), (1, 0.98)])
def test_ranks_of_a_micro_step_cost_the_same(clips_a_rank: int, least: float) -> None:
    figures = []
    for world_size, batches in ((8, 8), (32, 6)):
        for number in range(batches):
            for column in (0, 1):
                batch = web_mix(number, world_size, clips_a_rank, column)
                figures.append(balance(assign(batch, world_size, GROUPS_OF_8, COST), COST))
    print(f"{clips_a_rank} clips a rank: {np.mean(figures):.4f}, worst {min(figures):.4f}")
    assert np.mean(figures) >= least


def test_without_a_limit_by_memory_few_tokens_travel() -> None:
    limits = PackLimits(10**6, 8, 40)
    for clips_a_rank, least, most in ((8, 0.995, 0.01), (4, 0.99, 0.25)):
        figures, travelling, tokens = [], 0, 0
        for number in range(6):
            batch = web_mix(number, 32, clips_a_rank)
            micro_steps = assign(batch, 32, limits, COST)
            figures.append(balance(micro_steps, COST))
            travelling, tokens = travelling + travelling_tokens(micro_steps), tokens + batch.num_tokens
        print(f"{clips_a_rank} clips a rank: {np.mean(figures):.4f}, {travelling / tokens:.3f} travel")
        assert np.mean(figures) >= least
        assert travelling / tokens <= most


@pytest.mark.parametrize(
    ("room", "factor", "least"), [(10**6, 0.7, 0.985), (10**6, 1.3, 0.985), (80000, 1.3, 0.985), (80000, 0.7, 0.97)]
)
def test_balance_survives_a_wrong_cost_model(room: int, factor: float, least: float) -> None:
    # Where packs are bound by memory, ranks with one long clip stand beside ranks with many short ones.
    wrong, limits = replace(COST, pair=COST.pair * factor), PackLimits(room, 8, 40)
    figures = [balance(assign(web_mix(number, 8, 8, number % 2), 8, limits, wrong), COST) for number in range(10)]
    print(f"quadratic term x {factor}, {room} tokens: {np.mean(figures):.4f}")
    assert np.mean(figures) >= least


def test_an_outline_that_promised_too_much_gives_way_to_the_next() -> None:
    # The first outline of this step ends 1.4% above its estimate: 0.977.
    micro_steps = assign(web_mix(8, 32, 8), 32, GROUPS_OF_8, COST)
    print(balance(micro_steps, COST))
    assert balance(micro_steps, COST) >= 0.985


def test_a_rank_lays_out_its_own_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out, lay_out = [], Layout.groups

    def counted(self: Layout, unit: Block, height: float) -> list[Group]:
        laid_out.append(unit.first_rank)
        return lay_out(self, unit, height)

    monkeypatch.setattr(Layout, "groups", counted)
    micro_steps = assign(web_mix(0, 32, 4), 32, GROUPS_OF_8, COST)
    assert not laid_out
    packs = [packs[13] for packs in micro_steps]
    assert len(laid_out) == len(micro_steps) == 2
    assert all(pack.first_rank + pack.group_rank == 13 for pack in packs)


def test_ranks_grouped_once_a_step_are_balanced_by_the_size_that_suits_it() -> None:
    regroups, keeps = PackLimits(80000, 8, 40), PackLimits(80000, 8, 40, regroups_within_step=False)
    for clips_a_rank, least in ((8, 0.98), (2, 0.97)):
        sizes, figures, times = set(), [], []
        for number in range(6):
            plans = [assign(web_mix(number, 32, clips_a_rank), 32, limits, COST) for limits in (regroups, keeps)]
            check(web_mix(number, 32, clips_a_rank), plans[1], 32, keeps)
            sizes |= {pack.group_size for packs in plans[1] for pack in packs}
            figures.append(balance(plans[1], COST))
            times.append([step_cost(micro_steps) for micro_steps in plans])
        changing, fixed = np.mean(times, axis=0)
        print(f"{clips_a_rank} clips a rank: groups of {sizes}, {np.mean(figures):.4f}, time {fixed / changing:.4f}")
        assert np.mean(figures) >= least
        assert fixed / changing <= 1.05
    # Where nothing outweighs a rank, none is grouped.
    assert {pack.group_size for packs in assign(batch_of([10] * 64), 8, keeps, COST) for pack in packs} == {1}


def step_cost(micro_steps: Sequence[Sequence[PackPlan]]) -> float:
    return sum(max(COST.of_features(rank_features(pack, COST)) for pack in packs) for packs in micro_steps)


def test_those_that_read_shared_clips_have_like_amounts_to_read() -> None:
    most, ideal = 0, 0.0
    for number in range(40):
        for packs in assign(web_mix(number, 8, 2), 8, GROUPS_OF_8, COST):
            pieces = [[piece.sample.num_tokens for piece in pack.pieces if piece.is_owned] for pack in packs]
            loads = [sum(lengths) for lengths in pieces]
            most += max(loads)
            # No one rank can have less than the mean, nor than its own whole clips or the longest.
            ideal += max(sum(loads) / 8, *(max(lengths, default=0) for lengths in pieces))
    print(f"most to read: {most / ideal:.3f} of what it must be")
    assert most <= 1.2 * ideal
    # Equals take turns.
    (packs,) = assign(batch_of([800]), 8, PackLimits(100, 8, 40), COST)
    (other,) = assign(replace(batch_of([800]), step=3), 8, PackLimits(100, 8, 40), COST)
    assert (packs[0].owners, other[0].owners) == ((0,), (3,))


def test_features_of_all_ranks_add_up_to_the_clips() -> None:
    batch = web_mix(0, 8, 2)
    (packs,) = assign(batch, 8, GROUPS_OF_8, COST)
    totals = np.sum([rank_features(pack, COST) for pack in packs], axis=0)
    tokens = np.array([sample.num_tokens for sample in batch.samples])
    assert totals[0] == tokens.sum()
    # One text row each: pairs of tokens, and of a token and that row.
    assert totals[1] == pytest.approx((tokens * (tokens + 1)).sum())
    assert travelling_tokens([packs]) == sum(sample.num_tokens for sample in packs[0].shared) > 0
    # 7/8 of the shared tokens leave their rank.
    assert totals[4] == pytest.approx(travelling_tokens([packs]) * 7 / 8)
