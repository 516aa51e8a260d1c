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

How many micro-steps are tall is chosen by an estimate of the time that each choice would take.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from sora_train.cost.step_cost import StepCost

# All-to-all counts this many times its cost where plans are compared: it also waits, and cuts heads for the kernel.
SHARING_WEIGHT = 1.25
# In a block, clips over this part of a rank's height are expected to be shared.
EXPECTED_SHARED = 0.5
# Few clips even out less of an estimate's error: of up to so many, the best of some outlines is filled and compared.
FEW_CLIPS, TRIES = 64, 3
# Above this share of its height wasted, a level micro-step of whole clips is planned again with sharing.
WASTE = 0.004


@dataclass(frozen=True)
class PackLimits:
    """What a pack and a group may be."""

    max_tokens_per_pack: int  # on one rank
    largest_group: int = 1  # ranks that may share a clip: 1, 2, 4 or 8
    heads: int = 1  # of the model: a group divides them evenly

    def group_size(self, world_size: int) -> int:
        """Ranks of the largest group in a world of this size."""
        most = min(self.largest_group, world_size)
        return max(size for size in (1, 2, 4, 8) if size == 1 or (size <= most and self.heads % size == 0))


class Group(NamedTuple):
    """Neighbouring ranks in one micro-step, `first_rank` being a multiple of their number. Clips are numbers."""

    first_rank: int
    whole: list[list[int]]  # of each rank: the clips it holds alone
    shared: list[int]  # laid end to end in this order, and cut into one range for each rank
    shares: list[int]  # tokens in each rank's range; they add up to the tokens of the shared clips


class _Clips(NamedTuple):
    """Columns over clips, most expensive first."""

    tokens: list[int]
    cost: list[float]
    by_tokens: list[float]
    by_heads: list[float]
    repeated: list[float]
    tokens_before: list[int]  # one longer
    cost_before: list[float]


class _Outline(NamedTuple):
    """How many micro-steps are tall; estimates are of the whole step. Sorts by the estimated time."""

    time: float
    tall: int
    poor: int  # ranks without a long clip in the last tall micro-step
    rich: int  # size of the groups they join; 1: none
    heights: list[float]  # of each micro-step


class _Unit(NamedTuple):
    """Ranks that are filled together."""

    micro_step: int
    first_rank: int
    size: int
    members: list[int]


class _Filling(NamedTuple):
    """All clips on units, before they are laid out in them."""

    units: list[_Unit]
    heights: list[float]  # of each micro-step


def largest_clip_tokens(limits: PackLimits, world_size: int) -> int:
    """Tokens of the largest clip that this world can train on."""
    return limits.max_tokens_per_pack * limits.group_size(world_size)


def plan_groups(
    tokens: Sequence[int], text_rows: Sequence[int], world_size: int, limits: PackLimits, cost: StepCost
) -> list[list[Group]]:
    """For each micro-step the groups, by first rank, covering all ranks. No clip may be over `largest_clip_tokens`."""
    tokens_array, text_array = np.asarray(tokens, dtype=np.int64), np.asarray(text_rows, dtype=np.int64)
    costs = cost.of_clip(tokens_array.astype(np.float64), text_array)
    order = np.argsort(-costs.whole, kind="stable")
    sorted_tokens, sorted_cost = tokens_array[order].tolist(), costs.whole[order].tolist()
    clips = _Clips(
        sorted_tokens,
        sorted_cost,
        costs.by_tokens[order].tolist(),
        costs.by_heads[order].tolist(),
        costs.repeated[order].tolist(),
        [0, *accumulate(sorted_tokens)],
        [0.0, *accumulate(sorted_cost)],
    )
    planner = _Planner(clips, world_size, limits, cost)
    number = order.tolist()
    return [
        [
            Group(
                group.first_rank,
                [sorted([number[i] for i in members]) for members in group.whole],
                [number[i] for i in group.shared],
                group.shares,
            )
            for group in groups
        ]
        for groups in planner.plan()
    ]


