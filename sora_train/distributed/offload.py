"""Activations in the host's memory between forward and backward, copied on a stream of their own while blocks run.

What checkpointing keeps of a block goes out as soon as it is made, and comes back while the block after it (in the
order of the model) is in its backward pass: one block ahead. On a CPU the same steps are plain copies.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Smaller tensors stay: a copy costs more than the memory is worth.
MIN_BYTES = 2**18


class Offload:
    """Sends tensors out and brings them back; `moved_bytes` counts what went out so far."""

    def __init__(self, device: torch.device, min_bytes: int = MIN_BYTES) -> None:
        self.min_bytes = min_bytes
        self.moved_bytes = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._block: _Block | None = None

    @contextmanager
    def of_block(self, tokens: Tensor) -> Iterator[None]:
        """Around a checkpointed block: its input goes out too. What blocks share (text, modulation) stays."""
        self._block = _Block(self._block)
        place = tokens.data_ptr()

        def pack(tensor: Tensor) -> "Tensor | Away":
            return self.put(tensor) if tensor.data_ptr() == place else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, fetch):
            yield

    def put(self, tensor: Tensor) -> "Tensor | Away":
        """Sends a tensor out; small ones are returned as they are."""
        if self._block is None or tensor.nbytes < self.min_bytes:
            return tensor
        self.moved_bytes += tensor.nbytes
        return Away(tensor, self.stream, self._block)


def fetch(item: "Tensor | Away") -> Tensor:
    """What `Offload.put` was given."""
    return item.get() if isinstance(item, Away) else item


class Away:
    """One tensor on the host."""

    def __init__(self, tensor: Tensor, stream: "torch.cuda.Stream | None", block: "_Block") -> None:
        self.stream, self.block, self.device = stream, block, tensor.device
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        # Strides as they were: kernels sum in an order that may depend on them.
        self.host = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=stream is not None
        )
        if stream is None:
            self.host.copy_(tensor)
        else:
            stream.wait_stream(torch.cuda.current_stream(self.device))  # until it is computed
            with torch.cuda.stream(stream):
                self.host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # its memory is not given away before it is copied
        block.items.add(self)

    def start(self) -> None:
        """Begins the way back, if it has not begun."""
        if self._back is not None:
            return
        self._back = torch.empty_strided(
            self.host.shape, self.host.stride(), dtype=self.host.dtype, device=self.device
        )
        if self.stream is None:
            self._back.copy_(self.host)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # until the memory is free
            with torch.cuda.stream(self.stream):
                self._back.copy_(self.host, non_blocking=True)
                self._arrived = self.stream.record_event()

    def get(self) -> Tensor:
        """The tensor on its device; what the block before will need sets out."""
        self.start()
        assert self._back is not None
        self.block.start_previous()
        if self._arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived)
        return self._back


class _Block:
    """What went out of one block; held by its items alone, so that it ends with them."""

    def __init__(self, previous: "_Block | None") -> None:
        self.items: weakref.WeakSet[Away] = weakref.WeakSet()
        self._previous = None if previous is None else weakref.ref(previous)

    def start_previous(self) -> None:
        """Once: brings the items of the block before on their way."""
        previous = None if self._previous is None else self._previous()
        self._previous = None
        for item in () if previous is None else previous.items:
            item.start()
