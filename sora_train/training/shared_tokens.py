"""The tokens of a pack's documents: of clips that this rank read, and of those that neighbours hand it."""

from collections.abc import Sequence

import torch
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
        columns: values of tokens, each a list over the pack's pieces: [n, width] of all n tokens of a clip that this
            rank reads, also where it holds only a part of them or none; None of other clips.
        widths: of each column.
        groups: of ranks that may share clips.

    Returns:
        Each column for the tokens here, [L, width]; and the weight of each document: 0 for a filler, or where any rank
        could not read what it was to read of the clip.
    """
    plan, count = pack.plan, pack.num_whole
    whole = [[rows for rows in column[:count] if rows is not None] for column in columns]
    if not plan.shared:
        return [torch.cat(rows) for rows in whole], pack.weight
    rows: list[Tensor | None] = [None] * len(plan.shared)
    weight = [pack.weight.new_ones(())] * len(plan.shared)
    for place, piece in enumerate(pack.pieces):
        if piece.shared is not None:
            weight[piece.shared] = pack.weight[place]
            values = [column[place] for column in columns]
            if piece.is_owned:
                rows[piece.shared] = torch.cat([value for value in values if value is not None], dim=1)
    parts = tuple(tuple(plan.parts(rank)) for rank in range(plan.group_size))
    handing = Round(parts, plan.owners, plan.first_rank, plan.group_rank, sum(widths))
    shared_LX, shared_weight = handing.hand(rows, torch.stack(weight), groups)
    tokens = [
        torch.cat([*here, shared]) for here, shared in zip(whole, shared_LX.split(list(widths), dim=1), strict=True)
    ]
    # The clips of which this rank holds tokens stand side by side.
    held = [document.shared for document in pack.documents if document.shared is not None]
    held_weight = shared_weight[held[0] : held[-1] + 1] if held else shared_weight[:0]
    return tokens, torch.cat([pack.weight[:count], held_weight])


def shared_clips(plan: PackPlan, device: torch.device) -> SharedClips | None:
    """What attention needs to know of the clips that a plan's group shares; None: none."""
    if not plan.shared:
        return None
    lengths = [sample.num_tokens for sample in plan.shared]
    return SharedClips.build(lengths, plan.shares, plan.first_rank, plan.group_rank, device)
