"""Tokens of shared clips, from the rank that read and encoded a clip to the ranks that hold parts of it.

One all-to-all of the group a micro-step. Nothing is asked of the device on the way: how many rows go where follows
from the plan, on all ranks alike. With the rows each rank tells whether it could read what it was to read of a clip,
so that one that failed anywhere is masked everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_train.distributed.sequence_parallel import SequenceGroups, exchange


@dataclass(frozen=True)
class Round:
    """Who gets which rows from whom: the same on all ranks of the group, but for group_rank. Host integers."""

    parts: tuple[tuple[range, ...], ...]  # by rank of the group, then by clip: the rows that it gets of it
    owners: tuple[int, ...]  # of each clip, the rank that has all of its rows
    first_rank: int  # of the group in the world
    group_rank: int
    width: int  # numbers in a row

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return len(self.parts)

    @property
    def _flag_rows(self) -> int:
        """As many as the clips' flags fill."""
        return math.ceil(len(self.owners) / self.width)

    def rows_between(self, giver: int, taker: int) -> int:
        """How many rows a rank sends to another, or to itself; flags come first."""
        owned = [part for part, owner in zip(self.parts[taker], self.owners, strict=True) if owner == giver]
        return self._flag_rows + sum(len(part) for part in owned)

    def given(self, rows: Sequence[Tensor | None], weight_S: Tensor) -> Tensor:
        """What this rank sends, rank after rank.

        Args:
            rows: of each clip that this rank owns all rows [n, width].
            weight_S: of each clip 0 where this rank could not read what it was to read of it, else 1.
        """
        empty = weight_S.new_zeros(0, self.width)
        flags = F.pad(weight_S, (0, self._flag_rows * self.width - len(weight_S))).view(-1, self.width)
        sent = []
        for parts in self.parts:
            sent.append(flags)
            for part, owner, whole in zip(parts, self.owners, rows, strict=True):
                if owner == self.group_rank and part:
                    assert whole is not None, "a rank has the rows of the clips that it owns"
                    sent.append(whole[part.start : part.stop])
        return torch.cat([empty, *sent])

    def taken(self, received: Tensor) -> tuple[Tensor, Tensor]:
        """Of what came, sender after sender: this rank's rows [share, width] in the order of the clips, and of each
        clip whether all could read, float [clips]."""
        by_sender = received.split([self.rows_between(giver, self.group_rank) for giver in range(self.size)])
        flags = torch.stack([rows[: self._flag_rows].flatten()[: len(self.owners)] for rows in by_sender])
        begin, found = [self._flag_rows] * self.size, [received[:0]]
        for part, owner in zip(self.parts[self.group_rank], self.owners, strict=True):
            found.append(by_sender[owner][begin[owner] : begin[owner] + len(part)])
            begin[owner] += len(part)
        return torch.cat(found), flags.amin(0)

    def hand(self, rows: Sequence[Tensor | None], weight_S: Tensor, groups: SequenceGroups) -> tuple[Tensor, Tensor]:
        """`given`, sent, and `taken`. Every rank of the group must call it."""
        send = [self.rows_between(self.group_rank, taker) for taker in range(self.size)]
        receive = [self.rows_between(giver, self.group_rank) for giver in range(self.size)]
        group = groups.of(self.first_rank, self.size).group_name
        return self.taken(exchange(self.given(rows, weight_S), group, send, receive))
