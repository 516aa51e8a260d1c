"""Memory of packs, which decoding processes fill: lent to tensors and used again when they are gone."""

import mmap
import os
from collections import deque
from itertools import count
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from sora_train.data.handover import memory_file


class Block:
    """Memory that can be handed to a child: `file` is its descriptor, `map` the bytes, `number` its own."""

    _numbers = count(1)

    def __init__(self, num_bytes: int) -> None:
        self.number = next(self._numbers)
        self.num_bytes = -(-max(1, num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.file = memory_file(self.num_bytes)
        self.map = mmap.mmap(self.file, self.num_bytes)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


class Blocks:
    """Blocks that are used again once nothing refers to their bytes: memory that is new costs ten times a copy.

    Together they never have more bytes than were in use at one time.
    """

    def __init__(self) -> None:
        self._free: list[Block] = []
        # Filled by finalizers, which run at any time, in any thread.
        self._returned: deque[Block] = deque()
        self._in_use: dict[int, int] = {}  # bytes by number
        self._most = 0

    def take(self, num_bytes: int) -> Block:
        """One of at least so many bytes, with whatever was last written there."""
        while self._returned:
            self.give_back(self._returned.popleft())
        fitting = [block for block in self._free if block.num_bytes >= num_bytes]
        if fitting:
            block = min(fitting, key=lambda block: block.num_bytes)
            self._free.remove(block)
        else:
            block = Block(num_bytes)
        self._in_use[block.number] = block.num_bytes
        self._most = max(self._most, sum(self._in_use.values()))
        while self._free and self.num_bytes > self._most:
            self._free.remove(min(self._free, key=lambda block: block.num_bytes))
        return block

    def give_back(self, block: Block) -> None:
        """Of a block that nothing refers to."""
        del self._in_use[block.number]
        self._free.append(block)

    def lend(self, block: Block) -> Tensor:
        """Its bytes, uint8; the block comes back when the last view of the tensor is gone."""
        array = np.frombuffer(block.map, dtype=np.uint8)
        finalize(array, self._returned.append, block).atexit = False
        # A slice of the array would refer to the map behind it and not keep it alive; slices of the tensor do.
        return torch.from_numpy(array)

    @property
    def num_bytes(self) -> int:
        """In use and free."""
        return sum(self._in_use.values()) + sum(block.num_bytes for block in self._free)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of all blocks that there are."""
        return (*self._in_use, *(block.number for block in self._free))
