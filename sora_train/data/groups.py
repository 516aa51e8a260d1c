"""Which ranks share which clips: plain integers in, sequence groups out. Pure; `packing` wraps it in plans.

Every micro-step is a rendezvous of all ranks, so a micro-step lasts as long as its costliest rank; what it costs the
others matters not. The plan makes the sum of these heights small, and among plans of like sum shares few tokens:

1. Tall micro-steps: the longest clips, one on each rank. Their height is that of their longest clip, and what room
   they leave is filled with the next clips that fit below it, largest first. Where long clips run out in the last of
   them, the ranks that got none join a rank or three that did, and such a group shares what it holds.
2. Level micro-steps: all other clips. Blocks of the largest group take clips, most expensive first, where least has
   been done (LPT, Graham 1969). In a block, clips that outweigh a rank are shared by all its ranks; the others sit
   whole on a rank, and the shares of the shared clips are cut so that all ranks end at the same level. Where no clip
   outweighs a rank, the blocks are single ranks and nothing is shared.

How many micro-steps are tall is chosen by an estimate of the time that each choice would take. All ranks compute which
clips each block of ranks gets; inside its blocks (`sharing`) a rank computes only what concerns itself.
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sora_train.config.parallel import group_size
from sora_train.cost.step_cost import StepCost
from sora_train.data.sharing import Block, Clips, Group, Layout

# In a block, clips over this part of a rank's height are expected to be shared.
EXPECTED_SHARED = 0.5
# So many outlines are filled at most where one turns out worse than another promises; of few clips, which even out
# less of an estimate's error, always.
FEW_CLIPS, TRIES = 64, 3
# Above this share of its height wasted, a level micro-step of whole clips is planned again with sharing.
WASTE = 0.004


@dataclass(frozen=True)
class PackLimits:
    """What a pack and a group may be."""

    max_tokens_per_pack: int  # on one rank
    largest_group: int = 1  # ranks that may share a clip: 1, 2, 4 or 8
    heads: int = 1  # of the model: a group divides them evenly
    # Whether the ranks of a step are grouped anew in each of its micro-steps; else in all of them by the same size.
    regroups_within_step: bool = True

    def group_size(self, world_size: int) -> int:
        """Ranks of the largest group in a world of this size."""
        return group_size(self.largest_group, world_size, self.heads)


class _Outline(NamedTuple):
    """How many micro-steps are tall; estimates are of the whole step. Sorts by the estimated time."""

    time: float
    tall: int
    poor: int  # ranks without a long clip in the last tall micro-step
    rich: int  # size of the groups they join; 1: none
    heights: list[float]  # of each micro-step


class _Filling(NamedTuple):
    """All clips on units, before they are laid out in them."""

    units: list[Block]
    heights: list[float]  # of each micro-step


def largest_clip_tokens(limits: PackLimits, world_size: int) -> int:
    """Tokens of the largest clip that this world can train on."""
    return limits.max_tokens_per_pack * limits.group_size(world_size)


class StepGroups:
    """The groups of a step. Blocks are laid out when asked for: a rank that asks for its own pays for no others."""

    def __init__(self, layout: Layout, number: list[int], blocks: list[Block], heights: list[float]) -> None:
        """`number`: of each of the layout's clips, in the batch."""
        self.heights = heights
        self._layout, self._number = layout, number
        self._blocks: list[list[Block]] = [[] for _ in heights]
        for block in blocks:
            self._blocks[block.micro_step].append(block)
        self._starts = [[block.first_rank for block in row] for row in self._blocks]

    def __len__(self) -> int:
        """Micro-steps."""
        return len(self._blocks)

    def of_rank(self, micro_step: int, rank: int) -> Group:
        """The group that a rank is in."""
        block = self._blocks[micro_step][bisect_right(self._starts[micro_step], rank) - 1]
        groups = self._of_block(block)
        return groups[rank - block.first_rank] if len(groups) > 1 else groups[0]

    def _of_block(self, block: Block) -> list[Group]:
        number = self._number
        return [
            Group(
                group.first_rank,
                [sorted([number[i] for i in members]) for members in group.whole],
                [number[i] for i in group.shared],
                group.shares,
            )
            for group in self._layout.groups(block, self.heights[block.micro_step])
        ]


