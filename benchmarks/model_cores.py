"""Attention of a pack on CPU: the model's core beside bare calls of SDPA a document, and beside masked SDPA."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.figure import Figure
from benchmarks.model_packs import HEADS, TEXT_ROWS, WIDTH, cpu_seconds, spread, threads, web_clips
from sora_train.models.attention_cores import Core, masked_sdpa, sdpa_per_document
from sora_train.models.pack_layout import PackLayout

HEAD_WIDTH = WIDTH // HEADS
# Clips of the web mix, at the model's own sizes for the speed figures.
LISTS: dict[str, list[int]] = {
    f"{count} mixed documents": [math.prod(clip) for clip in web_clips(count, 8, 4)] for count in (8, 16)
} | {"16 equal documents": [128] * 16}


def _random(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, HEADS, HEAD_WIDTH, generator=generator).requires_grad_()


def _through(core: Core, lengths: Sequence[int], text: Sequence[int] | None) -> Callable[[], None]:
    """A forward and backward pass of a core over a pack."""
    generator = torch.Generator().manual_seed(0)
    layout = PackLayout.build(lengths, text or [1] * len(lengths))
    query, key, value = (_random(sum(rows), generator) for rows in (lengths, text or lengths, text or lengths))
    grad_LNK = torch.randn(sum(lengths), HEADS, HEAD_WIDTH, generator=generator)

    def run() -> None:
        torch.autograd.grad(core(query, key, value, layout, text is not None), (query, key, value), grad_LNK)

    return run


def _bare(lengths: Sequence[int], text: Sequence[int] | None) -> Callable[[], None]:
    """The same work on tensors of their own, a call and a backward pass a document: no splitting, no joining."""
    generator = torch.Generator().manual_seed(0)
    work = []
    for length, rows in zip(lengths, text or lengths, strict=True):
        inputs = [_random(length, generator), _random(rows, generator), _random(rows, generator)]
        work.append((inputs, torch.randn(1, HEADS, length, HEAD_WIDTH, generator=generator)))

    def run() -> None:
        for inputs, grad in work:
            query, key, value = (tensor.transpose(0, 1)[None] for tensor in inputs)
            torch.autograd.grad(F.scaled_dot_product_attention(query, key, value), inputs, grad)

    return run


def figures() -> list[Figure]:
    """The core's cost over that of its kernels, and the masked call's over the core's."""
    found: list[Figure] = []
    for count in (1, 2):
        with threads(count):
            for name, lengths in LISTS.items():
                for text in (None, [TEXT_ROWS] * len(lengths)):
                    methods = {"core": _through(sdpa_per_document, lengths, text), "bare": _bare(lengths, text)}
                    if text is None:
                        methods["masked"] = _through(masked_sdpa, lengths, text)
                    spent = cpu_seconds({key: _times(run, 2) for key, run in methods.items()}, 25)
                    kind = "self-attention" if text is None else f"cross-attention to {TEXT_ROWS} rows"
                    where = (
                        f"{kind}, {sum(lengths)} tokens, {HEADS} heads of {HEAD_WIDTH}, forward and backward, fp32, "
                        f"{count} thread{'s' * (count > 1)}, 2 passes"
                    )
                    value, told = min(spent["core"]) / min(spent["bare"]), spread(spent, "core", "bare")
                    conditions = f"{where}; {told}"
                    found.append(Figure(f"{name}: core / bare calls", value, "", "<= 1.05", value <= 1.05, conditions))
                    if text is None:
                        value, told = min(spent["masked"]) / min(spent["core"]), spread(spent, "masked", "core")
                        conditions = f"{where}; {told}"
                        found.append(Figure(f"{name}: masked / core", value, "", ">= 3", value >= 3, conditions))
    return found


def _times(run: Callable[[], None], count: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            run()

    return repeated
