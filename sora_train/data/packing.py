"""Who computes what: the clips of a global batch, spread over micro-steps and ranks. Pure.

`groups` decides on integers; here its answer becomes a plan for each rank. In each micro-step the ranks form sequence
groups of 1, 2, 4 or 8 neighbours. A rank of a group holds

1. the clips that sit whole on it: their attention is its own, with all heads, and they never travel;
2. its range of the group's shared clips: these are laid end to end, in the order given, and the sequence is cut into
   one range for each rank, in the order of the ranks and as long as `shares` says. Ranges differ in length, may be
   empty and may begin inside a clip. All-to-all gives each rank all of these tokens for 1/group_size of the heads,
   where attention is per clip, and takes the results back.

A shared clip is read and encoded by one rank of the group, its owner, which hands the others their tokens of it.
Nothing is dropped, cut or padded; no rank ever holds more than `max_tokens_per_pack` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from sora_train.config.root import ConfigError
from sora_train.cost.step_cost import StepCost, features
from sora_train.data.groups import PackLimits, StepGroups, largest_clip_tokens, plan_groups
from sora_train.data.order import GlobalBatch, PlannedSample
from sora_train.data.sharing import Group, owners, parts

__all__ = [
    "PackLimits",
    "PackPlan",
    "Piece",
    "assign",
    "balance",
    "largest_clip_tokens",
    "rank_features",
    "travelling_tokens",
]


class Piece(NamedTuple):
    """What a rank has to do with one clip."""

    sample: PlannedSample
    # Of the clip's tokens, those on this rank: all of them, or its part of a shared clip. Empty: the rank reads the
    # clip for its neighbours alone.
    part: range
    is_owned: bool  # this rank reads and encodes the clip; of another it reads the text alone
    shared: int | None = None  # number among the shared clips of the group; None: it sits whole on this rank


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
    owners: tuple[int, ...] = ()  # of each shared clip, the rank of the group that reads it
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

    def parts(self, group_rank: int) -> list[range]:
        """Of each shared clip, its own tokens that a rank of the group holds; empty: none."""
        return parts([sample.num_tokens for sample in self.shared], self.shares, group_rank)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All clips that this rank has to do with: first those with tokens here, in their order, then those without."""
        whole = [Piece(sample, range(sample.num_tokens), True) for sample in self.samples]
        shared = [
            Piece(sample, part, owner == self.group_rank, number)
            for number, (sample, part, owner) in enumerate(
                zip(self.shared, self.parts(self.group_rank), self.owners, strict=True)
            )
        ]
        held = [piece for piece in shared if piece.part]
        return (*whole, *held, *[piece for piece in shared if piece.is_owned and not piece.part])

    @property
    def num_tokens(self) -> int:
        """Video tokens on this rank."""
        return sum(sample.num_tokens for sample in self.samples) + self.shares[self.group_rank]


class MicroStep(Sequence[PackPlan]):
    """The packs of all ranks in one micro-step, each made when it is asked for: a rank pays for its own alone."""

    def __init__(self, batch: GlobalBatch, planned_tokens: int, groups: StepGroups, micro_step: int, world_size: int):
        self._batch, self._planned_tokens, self._groups = batch, planned_tokens, groups
        self._micro_step, self._world_size = micro_step, world_size
        self._packs: dict[int, PackPlan] = {}

    def __len__(self) -> int:
        """Ranks."""
        return self._world_size

    @overload
    def __getitem__(self, rank: int) -> PackPlan: ...
    @overload
    def __getitem__(self, rank: slice) -> list[PackPlan]: ...
    def __getitem__(self, rank: int | slice) -> PackPlan | list[PackPlan]:
        """The pack of a rank, or of several."""
        if isinstance(rank, slice):
            return [self[each] for each in range(self._world_size)[rank]]
        rank = range(self._world_size)[rank]
        if rank not in self._packs:
            self._make(self._groups.of_rank(self._micro_step, rank))
        return self._packs[rank]

    def _make(self, group: Group) -> None:
        samples = self._batch.samples
        shared, shares = tuple([samples[i] for i in group.shared]), tuple(group.shares)
        owned_by: tuple[int, ...] = ()
        if shared:
            whole_tokens = [sum([samples[i].num_tokens for i in whole]) for whole in group.whole]
            turn = self._batch.step + self._micro_step
            owned_by = tuple(owners(whole_tokens, [sample.num_tokens for sample in shared], turn))
        for group_rank, whole in enumerate(group.whole):
            self._packs[group.first_rank + group_rank] = PackPlan(
                self._batch.step,
                self._micro_step,
                self._micro_step == len(self._groups) - 1,
                tuple([samples[i] for i in whole]),
                self._planned_tokens,
                len(samples),
                shared,
                shares,
                owned_by,
                group.first_rank,
                group_rank,
            )


def assign(
    batch: GlobalBatch, world_size: int, limits: PackLimits, cost_model: StepCost
) -> tuple[Sequence[PackPlan], ...]:
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
    text_bytes = [sample.text_bytes for sample in samples]
    rows = {count: cost_model.text_rows(count) for count in set(text_bytes)}
    groups = plan_groups(tokens, [rows[count] for count in text_bytes], world_size, limits, cost_model)
    return tuple(MicroStep(batch, sum(tokens), groups, number, world_size) for number in range(len(groups)))


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
