"""The tokens of a pack's documents: those of clips that this rank read, and those that neighbours hand it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_train.data.pack import Pack
from sora_train.data.packing import PackPlan
from sora_train.distributed.handing_round import Round
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.models.pack_layout import SharedClips


def tokens_here(
    pack: Pack, columns: Sequence[Sequence[Tensor | None]], widths: Sequence[int], groups: SequenceGroups
) -> tuple[list[Tensor], Tensor]:
    """Every rank of the pack's sequence group must call it, with the same columns.

    Args:
        pack: on the device of the columns.
        columns: values of tokens, each a list over documents: [n, width] of all n tokens of a clip that this rank
            reads, also where it holds only a part of them; None of other clips.
        widths: of each column.
        groups: of ranks that may share clips.

    Returns:
        Each column for the tokens here, [L, width]; and the weight of each document: 0 for a filler, or where any rank
        could not read what it was to read of the clip.
    """
    plan, count = pack.plan, pack.num_whole
    whole = [[rows for rows in column[:count] if rows is not None] for column in columns]
    if not plan.shared:
        return [torch.cat(rows) for rows in whole], pack.weight_S
    # The clips of which this rank holds tokens stand side by side among the shared ones.
    held = [number for number, part in enumerate(plan.parts(plan.group_rank)) if part]
    before = held[0] if held else 0
    weight = F.pad(pack.weight_S[count:], (before, len(plan.shared) - before - len(held)), value=1.0)
    rows: list[Tensor | None] = [None] * len(plan.shared)
    for number, values in zip(held, zip(*(column[count:] for column in columns), strict=True), strict=True):
        own = [value for value in values if value is not None]
        rows[number] = torch.cat(own, dim=1) if own else None
    parts = tuple(tuple(plan.parts(rank)) for rank in range(plan.group_size))
    handing = Round(parts, plan.owners, plan.first_rank, plan.group_rank, sum(widths))
    shared_LX, weight = handing.hand(rows, weight, groups)
    tokens = [
        torch.cat([*here, shared]) for here, shared in zip(whole, shared_LX.split(list(widths), dim=1), strict=True)
    ]
    return tokens, torch.cat([pack.weight_S[:count], weight[before : before + len(held)]])


def shared_clips(plan: PackPlan, device: torch.device) -> SharedClips | None:
    """What attention needs to know of the clips that a plan's group shares; None: none."""
    if not plan.shared:
        return None
    lengths = [sample.num_tokens for sample in plan.shared]
    return SharedClips.build(lengths, plan.shares, plan.first_rank, plan.group_rank, device)
