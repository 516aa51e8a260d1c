"""torch.compile of the blocks, once for packs of all lengths.

A block is compiled in pieces: what lies before, between and after its attention cores. A core loops over documents, or
calls a kernel or a neighbour rank, as the pack's layout says in host integers; compiled with the rest it would be
compiled anew for each layout. The pieces see tensors only, all of whose sizes are symbols from the first pack on. Three
habits of the compiler would still give a size its own version, and are kept away from it: it takes two sizes that are
equal in the first pack for one, and it treats a size of 1 apart. So the modulation of a pack with one sample gets a
second row that nobody reads, and a pack of one token (a rank without work) or with one text row runs as it is.

So each piece is compiled once a run; twice where packs come in two forms, with a t a clip and with a t a token.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx.experimental import _config  # torch's own messages name this setting; it has no public one

from sora_train.models.attention import Attention
from sora_train.models.attention_cores import Core
from sora_train.models.layers import Block
from sora_train.models.pack_layout import PackLayout

log = logging.getLogger(__name__)


def compile_blocks(
    blocks: Iterable[nn.Module], device: torch.device, backend: str | Callable[..., Any]
) -> "CompiledForward | None":
    """Replaces what each block runs. Where nothing can be compiled, one warning says why, and blocks run as they are.

    Forward passes without gradients (validation) are not compiled.

    Returns:
        What was compiled, for `CompiledForward.or_as_it_is`; None: nothing.
    """
    try:
        _try_compiler(device, backend)
    except RuntimeError as error:  # a line of torch's own: whatever stops it is the compiler
        _warn(error)
        return None
    compiled = CompiledForward(backend)
    for block in blocks:
        assert isinstance(block, Block)
        for module in block.modules():
            if isinstance(module, Attention):
                module.core = _not_compiled(module.core)
        block.forward = compiled.of(block)  # type: ignore[method-assign]
    return compiled


class CompiledForward:
    """The one compiled form of all blocks: their weights are its inputs."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self._forward: Callable[..., Tensor] = torch.compile(Block.forward, dynamic=True, backend=backend)
        self.has_failed = False  # blocks run as they are

    def of(self, block: Block) -> Callable[..., Tensor]:
        """The forward of one block."""

        def forward(tokens_LD: Tensor, text_MD: Tensor, modulation_R6D: Tensor, *others: Any) -> Tensor:
            images = [rows for rows in others if isinstance(rows, Tensor)]
            has_single_row = min(rows.shape[0] for rows in (tokens_LD, text_MD, *images)) == 1
            if self.has_failed or has_single_row or not torch.is_grad_enabled():
                return Block.forward(block, tokens_LD, text_MD, modulation_R6D, *others)
            if modulation_R6D.shape[0] == 1:
                # A view of rows, as it was: the compiler tells views from tensors of their own.
                modulation_R6D = modulation_R6D.flatten(1).expand(2, -1).contiguous().unflatten(1, (6, -1))
            with _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                return self._forward(block, tokens_LD, text_MD, modulation_R6D, *others)

        return forward

    def or_as_it_is(self, run_block: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`run_block`, and where it fails compiled, the same on the block as it is: one warning says why, and nothing
        is compiled from then on. A block that fails either way raises its own error.

        Around everything that keeps activations: what a run that failed halfway had kept, goes with it.
        """

        def run(block: nn.Module, *inputs: Any) -> Tensor:
            try:
                return run_block(block, *inputs)
            except (torch.OutOfMemoryError, dist.DistError):  # the block's own, and no rank repeats a collective alone
                raise
            except RuntimeError as error:
                if self.has_failed:
                    raise
                self.has_failed, reason = True, error
            out = run_block(block, *inputs)
            _warn(reason)
            return out

        return run


def _not_compiled(core: Core) -> Core:
    """A core that always gives a tensor of its own: of a view, the compiler looks at what it is a view of, and compiles
    the next piece anew for a pack of one clip, or of clips of one length."""

    def run(query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool) -> Tensor:
        out_LNK = core(query_LNK, key_MNK, value_MNK, layout, is_cross)
        is_own = out_LNK._base is None and out_LNK.is_contiguous()
        return out_LNK if is_own else out_LNK.clone(memory_format=torch.contiguous_format)

    not_compiled: Core = torch.compiler.disable(run)
    return not_compiled


def _try_compiler(device: torch.device, backend: str | Callable[..., Any]) -> None:
    """Compiles a function of one line, forward and backward. Raises RuntimeError when that cannot be done."""
    rows = torch.ones(4, device=device, requires_grad=True)
    torch.compile(lambda values: (values * 2).sin().sum(), backend=backend)(rows).backward()


def _warn(error: Exception) -> None:
    inner = getattr(error, "inner_exception", error)  # what the backend raised
    reason = next((line for line in str(inner).splitlines() if line.strip()), type(inner).__name__)
    log.warning("parallel.compile: blocks run as they are, not compiled: %s", reason)
