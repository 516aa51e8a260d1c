"""Attention over clips that neighbouring ranks share (Ulysses: Jacobs et al. 2023, arXiv:2309.14509), around any core.

A rank holds a share of a clip's tokens, whatever its length. Around self-attention the ranks of a group trade: each
gives its tokens of all heads and gets all tokens of its part of the heads. So attention itself runs as ever, over whole
clips, and the way back leaves each rank its own tokens with all heads. One all-to-all takes queries, keys and values
there, one takes the result back. Who shares what comes with the layout, pack by pack; process groups are made once.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.config.parallel import GROUP_SIZES
from sora_train.distributed.topology import World
from sora_train.models.attention_cores import Core
from sora_train.models.pack_layout import PackLayout, SharedClips

# An operator takes no process group, only its name.
_group_of_name: dict[str, dist.ProcessGroup] = {}


class SequenceGroups:
    """This rank's process groups, one of each size: a layout may name any of them in any micro-step."""

    def __init__(self, groups: dict[tuple[int, int], dist.ProcessGroup]) -> None:
        """`groups`: by first rank and size."""
        self._groups = groups

    @classmethod
    def build(cls, world: World, largest: int, timeout_seconds: float = 1800.0) -> "SequenceGroups":
        """Makes every group of aligned neighbours that fits the world; every rank must call it, and all in the same
        order as other process groups are made.

        Args:
            world: this rank.
            largest: ranks of the largest group, as `config.parallel.group_size` gives it; 1: there are no groups.
            timeout_seconds: after which an exchange that somebody did not join is an error.
        """
        groups: dict[tuple[int, int], dist.ProcessGroup] = {}
        for size in GROUP_SIZES:
            if size == 1 or size > largest:
                continue
            for first_rank in range(0, world.world_size - size + 1, size):
                ranks = list(range(first_rank, first_rank + size))
                group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_seconds))
                if world.global_rank in ranks:
                    groups[first_rank, size] = group
        for (_, size), group in groups.items():
            _group_of_name[group.group_name] = group
            # What cannot connect fails here. NCCL connects with the first exchange, which takes seconds.
            exchange(torch.zeros(size, device=world.device), group.group_name, [1] * size, [1] * size)
        return cls(groups)

    @property
    def largest(self) -> int:
        """Ranks of this rank's largest group; 1: it has none."""
        return max((size for _, size in self._groups), default=1)

    def of(self, first_rank: int, size: int) -> dist.ProcessGroup:
        """The group of `size` ranks from `first_rank` on, of which this rank is one.

        Raises:
            ValueError: there is none.
        """
        if (first_rank, size) not in self._groups:
            made = ", ".join(f"{size} from rank {first}" for first, size in self._groups) or "none"
            raise ValueError(f"no sequence group of {size} ranks from rank {first_rank}: this rank has {made}")
        return self._groups[first_rank, size]


class Ulysses:
    """A core that also attends to clips of which this rank holds a share; other documents go to `core` as they are."""

    def __init__(self, core: Core, groups: SequenceGroups) -> None:
        self.core, self.groups = core, groups

    def __call__(
        self, query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool
    ) -> Tensor:
        """Returns [L, N, K]; every rank of the group must call it, also one whose share is empty.

        Texts are on every rank that holds tokens of their clip: cross-attention needs no other rank.
        """
        shared = layout.shared
        if is_cross or shared is None:
            return self.core(query_LNK, key_MNK, value_MNK, layout, is_cross)
        counts = [query_LNK.shape[0] - shared.num_tokens, shared.num_tokens]
        (query, query_here), (key, key_here), (value, value_here) = (
            rows_LNK.split(counts) for rows_LNK in (query_LNK, key_MNK, value_MNK)
        )
        out_here = self._shared(query_here, key_here, value_here, shared)
        if layout.of_whole is None:
            return out_here
        return torch.cat([self.core(query, key, value, layout.of_whole, False), out_here])

    def _shared(self, query_nNK: Tensor, key_nNK: Tensor, value_nNK: Tensor, shared: SharedClips) -> Tensor:
        """This rank's n tokens of shared clips; T of all ranks, H of N heads here: [n, N, K]."""
        shares, size = list(shared.shares), len(shared.shares)
        name = self.groups.of(shared.first_rank, size).group_name
        tokens = query_nNK.shape[0]
        if query_nNK.shape[1] % size:
            raise ValueError(f"{query_nNK.shape[1]} heads cannot be divided among {size} ranks")
        # By receiver: each gets its heads of all tokens here.
        given = torch.stack(
            [rows_nNK.unflatten(1, (size, -1)).transpose(0, 1) for rows_nNK in (query_nNK, key_nNK, value_nNK)], dim=2
        )
        query_THK, key_THK, value_THK = exchange(given.flatten(0, 1), name, [tokens] * size, shares).unbind(1)
        out_THK = self.core(query_THK, key_THK, value_THK, shared.of_all, False)
        # By sender: from each its heads of the tokens here.
        back = exchange(out_THK, name, shares, [tokens] * size)
        return back.unflatten(0, (size, tokens)).transpose(0, 1).flatten(1, 2)


def exchange(rows: Tensor, group: str, send: list[int], receive: list[int]) -> Tensor:
    """All-to-all of rows [sum(send), …] -> [sum(receive), …]: so many to, and from, each rank of the group, in order.

    The counts are the host's: nothing waits for the device. Its gradient is the same exchange the other way.
    """
    received: Tensor = torch.ops.sora_train.exchange.default(rows, group, send, receive)
    return received


def _exchange(rows: Tensor, group: str, send: list[int], receive: list[int]) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=_group_of_name[group])
    return received


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group, ctx.send, ctx.receive = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return exchange(gradient, ctx.group, ctx.receive, ctx.send), None, None, None


# An operator, so that selective checkpointing can keep what travelled. Not a `custom_op`: what that returns is in a
# cycle of references, and stays in memory until the garbage collector comes by.
torch.library.define("sora_train::exchange", "(Tensor rows, str group, int[] send, int[] receive) -> Tensor")
torch.library.impl("sora_train::exchange", "CompositeExplicitAutograd", _exchange)
torch.library.register_autograd("sora_train::exchange", _backward, setup_context=_remember)
