"""Stopping: a signal that reaches any rank, or a rank that cannot go on, stops all of them after the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class AgreedStop:
    """A wish to stop that becomes a fact for all ranks at the same step.

    Each step sends the wishes round without waiting; the answer is read a step later, so the device and the host
    never wait for it. Wishes travel on a gloo group of their own.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._wishes = torch.zeros(1, dtype=torch.int64)
        self._answer: dist.Work | None = None
        for number in _SIGNALS:
            signal.signal(number, self._wish)

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number

    def agreed(self, wishes: bool = False) -> bool:
        """Whether all ranks stop before the step that would begin now. Every rank must call it once a step.

        Args:
            wishes: this rank has a reason of its own to stop.
        """
        wishes = wishes or self.signal_number is not None
        if self._group is None:
            return wishes
        if self._answer is not None:
            self._answer.wait()
            if self._wishes.item() > 0:
                return True
        self._wishes = torch.tensor([int(wishes)])
        self._answer = dist.all_reduce(self._wishes, group=self._group, async_op=True)
        return False
