"""What is kept of a block's activations between forward and backward: everything, what was expensive, or its input.

Applied from outside through `VideoDiT.run_block`. `operations` is torch's selective checkpointing with two context
managers of our own: torch's look up every operation of the second run in the order of the first, and ZeRO-3 gathers
parameters at other moments in the backward pass. Ours match the kept operations only, each kind in its own order, and
can keep them on the host.
"""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint

from sora_train.config.parallel import Checkpointing
from sora_train.distributed.offload import Offload, fetch

aten = torch.ops.aten

Kept = dict[Any, deque[Any]]  # outputs by operation, in order


def is_expensive(operation: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether what an operation gives is kept rather than computed again: decided by its inputs alone, so that both
    runs decide alike.

    Attention of any kernel that is an operator of torch's (its cost is quadratic), and matrix products that do not
    widen: each kept number saves at least as many multiplications as a row is wide. Those that widen are the MLP's
    first: the largest activation of a block, and the cheapest to make again for its size. What came from other ranks is
    not sent again.
    """
    if operation in (aten.mm.default, aten.addmm.default):
        rows, weight = arguments[-2:]
        return bool(weight.shape[1] <= rows.shape[1])
    return is_attention_or_exchange(operation)


@functools.cache
def is_attention_or_exchange(operation: Any) -> bool:
    """By name, since every kernel brings its own: aten's SDPA, torch's varlen, flash-attn's; and our exchange."""
    name = str(operation).lower()
    is_attention = ("attention" in name or "attn" in name) and "backward" not in name
    return is_attention or name == "sora_train.exchange.default"


class _Keep(TorchDispatchMode):
    """First run: puts away what expensive operations give."""

    def __init__(self, kept: Kept, put: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.kept, self.put = kept, put

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code may run below; what happens inside it is not seen."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_expensive(func, args):
            # Detached: the tensor itself is about to get the graph that holds this.
            items = tree_map_only(Tensor, lambda tensor: self.put(tensor.detach()), out)
            self.kept.setdefault(func, deque()).append(items)
        return out


class _Reuse(_Keep):
    """Second run: takes it out again instead of computing it; each only once, so that it is freed as soon as used."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_expensive(func, args):
            return tree_map(fetch, self.kept[func].popleft())
        return func(*args, **(kwargs or {}))


def _keep_expensive(put: Callable[[Tensor], Any]) -> tuple[_Keep, _Reuse]:
    """The contexts of the two runs of one block."""
    kept: Kept = {}
    return _Keep(kept, put), _Reuse(kept, put)


class BlockRunner:
    """What `VideoDiT.run_block` becomes: runs each block in its mode, and keeps activations where they were told to be.

    Args:
        modes: of each block.
        offload: moves what is kept to the host; None leaves it on the device.
        call: runs a block, compiled or not.
    """

    def __init__(
        self, modes: dict[nn.Module, Checkpointing], offload: Offload | None, call: Callable[..., Tensor]
    ) -> None:
        self.modes, self.offload, self.call = modes, offload, call

    def __call__(self, block: nn.Module, *inputs: Any) -> Tensor:
        """As `call(block, *inputs)`."""
        mode = self.modes[block]
        if mode is Checkpointing.none or not torch.is_grad_enabled():
            return self.call(block, *inputs)
        contexts: dict[str, Any] = {}
        if mode is Checkpointing.operations:
            put = _stay if self.offload is None else self.offload.put
            contexts["context_fn"] = functools.partial(_keep_expensive, put)
        with nullcontext() if self.offload is None else self.offload.of_block(inputs[0]):
            # Blocks draw no random numbers: there is no state of a generator to keep.
            out: Tensor = checkpoint(
                self.call, block, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts
            )
        return out


def _stay(tensor: Tensor) -> Tensor:
    return tensor
