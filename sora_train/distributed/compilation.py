"""torch.compile of the blocks, once for packs of all lengths.

A block is compiled in pieces: what lies before, between and after its attention cores. A core loops over documents, or
calls a kernel or a neighbour rank, as the pack's layout says in host integers; compiled with the rest it would be
compiled anew for each layout. The pieces see tensors only, all of whose sizes are symbols from the first pack on. Three
habits of the compiler would still give a size its own version, and are kept away from it: it takes two sizes that are
equal in the first pack for one, and it treats a size of 1 apart. So the modulation of a pack with one sample gets a
second row that nobody reads, and a pack of one token (a rank without work) or with one text row runs as it is.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config

from sora_train.models.attention import Attention
from sora_train.models.layers import Block

log = logging.getLogger(__name__)


def compile_blocks(blocks: Iterable[nn.Module], device: torch.device, backend: str | Callable[..., Any]) -> None:
    """Replaces what each block runs. Where nothing can be compiled, one warning says why, and blocks run as they are.

    Forward passes without gradients (validation) are not compiled.
    """
    try:
        _try_compiler(device, backend)
    except _compiler_error() as error:
        _warn(error)
        return
    compiled = CompiledForward(backend)
    for block in blocks:
        assert isinstance(block, Block)
        for module in block.modules():
            if isinstance(module, Attention):
                module.core = torch.compiler.disable(module.core)
        block.forward = compiled.of(block)  # type: ignore[method-assign]


class CompiledForward:
    """The one compiled form of all blocks: their weights are its inputs."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self._forward: Callable[..., Tensor] = torch.compile(Block.forward, dynamic=True, backend=backend)
        self._has_failed = False

    def of(self, block: Block) -> Callable[..., Tensor]:
        """The forward of one block."""

        def forward(tokens_LD: Tensor, text_MD: Tensor, modulation_R6D: Tensor, *others: Any) -> Tensor:
            images = [rows for rows in others if isinstance(rows, Tensor)]
            has_single_row = min(rows.shape[0] for rows in (tokens_LD, text_MD, *images)) == 1
            if self._has_failed or has_single_row or not torch.is_grad_enabled():
                return Block.forward(block, tokens_LD, text_MD, modulation_R6D, *others)
            if modulation_R6D.shape[0] == 1:
                # A view of rows, as it was: the compiler tells views from tensors of their own.
                modulation_R6D = modulation_R6D.flatten(1).expand(2, -1).contiguous().unflatten(1, (6, -1))
            try:
                with _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                    return self._forward(block, tokens_LD, text_MD, modulation_R6D, *others)
            except _compiler_error() as error:
                self._has_failed = True
                _warn(error)
                return Block.forward(block, tokens_LD, text_MD, modulation_R6D, *others)

        return forward


def _try_compiler(device: torch.device, backend: str | Callable[..., Any]) -> None:
    """Compiles a function of one line, forward and backward. Raises TorchDynamoException when that cannot be done."""
    rows = torch.ones(4, device=device, requires_grad=True)
    torch.compile(lambda values: (values * 2).sin().sum(), backend=backend)(rows).backward()


def _compiler_error() -> type[Exception]:
    # Imported when it is needed: with it comes the whole compiler, in seconds, which sets variables of the environment.
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def _warn(error: Exception) -> None:
    inner = getattr(error, "inner_exception", error)  # what the backend raised
    reason = next((line for line in str(inner).splitlines() if line.strip()), type(inner).__name__)
    log.warning("parallel.compile: blocks run as they are, not compiled: %s", reason)