class _Planner:
    def __init__(self, clips: _Clips, world_size: int, limits: PackLimits, cost: StepCost) -> None:
        self.clips, self.world_size, self.cost = clips, world_size, cost
        self.room = limits.max_tokens_per_pack
        self.group_size = limits.group_size(world_size)

    def plan(self) -> list[list[Group]]:
        micro_steps = max(1, -(-self.clips.tokens_before[-1] // (self.world_size * self.room)))
        tries = TRIES if len(self.clips.cost) <= FEW_CLIPS else 1
        while True:
            fillings: list[_Filling] = []
            for outline in sorted(self._outlines(micro_steps)):
                if (filling := self._fill(outline, micro_steps)) is not None:
                    fillings.append(filling)
                if len(fillings) == tries:
                    break
            if fillings:
                plans = [self._lay_out(filling, micro_steps) for filling in fillings]
                return plans[0] if len(plans) == 1 else min(plans, key=self._time)
            micro_steps += 1

    def _lay_out(self, filling: _Filling, micro_steps: int) -> list[list[Group]]:
        plan: list[list[Group]] = [[] for _ in range(micro_steps)]
        for unit in filling.units:
            plan[unit.micro_step] += self._groups(unit, filling.heights[unit.micro_step])
        return plan

    def _time(self, plan: list[list[Group]]) -> float:
        """Sum of the heights, and something for the tokens that travel."""
        tokens, cost = self.clips.tokens, self.clips.cost
        time, travelling = 0.0, 0
        for groups in plan:
            height = 0.0
            for _, whole, shared, shares in groups:
                fixed, a_token = self._shared_costs(shared, len(shares)) if shared else (0.0, 0.0)
                for clips, share in zip(whole, shares, strict=True):
                    height = max(height, sum([cost[i] for i in clips]) + fixed + share * a_token)
                travelling += sum([tokens[i] for i in shared])
            time += height
        return time + (SHARING_WEIGHT - 1) * self.cost.travelling_token * travelling / self.world_size

    def _outlines(self, micro_steps: int) -> Iterator[_Outline]:
        tokens, cost, world, room = self.clips.tokens, self.clips.cost, self.world_size, self.room
        tokens_before, cost_before = self.clips.tokens_before, self.clips.cost_before
        count, total = len(cost), cost_before[-1]
        cheapness = [-c for c in cost]
        weight = SHARING_WEIGHT * self.cost.travelling_token

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
        best: tuple[float, list[_Unit], list[float]] | None = None
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

    def _fill_tall(self, outline: _Outline) -> tuple[list[_Unit], list[int]]:
        """The units of the tall micro-steps, and the clips that are left."""
        tokens, cost, world = self.clips.tokens, self.clips.cost, self.world_size
        units: list[_Unit] = []
        start = 0
        for micro_step in range(outline.tall):
            poor, rich = (outline.poor, outline.rich) if micro_step == outline.tall - 1 else (0, 1)
            rank = 0
            if rich > 1:
                singles = world - rich * poor
                for number in range(poor):
                    members = list(range(start + singles + number, start + world - poor, poor))
                    units.append(_Unit(micro_step, rank, rich, members))
                    rank += rich
            for i in range(start, start + world - rank):
                units.append(_Unit(micro_step, rank + i - start, 1, [i] if i < len(cost) else []))
            start = min(start + world - (poor if rich > 1 else 0), len(cost))
        if not outline.tall:
            return units, list(range(len(cost)))
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
        for i in range(start, len(cost)):
            if not lowest:
                left += range(i, len(cost))
                break
            if cost[i] > -lowest[0][0]:
                left.append(i)
                continue
            number = lowest[0][1]
            units[number].members.append(i)
            gaps[number] -= cost[i]
            room = rooms[number] = rooms[number] - tokens[i]
            fits = min(gaps[number], room * (token + pair * room))
            if fits >= last:
                heapq.heapreplace(lowest, (-fits, number))
            else:
                heapq.heappop(lowest)
        return units, left

    def _fill_level(
        self, left: Sequence[int], size: int, height: float, heavy: float, first: int, micro_steps: int
    ) -> tuple[list[_Unit], list[float]] | None:
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
        for i in left:
            amount, length = cost[i], tokens[i]
            if size > 1 and amount > heavy:
                amount += travel * length * (size - 1) / size
            aside = []
            while done and rooms[done[0][1]] < length:
                aside.append(heapq.heappop(done))
            if not done:
                return None
            number = done[0][1]
            gap = gaps[number] = gaps[number] - amount
            room = rooms[number] = rooms[number] - length
            heapq.heapreplace(done, (-min(gap, room * (token + pair * room)), number))
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
                units.append(_Unit(first + step, rank, block_size, members[number]))
                levels[step] = max(levels[step], loads[number])
        if size == 1:
            for position, number in enumerate(sorted(range(len(sizes)), key=lambda number: -loads[number])):
                step, rank = divmod(position, len(blocks))
                units.append(_Unit(first + step, rank, 1, members[number]))
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

    def _groups(self, unit: _Unit, height: float) -> list[Group]:
        members, size, rank = unit.members, unit.size, unit.first_rank
        if size == 1:
            return [Group(rank, [members], [], [0])]
        if not members or self.clips.cost[members[0]] <= height:
            whole = self._spread(members, [], size, height * (1 + WASTE / 4))[0]
            if sum(map(len, whole)) == len(members):
                return [Group(rank + r, [clips], [], [0]) for r, clips in enumerate(whole)]
        return [self._share(unit, height)]

    def _share(self, unit: _Unit, height: float) -> Group:
        """One group: as few shared clips as keep all ranks below the height, if it can be kept."""
        tokens, cost = self.clips.tokens, self.clips.cost
        members, size = unit.members, unit.size
        shared, added = [i for i in members if cost[i] > height] or members[:1], 1
        while True:
            whole, shared, loads, rooms = self._spread(members, shared, size, height)
            shared_tokens = sum([tokens[i] for i in shared])
            fixed, a_token = self._shared_costs(shared, size)
            shares = _pour(loads, rooms, shared_tokens, a_token)
            # A group whose ranks are level gains nothing by sharing more.
            level = fixed + (sum(loads) + shared_tokens * a_token) / size
            most = fixed + max([load + share * a_token for load, share in zip(loads, shares, strict=True)])
            if len(shared) == len(members) or most <= max(height, level) * (1 + WASTE / 4):
                return Group(unit.first_rank, whole, shared, shares)
            held = set(shared)
            shared = sorted([*shared, *[i for i in members if i not in held][:added]])
            added *= 2

    def _shared_costs(self, shared: list[int], size: int) -> tuple[float, float]:
        """Of a rank in a group: whatever its share is, and for each token of its share."""
        clips, travel = self.clips, self.cost.travelling_token
        shared_tokens = sum([clips.tokens[i] for i in shared])
        fixed = sum([clips.by_heads[i] / size + clips.repeated[i] for i in shared]) + travel * shared_tokens / size / 2
        by_tokens = sum([clips.by_tokens[i] for i in shared]) / max(shared_tokens, 1)
        return fixed, by_tokens + travel * (size - 2) / size / 2

    def _spread(
        self, members: list[int], shared: list[int], size: int, height: float
    ) -> tuple[list[list[int]], list[int], list[float], list[int]]:
        """Clips whole on the rank with least to do; those that would end above the height are shared as well.

        Returns the clips of each rank, the shared clips, and of each rank the cost of its clips and the room left.
        """
        clips, travel = self.clips, self.cost.travelling_token
        tokens, cost = clips.tokens, clips.cost
        chosen = set(shared)
        while True:
            below = height - (self._shared_costs(sorted(chosen), size)[0] if chosen else 0.0)
            whole: list[list[int]] = [[] for _ in range(size)]
            rooms = [self.room] * size
            least, most = [(0.0, r) for r in range(size)], 0.0
            for i in members:
                if i in chosen:
                    continue
                load, r = least[0]
                load += cost[i]
                if load > below or rooms[r] < tokens[i]:
                    chosen.add(i)
                    below -= (clips.by_heads[i] + travel * tokens[i] / 2) / size + clips.repeated[i]
                    if most > below:
                        break
                    continue
                most = max(most, load)
                heapq.heapreplace(least, (load, r))
                rooms[r] -= tokens[i]
                whole[r].append(i)
            else:
                loads = [0.0] * size
                for load, r in least:
                    loads[r] = load
                return whole, sorted(chosen), loads, rooms


def _blocks(world_size: int, size: int) -> list[tuple[int, int]]:
    """First rank and size of aligned blocks that cover the world, the last ones halved until they fit."""
    blocks, start = [], 0
    while start < world_size:
        while start + size > world_size:
            size //= 2
        blocks.append((start, size))
        start += size
    return blocks


def _pour(loads: list[float], rooms: list[int], amount: int, cost: float) -> list[int]:
    """Whole tokens for each rank, `amount` in all, no rank over its room: the costliest rank as low as can be."""
    shares = [0.0] * len(loads)
    open_ranks, left = sorted(range(len(loads)), key=loads.__getitem__), float(amount)
    while open_ranks and left > 0:
        # The level of the lowest `wet` ranks, were the others dry.
        total = left * cost
        for wet, rank in enumerate(open_ranks):
            if wet and total / wet <= loads[rank]:
                break
            total += loads[rank]
        else:
            wet = len(open_ranks)
        level = total / wet
        full = [rank for rank in open_ranks[:wet] if (level - loads[rank]) > rooms[rank] * cost]
        if not full:
            for rank in open_ranks[:wet]:
                shares[rank] = (level - loads[rank]) / max(cost, 1e-300)
            break
        # Full ones stay full when the level rises for the others.
        for rank in full:
            shares[rank] = float(rooms[rank])
            left -= rooms[rank]
        open_ranks = [rank for rank in open_ranks if rank not in full]
    tokens = [min(int(share), room) for share, room in zip(shares, rooms, strict=True)]
    over = amount - sum(tokens)
    for rank in sorted(range(len(loads)), key=lambda rank: loads[rank] + tokens[rank] * cost):
        added = min(over, rooms[rank] - tokens[rank], max(1, -(-over // len(loads))))
        tokens[rank] += added
        over -= added
    for rank in range(len(loads)):
        added = min(over, rooms[rank] - tokens[rank])
        tokens[rank] += added
        over -= added
    return tokens
