"""Who computes what: the clips of a global batch, spread over micro-steps and ranks. Pure.

`groups` decides on integers; here its answer becomes a plan for each rank. In each micro-step the ranks form sequence
groups of 1, 2, 4 or 8 neighbours. A rank of a group holds

1. the clips that sit whole on it: their attention is its own, with all heads, and they never travel;
2. its range of the group's shared clips: these are laid end to end, in the order given, and the sequence is cut into
   one range for each rank, in the order of the ranks and as long as `shares` says. Ranges differ in length, may be
   empty and may begin inside a clip. All-to-all gives each rank all of these tokens for 1/group_size of the heads,
   where attention is per clip, and takes the results back.

Nothing is dropped, cut or padded; no rank ever holds more than `max_tokens_per_pack` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sora_train.config.root import ConfigError
from sora_train.cost.step_cost import StepCost, features
from sora_train.data.groups import PackLimits, largest_clip_tokens, plan_groups
from sora_train.data.order import GlobalBatch, PlannedSample

__all__ = ["PackLimits", "PackPlan", "assign", "balance", "largest_clip_tokens", "rank_features", "travelling_tokens"]


@dataclass(frozen=True)
class PackPlan:
    """One micro-step of one rank. With neither clips nor a share the rank works on one filler token of weight 0."""

    step: int
    micro_step: int
    is_last: bool
    samples: tuple[PlannedSample, ...]  # whole on this rank
    # Of the whole step, on all ranks: what the loss is divided by.
    planned_tokens: int
    planned_samples: int
    # The sequence group: the same on all its ranks, but for group_rank.
    shared: tuple[PlannedSample, ...] = ()
    shares: tuple[int, ...] = (0,)  # tokens of the shared sequence on each rank of the group
    first_rank: int = 0  # of the group; a multiple of its size
    group_rank: int = 0  # of this rank in it

    @property
    def group_size(self) -> int:
        """Ranks in the group: 1, 2, 4 or 8."""
        return len(self.shares)

    @property
    def share(self) -> range:
        """This rank's tokens in the sequence of shared clips."""
        start = sum(self.shares[: self.group_rank])
        return range(start, start + self.shares[self.group_rank])

    @property
    def num_tokens(self) -> int:
        """Video tokens on this rank."""
        return sum(sample.num_tokens for sample in self.samples) + self.shares[self.group_rank]


def assign(
    batch: GlobalBatch, world_size: int, limits: PackLimits, cost_model: StepCost
) -> tuple[tuple[PackPlan, ...], ...]:
    """For each micro-step, the pack of each rank.

    Raises:
        ConfigError: a clip is larger than the largest group may hold.
    """
    samples = batch.samples
    tokens = [sample.num_tokens for sample in samples]
    largest = largest_clip_tokens(limits, world_size)
    if tokens and max(tokens) > largest:
        sample = samples[tokens.index(max(tokens))]
        group_size = limits.group_size(world_size)
        raise ConfigError(
            f"clip {sample.row.key} has {sample.num_tokens} tokens, over data.max_tokens_per_pack="
            f"{limits.max_tokens_per_pack} on each of {group_size} rank{'s' * (group_size > 1)} that may share it: "
            "raise it"
        )
    text_rows = [cost_model.text_rows(sample.text_bytes) for sample in samples]
    micro_steps = plan_groups(tokens, text_rows, world_size, limits, cost_model)
    planned = (sum(tokens), len(samples))
    return tuple(
        tuple(
            PackPlan(
                batch.step,
                micro_step,
                micro_step == len(micro_steps) - 1,
                tuple([samples[i] for i in whole]),
                *planned,
                shared,
                shares,
                group.first_rank,
                group_rank,
            )
            for group in groups
            for shared, shares in [(tuple([samples[i] for i in group.shared]), tuple(group.shares))]
            for group_rank, whole in enumerate(group.whole)
        )
        for micro_step, groups in enumerate(micro_steps)
    )


def rank_features(plan: PackPlan, cost_model: StepCost) -> list[float]:
    """What the plan's rank has to do, in the units that `StepCost` prices: for `of_features` and `fit`."""
    whole, shared = (
        [(sample.num_tokens, cost_model.text_rows(sample.text_bytes)) for sample in samples]
        for samples in (plan.samples, plan.shared)
    )
    return features(whole, shared, len(plan.share), plan.group_size)


def balance(micro_steps: Sequence[Sequence[PackPlan]], cost_model: StepCost) -> float:
    """Share of the ranks' time that is work: mean rank cost over largest, both summed over micro-steps; 1 is ideal.

    All-to-all counts as work in both.
    """
    mean = largest = 0.0
    for packs in micro_steps:
        loads = [cost_model.of_features(rank_features(pack, cost_model)) for pack in packs]
        mean, largest = mean + sum(loads) / len(loads), largest + max(loads)
    return mean / largest


def travelling_tokens(micro_steps: Sequence[Sequence[PackPlan]]) -> int:
    """Tokens that pass through all-to-all: all those of shared clips."""
    return sum(pack.shares[pack.group_rank] for packs in micro_steps for pack in packs)