def plan_groups(
    tokens: Sequence[int], text_rows: Sequence[int], world_size: int, limits: PackLimits, cost: StepCost
) -> StepGroups:
    """The groups of each micro-step, covering all ranks. No clip may be over `largest_clip_tokens`."""
    tokens_array, text_array = np.asarray(tokens, dtype=np.int64), np.asarray(text_rows, dtype=np.int64)
    costs = cost.of_clip(tokens_array.astype(np.float64), text_array)
    order = np.argsort(-costs.whole, kind="stable")
    sorted_tokens, sorted_cost = tokens_array[order], costs.whole[order]
    clips = Clips(
        sorted_tokens.tolist(),
        sorted_cost.tolist(),
        costs.by_tokens[order].tolist(),
        costs.by_heads[order].tolist(),
        costs.repeated[order].tolist(),
        [0, *np.cumsum(sorted_tokens).tolist()],
        [0.0, *np.cumsum(sorted_cost).tolist()],
    )
    room, size = limits.max_tokens_per_pack, limits.group_size(world_size)
    if limits.regroups_within_step:
        planner = _Planner(clips, world_size, room, size, cost)
        filling = planner.plan()
    else:
        planner, filling = _of_one_size(clips, world_size, room, size, cost)
    return StepGroups(planner.layout, order.tolist(), filling.units, filling.heights)


def _of_one_size(
    clips: Clips, world_size: int, room: int, largest: int, cost: StepCost
) -> "tuple[_Planner, _Filling]":
    """Groups of one size in all micro-steps, whichever size takes the least time; of like times the smallest size."""
    best: tuple[float, _Planner, _Filling] | None = None
    size = 1
    while size <= largest:
        planner = _Planner(clips, world_size, room, size, cost, keeps_blocks=True)
        if max(clips.tokens, default=0) <= room * size:
            filling = planner.plan() if size == 1 else planner.level_plan()
            time = planner.time(filling)
            if best is None or time < best[0] * (1 - WASTE):
                best = time, planner, filling
        size *= 2
    assert best is not None, "no clip is over what the largest group holds"
    return best[1:]


