"""Do ranks wait for each other? The length mix of a web corpus, assigned to 8, 32 and 256 ranks.

    python benchmarks/data_balance.py --json benchmarks/results/data-balance.json

Global batches are consecutive clips of the list: 8, 4, 2 or 1 a rank. Balance is the mean rank cost over the largest,
both summed over the micro-steps of a step; all-to-all counts as work in both, and "useful" is the same with the mean
counting the clips alone. Costs are FLOPs of forward and backward by `sora_train.cost.step_cost.of_model`.
"""

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import mean, median

import numpy as np

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # run as a file, not as a module
    sys.path.insert(0, str(ROOT))

from benchmarks.figure import Figure, print_table, write_json  # noqa: E402
from sora_train.config.model import ModelConfig  # noqa: E402
from sora_train.cost.step_cost import StepCost, of_model  # noqa: E402
from sora_train.data.order import GlobalBatch, PlannedSample  # noqa: E402
from sora_train.data.packing import PackLimits, PackPlan, assign, balance, rank_features, travelling_tokens  # noqa: E402
from sora_train.data.schema import CaptionEntry, IndexRow  # noqa: E402
from sora_train.data.size import ClipSize  # noqa: E402

WORKLOAD = ROOT / "benchmarks" / "workloads" / "web_mix_tokens.csv"
WAN_14B = ModelConfig(width=5120, depth=40, heads=40, mlp_width=13824)
WAN_1B = ModelConfig(width=1536, depth=30, heads=12, mlp_width=8960)
ROOM = 80_000
CAPTION_BYTES = 100
WORLDS = (8, 32, 256)
# By clips a rank: least mean balance, most tokens that may travel.
BARS = {8: (0.995, 0.01), 4: (0.99, 0.25), 2: (0.99, 0.80), 1: (0.98, 0.95)}
Lengths = dict[str, list[int]]


def read_lengths(path: Path) -> Lengths:
    """Tokens of every clip, by column."""
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    return {column: [int(row[column]) for row in rows] for column in rows[0]}


