"""Inside a block of ranks in one micro-step: which clips sit whole on which rank, and which all of them share. Pure.

`groups` decides which clips a block holds and how high its micro-step is. Blocks know nothing of each other, so a rank
lays out its own alone.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from sora_train.cost.step_cost import StepCost

# A rank may end above its micro-step's height by this part of it, if that saves sharing another clip.
TOLERANCE = 0.003


class Group(NamedTuple):
    """Neighbouring ranks in one micro-step, `first_rank` being a multiple of their number. Clips are numbers."""

    first_rank: int
    whole: list[list[int]]  # of each rank: the clips it holds alone
    shared: list[int]  # laid end to end in this order, and cut into one range for each rank
    shares: list[int]  # tokens in each rank's range; they add up to the tokens of the shared clips


class Clips(NamedTuple):
    """Columns over clips, most expensive first."""

    tokens: list[int]
    cost: list[float]
    by_tokens: list[float]
    by_heads: list[float]
    repeated: list[float]
    tokens_before: list[int]  # one longer
    cost_before: list[float]


class Block(NamedTuple):
    """Ranks that are filled together."""

    micro_step: int
    first_rank: int
    size: int
    members: list[int]


class Layout:
    """Lays out blocks of the clips of one step."""

    def __init__(self, clips: Clips, room: int, cost: StepCost, keeps_blocks: bool = False) -> None:
        """`room`: tokens that a rank may hold; `keeps_blocks`: every block is one group, whether or not it shares."""
        self.clips, self.room, self.cost, self.keeps_blocks = clips, room, cost, keeps_blocks

    def groups(self, unit: Block, height: float) -> list[Group]:
        """One group of the block's ranks, or one for each rank where nothing needs sharing."""
        members, size, rank = unit.members, unit.size, unit.first_rank
        if size == 1:
            return [Group(rank, [members], [], [0])]
        if not members or self.clips.cost[members[0]] <= height:
            whole = self._spread(members, [], size, height * (1 + TOLERANCE))[0]
            if sum(map(len, whole)) == len(members):
                if self.keeps_blocks:
                    return [Group(rank, whole, [], [0] * size)]
                return [Group(rank + r, [clips], [], [0]) for r, clips in enumerate(whole)]
        return [self._share(unit, height)]

    def _share(self, unit: Block, height: float) -> Group:
        """One group: as few shared clips as keep all ranks below the height, if it can be kept."""
        tokens, cost = self.clips.tokens, self.clips.cost
        members, size = unit.members, unit.size
        shared, added = [i for i in members if cost[i] > height] or members[:1], 1
        while True:
            whole, shared, loads, rooms = self._spread(members, shared, size, height)
            shared_tokens = sum([tokens[i] for i in shared])
            fixed, a_token = self.shared_costs(shared, size)
            shares = _pour(loads, rooms, shared_tokens, a_token)
            # A group whose ranks are level gains nothing by sharing more.
            level = fixed + (sum(loads) + shared_tokens * a_token) / size
            most = fixed + max([load + share * a_token for load, share in zip(loads, shares, strict=True)])
            if len(shared) == len(members) or most <= max(height, level) * (1 + TOLERANCE):
                return Group(unit.first_rank, whole, shared, shares)
            held = set(shared)
            shared = sorted([*shared, *[i for i in members if i not in held][:added]])
            added *= 2

    def shared_costs(self, shared: list[int], size: int) -> tuple[float, float]:
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
            below = height - (self.shared_costs(sorted(chosen), size)[0] if chosen else 0.0)
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


def parts(lengths: Sequence[int], shares: Sequence[int], group_rank: int) -> list[range]:
    """Of each shared clip, laid end to end and cut into `shares`, its own tokens that a rank holds; empty: none."""
    stop = sum(shares[: group_rank + 1])
    start, begin, found = stop - shares[group_rank], 0, []
    for length in lengths:
        held = range(max(start - begin, 0), min(stop - begin, length))
        found.append(held if held else range(0))
        begin += length
    return found


def owners(whole: Sequence[int], lengths: Sequence[int], turn: int) -> list[int]:
    """Of each shared clip the rank that reads and encodes it: one with least to read so far, the longest clips first
    (LPT, Graham 1969), so that none waits long for another.

    Args:
        whole: tokens of the clips that sit whole on each rank.
        lengths: tokens of each shared clip.
        turn: a number that differs from micro-step to micro-step, so that equals take turns.
    """
    size, loads, found = len(whole), list(whole), [0] * len(lengths)
    for clip in sorted(range(len(lengths)), key=lambda clip: -lengths[clip]):
        found[clip] = min(range(size), key=lambda rank: (loads[rank], (rank - turn) % size))
        loads[found[clip]] += lengths[clip]
    return found
