"""Who computes what: the clips of a global batch, spread over micro-steps and ranks. Pure.

Every micro-step is a rendezvous of all ranks, so what counts is that the packs of one micro-step cost the same. Clips
go, most expensive first, to the pack that has least to do and still has room (LPT, Graham 1969); packs of like cost
then share a micro-step. Nothing is dropped, cut or padded.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sora_train.config.root import ConfigError
from sora_train.data.order import GlobalBatch, PlannedSample

# Forward and backward cost of a clip in any unit, e.g. FLOPs.
Cost = Callable[[PlannedSample], float]


@dataclass(frozen=True)
class PackPlan:
    """One micro-step of one rank. Without samples the rank works on one filler token of weight 0."""

    step: int
    micro_step: int
    is_last: bool
    samples: tuple[PlannedSample, ...]
    # Of the whole step, on all ranks: what the loss is divided by.
    planned_tokens: int
    planned_samples: int

    @property
    def num_tokens(self) -> int:
        """Video tokens in the pack."""
        return sum(sample.num_tokens for sample in self.samples)


def assign(
    batch: GlobalBatch, world_size: int, max_tokens_per_pack: int, cost: Cost
) -> tuple[tuple[PackPlan, ...], ...]:
    """For each micro-step, the pack of each rank.

    Raises:
        ConfigError: a clip is larger than a pack may be.
    """
    samples, costs = batch.samples, [cost(sample) for sample in batch.samples]
    for sample in samples:
        if sample.num_tokens > max_tokens_per_pack:
            raise ConfigError(
                f"clip {sample.row.key} has {sample.num_tokens} tokens, over "
                f"data.max_tokens_per_pack={max_tokens_per_pack}: raise it"
            )
    micro_steps = max(1, -(-batch.num_tokens // (max_tokens_per_pack * world_size)))
    lengths = [sample.num_tokens for sample in samples]
    while (bins := pack_longest_first(lengths, costs, micro_steps * world_size, max_tokens_per_pack)) is None:
        micro_steps += 1
    bins.sort(key=lambda members: (-sum(costs[i] for i in members), members))
    return tuple(
        tuple(
            PackPlan(
                batch.step,
                micro_step,
                micro_step == micro_steps - 1,
                tuple(samples[i] for i in sorted(members)),
                batch.num_tokens,
                len(samples),
            )
            for members in bins[micro_step * world_size : (micro_step + 1) * world_size]
        )
        for micro_step in range(micro_steps)
    )


def pack_longest_first(
    lengths: Sequence[int], costs: Sequence[float], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Indices in each bin, or None when the greedy finds no room for one of them."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    least = [(0.0, number) for number in range(num_bins)]
    for i in sorted(range(len(lengths)), key=lambda i: (-costs[i], i)):
        full = []
        while least and tokens[least[0][1]] + lengths[i] > max_tokens:
            full.append(heapq.heappop(least))
        if not least:
            return None
        done, number = heapq.heappop(least)
        bins[number].append(i)
        tokens[number] += lengths[i]
        for entry in [*full, (done + costs[i], number)]:
            heapq.heappush(least, entry)
    return bins


def balance(micro_steps: Sequence[Sequence[PackPlan]], cost: Cost) -> float:
    """Share of the ranks' time that is work: mean rank cost over largest, both summed over micro-steps; 1 is ideal."""
    mean = largest = 0.0
    for packs in micro_steps:
        loads = [sum(cost(sample) for sample in pack.samples) for pack in packs]
        mean, largest = mean + sum(loads) / len(loads), largest + max(loads)
    return mean / largest