class _Planner:
    def __init__(
        self, clips: Clips, world_size: int, room: int, group_size: int, cost: StepCost, keeps_blocks: bool = False
    ) -> None:
        self.clips, self.world_size, self.cost = clips, world_size, cost
        self.room, self.group_size = room, group_size
        self.layout = Layout(clips, room, cost, keeps_blocks)
        self.cheapness = [-c for c in clips.cost]  # in ascending order, for bisection

    def plan(self) -> _Filling:
        """The best filling that is found."""
        micro_steps = max(1, -(-self.clips.tokens_before[-1] // (self.world_size * self.room)))
        is_few = len(self.clips.cost) <= FEW_CLIPS
        while True:
            fillings: list[_Filling] = []
            for outline in sorted(self._outlines(micro_steps)):
                # Others are worth filling while they promise less than what has been reached.
                reached = min([sum(filling.heights) for filling in fillings], default=float("inf"))
                if len(fillings) == TRIES or (not is_few and outline.time >= reached * (1 - 2 * WASTE)):
                    break
                if (filling := self._fill(outline, micro_steps)) is not None:
                    fillings.append(filling)
            if fillings:
                if len(fillings) == 1:
                    return fillings[0]
                return min(fillings, key=self.time if is_few else lambda filling: sum(filling.heights))
            micro_steps += 1

    def level_plan(self) -> _Filling:
        """All clips in level micro-steps, in blocks of the group's size alone."""
        clips, world = self.clips, self.world_size
        micro_steps = max(1, -(-clips.tokens_before[-1] // (world * self.room)))
        while True:
            height = max(clips.cost_before[-1] / (micro_steps * world), max(clips.cost, default=0) / self.group_size)
            order = range(len(clips.cost))
            filled = self._fill_level(order, self.group_size, height, height * EXPECTED_SHARED, 0, micro_steps)
            if filled is not None:
                return _Filling(*filled)
            micro_steps += 1

    def time(self, filling: _Filling) -> float:
        """Sum of the heights, once laid out."""
        cost = self.clips.cost
        heights = [0.0] * len(filling.heights)
        for unit in filling.units:
            for _, whole, shared, shares in self.layout.groups(unit, filling.heights[unit.micro_step]):
                fixed, a_token = self.layout.shared_costs(shared, len(shares)) if shared else (0.0, 0.0)
                for clips, share in zip(whole, shares, strict=True):
                    load = sum([cost[i] for i in clips]) + fixed + share * a_token
                    heights[unit.micro_step] = max(heights[unit.micro_step], load)
        return sum(heights)

    def _outlines(self, micro_steps: int) -> Iterator[_Outline]:
        tokens, cost, world, room = self.clips.tokens, self.clips.cost, self.world_size, self.room
        tokens_before, cost_before = self.clips.tokens_before, self.clips.cost_before
        count, total = len(cost), cost_before[-1]
        cheapness = self.cheapness
        weight = self.cost.travelling_token

        def rest(heights: list[float], taken: int, missing: float, shared: float) -> tuple[float, float]:
            """Height of the level micro-steps, and the estimated time."""
            level = micro_steps - len(heights)
            height = (total - world * sum(heights) + missing) / (level * world)
            if self.group_size == 1 and taken < count:
                height = max(height, cost[taken])
            heavy = max(bisect_left(cheapness, -height * 1.0001), taken)
            height = max(height, cost[0] / self.group_size if taken == 0 and count else 0.0)
            shared += tokens_before[heavy] - tokens_before[taken]
            return height, sum(heights) + level * height + weight * shared / world

        height, time = rest([], 0, 0.0, 0.0)
        yield _Outline(time, 0, 0, 1, [height] * micro_steps)
        for tall in range(1, micro_steps):
            first = (tall - 1) * world
            if first >= count or cost[first] * world > total:
                break
            heights = [cost[j * world] for j in range(tall)]
            top, end = heights[-1], min(tall * world, count)
            if max(tokens[first:end]) > room:
                break
            # Cost of a token among the clips that would fill the last tall micro-step.
            stop = min(max(bisect_left(tokens_before, tokens_before[end] + world * room // 8), end), count)
            density = (cost_before[stop] - cost_before[end]) / max(tokens_before[stop] - tokens_before[end], 1)
            heads = end
            while heads > first and cost[heads - 1] + (room - tokens[heads - 1]) * density < top * (1 - WASTE):
                heads -= 1
            poor = tall * world - heads
            stop = min(max(bisect_left(tokens_before, tokens_before[heads] + poor * room), heads), count)
            density = (cost_before[stop] - cost_before[heads]) / max(tokens_before[stop] - tokens_before[heads], 1)
            for rich in (1, 2, 4):
                if rich > 1 and (rich > self.group_size or poor == 0 or rich * poor > world):
                    continue
                long = heads - 1
                travel = self.cost.travelling_token * tokens[long] * (rich - 1) / rich
                wanted = rich * top - (rich - 1) * (cost[long] + travel)
                filling = rich * room - (rich - 1) * tokens[long]
                missing = poor * max(0.0, wanted - filling * density)
                taken = min(bisect_left(tokens_before, tokens_before[heads] + poor * filling), count)
                height, time = rest(heights, max(taken, heads), missing, poor * (rich - 1) * float(room))
                if 0 < height <= top:
                    yield _Outline(time, tall, poor, rich, heights + [height] * (micro_steps - tall))

    def _fill(self, outline: _Outline, micro_steps: int) -> _Filling | None:
        """The clips of every unit; None where one finds no room."""
        tall_units, left = self._fill_tall(outline)
        height, tall = outline.heights[-1], outline.tall
        best: tuple[float, list[Block], list[float]] | None = None
        outweighs = bool(left) and self.clips.cost[left[0]] > height
        for size in (1, self.group_size):
            if size == 1 and outweighs and self.group_size > 1:
                continue
            heavy = height * EXPECTED_SHARED if outweighs else float("inf")
            if (filled := self._fill_level(left, size, height, heavy, tall, micro_steps)) is not None:
                units, levels = filled
                if best is None or sum(levels) < best[0]:
                    best = (sum(levels), units, levels)
            if best is not None and best[0] <= height * (micro_steps - tall) * (1 + WASTE):
                break
        if best is None:
            return None
        heights = outline.heights[:tall] + best[2]
        return _Filling(tall_units + best[1], heights)

    def _fill_tall(self, outline: _Outline) -> tuple[list[Block], list[int]]:
        """The units of the tall micro-steps, and the clips that are left."""
        tokens, cost, world = self.clips.tokens, self.clips.cost, self.world_size
        units: list[Block] = []
        start = 0
        for micro_step in range(outline.tall):
            poor, rich = (outline.poor, outline.rich) if micro_step == outline.tall - 1 else (0, 1)
            rank = 0
            if rich > 1:
                singles = world - rich * poor
                for number in range(poor):
                    members = list(range(start + singles + number, start + world - poor, poor))
                    units.append(Block(micro_step, rank, rich, members))
                    rank += rich
            for i in range(start, start + world - rank):
                units.append(Block(micro_step, rank + i - start, 1, [i] if i < len(cost) else []))
            start = min(start + world - (poor if rich > 1 else 0), len(cost))
        if not outline.tall or start == len(cost):
            return units, list(range(start, len(cost)))
        # The largest clip that still fits, by cost and by tokens, is what a unit is ordered by.
        token, pair, last = self.cost.token, self.cost.pair, cost[-1]
        lowest: list[tuple[float, int]] = []
        gaps, rooms = [], []
        for number, unit in enumerate(units):
            gap, room = outline.heights[unit.micro_step] * unit.size, self.room * unit.size
            for i in unit.members:
                gap, room = gap - cost[i], room - tokens[i]
                if unit.size > 1:
                    gap -= self.cost.travelling_token * tokens[i] * (unit.size - 1) / unit.size
            gaps.append(gap)
            rooms.append(room)
            fits = min(gap, room * (token + pair * room))
            if fits >= last:
                lowest.append((-fits, number))
        heapq.heapify(lowest)
        left: list[int] = []
        i, count = start, len(cost)
        while lowest:
            most, number = lowest[0]
            if cost[i] > -most:
                fitting = bisect_left(self.cheapness, most, i)
                left += range(i, fitting)
                i = fitting
            gap = gaps[number] = gaps[number] - cost[i]
            room = rooms[number] = rooms[number] - tokens[i]
            units[number].members.append(i)
            i += 1
            if i == count:
                break
            fits = min(gap, room * (token + pair * room))
            if fits >= last:
                heapq.heapreplace(lowest, (-fits, number))
            else:
                heapq.heappop(lowest)
        left += range(i, count)
        return units, left

    def _fill_level(
        self, left: Sequence[int], size: int, height: float, heavy: float, first: int, micro_steps: int
    ) -> tuple[list[Block], list[float]] | None:
        """Units of the level micro-steps and the height of each; None where a clip finds no room.

        Clips that cost more than `heavy` are counted with their all-to-all.
        """
        tokens, cost, travel = self.clips.tokens, self.clips.cost, self.cost.travelling_token
        blocks = _blocks(self.world_size, size)
        sizes = [block_size for _ in range(first, micro_steps) for _, block_size in blocks]
        members: list[list[int]] = [[] for _ in sizes]
        rooms = [self.room * block_size for block_size in sizes]
        token, pair = self.cost.token, self.cost.pair
        gaps = [height * block_size for block_size in sizes]
        # First the unit that is furthest below its height, or has room for the costliest clip if that is less.
        done = [(-min(gaps[i], rooms[i] * (token + pair * rooms[i])), i) for i in range(len(sizes))]
        heapq.heapify(done)
        # With so much room it is the cost that limits.
        ample = math.sqrt(gaps[0] / max(pair, 1e-300))
        travel *= (size - 1) / size
        for i in left:
            amount, length = cost[i], tokens[i]
            if amount > heavy:
                amount += travel * length
            aside = []
            while done and rooms[done[0][1]] < length:
                aside.append(heapq.heappop(done))
            if not done:
                return None
            number = done[0][1]
            gap = gaps[number] = gaps[number] - amount
            room = rooms[number] = rooms[number] - length
            first_of = gap if room > ample else min(gap, room * (token + pair * room))
            heapq.heapreplace(done, (-first_of, number))
            members[number].append(i)
            for entry in aside:
                if rooms[entry[1]] >= tokens[-1]:
                    heapq.heappush(done, entry)
        loads = [self._load(members[number], sizes[number], heavy) for number in range(len(sizes))]
        # Units of like load share a micro-step.
        levels, units = [0.0] * (micro_steps - first), []
        for place, (rank, block_size) in enumerate(blocks):
            numbers = range(place, len(sizes), len(blocks))
            if size == 1 and place:
                continue
            for step, number in enumerate(sorted(numbers, key=lambda number: -loads[number])) if size > 1 else ():
                units.append(Block(first + step, rank, block_size, members[number]))
                levels[step] = max(levels[step], loads[number])
        if size == 1:
            for position, number in enumerate(sorted(range(len(sizes)), key=lambda number: -loads[number])):
                step, rank = divmod(position, len(blocks))
                units.append(Block(first + step, rank, 1, members[number]))
                levels[step] = max(levels[step], loads[number])
        return units, levels

    def _load(self, members: list[int], size: int, heavy: float) -> float:
        """Of each rank of a block, were it level, with the all-to-all of clips that are expected to be shared."""
        cost = self.clips.cost
        load = sum([cost[i] for i in members])
        if size > 1:
            load += self.cost.travelling_token * self._over(members, heavy) * (size - 1) / size
        return load / size

    def _over(self, members: list[int], heavy: float) -> int:
        """Tokens of the clips that cost more."""
        return sum([self.clips.tokens[i] for i in members if self.clips.cost[i] > heavy])

def _blocks(world_size: int, size: int) -> list[tuple[int, int]]:
    """First rank and size of aligned blocks that cover the world, the last ones halved until they fit."""
    blocks, start = [], 0
    while start < world_size:
        while start + size > world_size:
            size //= 2
        blocks.append((start, size))
        start += size
    return blocks
