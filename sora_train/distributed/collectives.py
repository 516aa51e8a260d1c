"""The few exchanges between ranks that are not DeepSpeed's: sums of metrics, small facts, waiting."""

from typing import TypeVar

import torch
import torch.distributed as dist

Fact = TypeVar("Fact")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over all ranks, in place. Every rank must call it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_facts(fact: Fact, group: dist.ProcessGroup | None = None) -> list[Fact]:
    """Every rank's fact (small, picklable), in rank order, on every rank.

    Args:
        group: of all ranks, where the exchange is not the training thread's: threads must not share a group.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [fact]
    facts: list[Fact | None] = [None] * dist.get_world_size()
    dist.all_gather_object(facts, fact, group=group)
    return facts  # type: ignore[return-value]


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