def batches(lengths: list[int], world_size: int, clips_a_rank: int, most: int) -> list[GlobalBatch]:
    """Consecutive clips, as many global batches as the list gives, at most `most`."""
    size, count = ClipSize(1, 8, 8, 8, 8, 0, 1.0), world_size * clips_a_rank
    row = IndexRow("c", "mp4", 0, 0, 1, 8.0, 8, 8, 1.0, sha256(b"").hexdigest())
    row = replace(row, captions=(CaptionEntry("original/short", CAPTION_BYTES),))
    return [
        GlobalBatch(
            step,
            tuple(
                PlannedSample(step, i, 0, 0, row, size, (16, 1, 2, 2), length, 0)
                for i, length in enumerate(lengths[step * count : (step + 1) * count])
            ),
        )
        for step in range(min(most, len(lengths) // count))
    ]


class Measured:
    """What one plan comes to."""

    def __init__(self, batch: GlobalBatch, plan: Sequence[Sequence[PackPlan]], limits: PackLimits, cost: StepCost):
        packs = [pack for row in plan for pack in row]
        self.balance = balance(plan, cost)
        loads = [[cost.of_features(rank_features(pack, cost)) for pack in row] for row in plan]
        self.height = sum(max(row) for row in loads)
        rows = cost.text_rows(CAPTION_BYTES)
        clips = [cost.of_clip(sample.num_tokens, rows).whole for sample in batch.samples]
        self.work = sum(clips) / len(plan[0])
        self.useful = self.work / self.height
        self.travelling = travelling_tokens(plan) / batch.num_tokens
        self.tokens_ratio = max(
            max(pack.num_tokens for pack in row) * len(row) / max(1, sum(pack.num_tokens for pack in row))
            for row in plan
        )
        self.largest_pack = max(pack.num_tokens for pack in packs)
        done = [sample.index for pack in packs for sample in pack.samples]
        done += [sample.index for pack in packs if pack.group_rank == 0 for sample in pack.shared]
        self.dropped = len(set(range(len(batch.samples))) - set(done))
        self.repeated = len(done) - len(set(done))
        self.padding = sum(pack.num_tokens for pack in packs) - batch.num_tokens
        tokens = [sample.num_tokens for sample in batch.samples]
        self.bound = height_bound(clips, tokens, len(plan[0]), limits.group_size(len(plan[0])), cost, self.height)


def height_bound(
    clips: list[float], tokens: list[int], world_size: int, group_size: int, cost: StepCost, height: float
) -> float:
    """A sum of heights that no assignment beats, given one that exists.

    - The ranks together do all the work.
    - Every clip lies in one aligned block of `group_size` ranks, so a sum of heights is too small when the clips do not
      fit into blocks of so much: bound L2 of bin packing (Martello and Toth 1990). It covers the crowded block: of the
      most expensive B + 1 clips, some block of B has two.

    In both, a clip that outweighs the given height also moves its tokens through all-to-all, in a group large enough
    for it: whole it would be higher.
    """
    costs = []
    for clip, length in zip(clips, tokens, strict=True):
        group = min(group_size, 2 ** math.ceil(math.log2(clip / height))) if clip > height else 1
        costs.append(clip + cost.travelling_token * length * (group - 1) / group)
    blocks, ascending = -(-world_size // group_size), np.sort(costs)
    low, high = max(sum(costs) / world_size, max(costs) / group_size), height
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if bins_needed(ascending, middle * group_size) > blocks else (low, middle)
    return low


def bins_needed(ascending: np.ndarray, size: float) -> float:
    """Lower bound L2 on the bins of this size that items need: for every k, items over size - k share with none over k.

    The sum of the rest, down to k, is what fills the bins of the items over size / 2 and more bins.
    """
    before = np.concatenate([[0.0], np.cumsum(ascending)])
    half = np.searchsorted(ascending, size / 2, "right")
    least = np.arange(half + 1)  # the first item of k or more
    k = np.append(ascending[:half], 0.0)
    k[-1] = 0.0
    least[-1] = 0
    alone = np.searchsorted(ascending, size - k, "right")
    middle = np.maximum(alone - half, 0)
    free = middle * size - (before[np.maximum(alone, half)] - before[half])
    more = np.ceil(np.maximum(before[half] - before[least] - free, 0) / size - 1e-9)
    return float(np.max(len(ascending) - np.maximum(alone, half) + middle + more))


def measure(
    all_lengths: Iterable[list[int]], world_size: int, clips_a_rank: int, limits: PackLimits, planned: StepCost,
    true: StepCost, most: int,
) -> list[Measured]:  # fmt: skip
    """Plans by one cost model, judged by another."""
    return [
        Measured(batch, assign(batch, world_size, limits, planned), limits, true)
        for lengths in all_lengths
        for batch in batches(lengths, world_size, clips_a_rank, most)
    ]


def worst_percent(values: list[float]) -> float:
    """Mean of the worst 1% (at least one)."""
    return mean(sorted(values)[: max(1, len(values) // 100)])


def balance_figures(lengths: Lengths, most: int) -> list[Figure]:
    """Wan 14B, groups to 8: balance, tokens that travel, tokens of a rank, nothing dropped or padded."""
    figures, cost, limits = [], of_model(WAN_14B), PackLimits(ROOM, 8, WAN_14B.heads)
    everything: list[Measured] = []
    for clips_a_rank, (least, travel) in BARS.items():
        pooled: list[Measured] = []
        for world_size in WORLDS:
            for column, tokens in lengths.items():
                plans = measure([tokens], world_size, clips_a_rank, limits, cost, cost, most)
                pooled += plans
                where = f"{clips_a_rank} clips a rank, {world_size} ranks, {column}, {len(plans)} steps"
                value = mean(plan.balance for plan in plans)
                figures.append(Figure("balance", value, "", f">= {least}", value >= least, where))
                value = mean(plan.travelling for plan in plans)
                figures.append(Figure("tokens that travel", value, "", f"<= {travel}", value <= travel, where))
                figures.append(Figure("useful", mean(plan.useful for plan in plans), "", "", None, where))
        where = f"{clips_a_rank} clips a rank, all ranks and columns, {len(pooled)} steps"
        value = mean(plan.balance for plan in pooled)
        figures.append(Figure("balance, mean of all", value, "", f">= {least}", value >= least, where))
        value = mean(plan.travelling for plan in pooled)
        figures.append(Figure("tokens that travel, mean of all", value, "", f"<= {travel}", value <= travel, where))
        value = worst_percent([plan.balance for plan in pooled])
        bar, holds = (">= 0.985", value >= 0.985) if clips_a_rank > 1 else ("", None)
        figures.append(Figure("balance, worst 1%", value, "", bar, holds, where))
        everything += pooled
    where = f"every micro-step of {len(everything)} steps"
    value = max(plan.tokens_ratio for plan in everything)
    figures.append(Figure("largest over mean tokens of a rank", value, "", "<= 1.4", value <= 1.4, where))
    for name, count, most_allowed in (
        ("tokens of the largest pack", max(plan.largest_pack for plan in everything), ROOM),
        ("clips dropped", sum(plan.dropped for plan in everything), 0),
        ("clips repeated", sum(plan.repeated for plan in everything), 0),
        ("padding tokens", sum(plan.padding for plan in everything), 0),
    ):
        figures.append(Figure(name, count, "", f"<= {most_allowed}", count <= most_allowed, where))
    return figures


def unbounded_figures(lengths: Lengths, most: int) -> list[Figure]:
    """The same where memory holds a whole step in one micro-step: what the limit itself costs."""
    figures, cost, limits = [], of_model(WAN_14B), PackLimits(10**6, 8, WAN_14B.heads)
    for clips_a_rank in (8, 4):
        least, travel = BARS[clips_a_rank]
        for world_size in WORLDS:
            plans = measure(lengths.values(), world_size, clips_a_rank, limits, cost, cost, most)
            where = f"{clips_a_rank} clips a rank, {world_size} ranks, no limit on tokens, {len(plans)} steps"
            value = mean(plan.balance for plan in plans)
            figures.append(Figure("balance, one micro-step", value, "", f">= {least}", value >= least, where))
            value = mean(plan.travelling for plan in plans)
            name = "tokens that travel, one micro-step"
            figures.append(Figure(name, value, "", f"<= {travel}", value <= travel, where))
    return figures


def small_model_figures(lengths: Lengths, most: int) -> list[Figure]:
    """Wan 1.3B: 12 heads, groups to 4. A height that no assignment can beat, over that of the plan."""
    figures, cost, limits = [], of_model(WAN_1B), PackLimits(ROOM, 8, WAN_1B.heads)
    for clips_a_rank in BARS:
        for world_size in WORLDS:
            plans = measure(lengths.values(), world_size, clips_a_rank, limits, cost, cost, most)
            value = mean(plan.bound / plan.height for plan in plans)
            where = f"{clips_a_rank} clips a rank, {world_size} ranks, both columns, {len(plans)} steps"
            name = "Wan 1.3B, of what could be reached"
            figures.append(Figure(name, value, "", ">= 0.97", value >= 0.97, where))
    return figures


def wrong_cost_figures(lengths: Lengths, most: int) -> list[Figure]:
    """Planned with a quadratic coefficient 30% off, judged with the right one."""
    figures, cost, limits = [], of_model(WAN_14B), PackLimits(ROOM, 8, WAN_14B.heads)
    for factor in (0.7, 1.3):
        wrong = replace(cost, pair=cost.pair * factor)
        for world_size in WORLDS:
            for room, said in ((ROOM, f"{ROOM} tokens a pack"), (10**6, "no limit on tokens")):
                plans = measure(
                    lengths.values(), world_size, 8, replace(limits, max_tokens_per_pack=room), wrong, cost, most
                )
                value = mean(plan.balance for plan in plans)
                where = f"8 clips a rank, {world_size} ranks, quadratic term x {factor}, {said}, {len(plans)} steps"
                figures.append(Figure("balance, wrong costs", value, "", ">= 0.985", value >= 0.985, where))
    return figures


def planning_figures(lengths: Lengths, repeats: int) -> list[Figure]:
    """CPU time that a rank takes for its packs of a step, configurations in turn."""
    cost, limits = of_model(WAN_14B), PackLimits(ROOM, 8, WAN_14B.heads)
    timed: dict[tuple[int, int], list[float]] = {}
    work = [
        (world_size, clips_a_rank, batch)
        for world_size in (32, 256)
        for clips_a_rank in BARS
        for column in lengths.values()
        for batch in batches(column, world_size, clips_a_rank, 4)
    ]
    for repeat in range(repeats):
        spent: dict[tuple[int, int], list[float]] = {}
        for world_size, clips_a_rank, batch in work:
            rank = (repeat * 37 + batch.step * 11) % world_size
            start = time.process_time()
            for packs in assign(batch, world_size, limits, cost):
                packs[rank]
            spent.setdefault((world_size, clips_a_rank), []).append(time.process_time() - start)
        for key, seconds in spent.items():
            timed.setdefault(key, []).append(1000 * mean(seconds))
    figures = []
    for (world_size, clips_a_rank), values in timed.items():
        most = 1.0 if world_size == 32 else 3.0
        where = (
            f"{clips_a_rank} clips a rank, {world_size} ranks, mean of steps, least of {repeats} repeats "
            f"(median {median(values):.2f}, most {max(values):.2f})"
        )
        name = "CPU of planning, on each rank"
        figures.append(Figure(name, min(values), "ms", f"<= {most}", min(values) <= most, where))
    return figures


def rivals(lengths: Lengths, most: int) -> list[Figure]:
    """Other ways to make packs of the same batches: share of computed tokens that are clips, and balance."""
    cost = of_model(WAN_14B)
    rows = cost.text_rows(CAPTION_BYTES)

    def price(tokens: int) -> float:
        return float(cost.of_clip(tokens, rows).whole)

    def one_after_the_other(loads: list[tuple[float, int]], world_size: int) -> tuple[float, int]:
        """Packs to ranks in turn: sum of heights, tokens computed."""
        heights = sum(max(load for load, _ in loads[i : i + world_size]) for i in range(0, len(loads), world_size))
        return heights, sum(tokens for _, tokens in loads)

    def pad_to_max(clips: list[int], world_size: int) -> tuple[float, int]:
        """A rank's clips in turn, padded to the longest of the pack."""
        longest, each = max(clips), max(1, ROOM // max(clips))
        packs = [clips[i : i + each] for i in range(0, len(clips), each)]
        return one_after_the_other([(len(pack) * price(longest), len(pack) * longest) for pack in packs], world_size)

    def bucketing(clips: list[int], world_size: int) -> tuple[float, int]:
        """Clips padded to the next power of two, a pack from one bucket, buckets in turn."""
        buckets: dict[int, list[int]] = {}
        for clip in clips:
            buckets.setdefault(min(ROOM, 2 ** math.ceil(math.log2(clip))), []).append(clip)
        loads = []
        for size in sorted(buckets):
            each = max(1, ROOM // size)
            for i in range(0, len(buckets[size]), each):
                count = len(buckets[size][i : i + each])
                loads.append((count * price(size), count * size))
        return one_after_the_other(loads, world_size)

    def first_fit(clips: list[int], world_size: int) -> tuple[float, int]:
        """Clips in turn to the first pack with room; packs to ranks in turn."""
        packs: list[list[int]] = []
        for clip in clips:
            fitting = next((pack for pack in packs if sum(pack) + clip <= ROOM), None)
            if fitting is None:
                packs.append([clip])
            else:
                fitting.append(clip)
        return one_after_the_other([(sum(map(price, pack)), sum(pack)) for pack in packs], world_size)

    def longest_first(clips: list[int], world_size: int) -> tuple[float, int]:
        """Most expensive first to the pack with least to do and room (LPT), packs of like cost together; no sharing."""
        count = -(-sum(clips) // (world_size * ROOM))
        while True:
            packs = [[0.0, 0] for _ in range(count * world_size)]
            for clip in sorted(clips, reverse=True):
                open_packs = [pack for pack in packs if pack[1] + clip <= ROOM]
                if not open_packs:
                    break
                pack = min(open_packs)
                pack[0] += price(clip)
                pack[1] += clip
            else:
                loads = sorted(((load, int(tokens)) for load, tokens in packs), reverse=True)
                return one_after_the_other(loads, world_size)
            count += 1

    methods: dict[str, Callable[[list[int], int], tuple[float, int]]] = {
        "pad to the longest": pad_to_max,
        "buckets of powers of two": bucketing,
        "first fit by tokens": first_fit,
        "longest first": longest_first,
    }
    figures = []
    for name, method in methods.items():
        for clips_a_rank in BARS:
            balances, tokens, computed = [], 0, 0
            for column in lengths.values():
                for batch in batches(column, 32, clips_a_rank, min(most, 12)):
                    clips = [sample.num_tokens for sample in batch.samples]
                    height, all_tokens = method(clips, 32)
                    balances.append(sum(map(price, clips)) / 32 / height)
                    tokens, computed = tokens + sum(clips), computed + all_tokens
            where = f"{clips_a_rank} clips a rank, 32 ranks, both columns, {len(balances)} steps"
            figures.append(Figure(f"{name}: useful time", mean(balances), "", "", None, where))
            figures.append(Figure(f"{name}: token use", tokens / computed, "", "", None, where))
    return figures


def figures(workload: Path = WORKLOAD, most: int = 100, repeats: int = 7) -> list[Figure]:
    """All of them; `most` bounds the global batches of each configuration."""
    lengths = read_lengths(workload)
    return [
        *balance_figures(lengths, most),
        *unbounded_figures(lengths, min(most, 20)),
        *small_model_figures(lengths, min(most, 20)),
        *wrong_cost_figures(lengths, min(most, 20)),
        *planning_figures(lengths, repeats),
        *rivals(lengths, most),
    ]


def main() -> None:
    """Prints the figures; leaves with 1 when one misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--workload", type=Path, default=WORKLOAD, help="list of token counts, a column a size rule")
    parser.add_argument("--batches", type=int, default=100, help="most global batches of each configuration")
    parser.add_argument("--repeats", type=int, default=7, help="of the timings")
    arguments = parser.parse_args()
    found = figures(arguments.workload, arguments.batches, arguments.repeats)
    print_table(found)
    if arguments.json:
        write_json(found, arguments.json)
    raise SystemExit(any(figure.holds is False for figure in found))


if __name__ == "__main__":
    main()
