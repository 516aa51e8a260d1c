"""Attention cores on one device: are they right, and how near do they come to one dense call of the same cost?"""

import functools
import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_packs import Bench, mixed_packs
from sora_train.config.parallel import AttentionKind
from sora_train.config.root import ConfigError
from sora_train.models.attention_choice import choose_core
from sora_train.models.attention_cores import Core, masked_sdpa
from sora_train.models.pack_layout import PackLayout

HEAD_WIDTH = 128
VARLEN_BAR = 0.9  # of dense SDPA by cuDNN, at the same sum of squares
# Operands of 8 bits of mantissa: a few roundings on the way.
TOLERANCE = 2e-2


def cores(bench: Bench) -> dict[str, Core]:
    """Those that run here, by name; what does not is said."""
    found: dict[str, Core] = {}
    for kind in AttentionKind:
        if kind is AttentionKind.auto:
            continue
        try:
            found[kind.value], _ = choose_core(kind, bench.device, bench.dtype, {HEAD_WIDTH})
        except ConfigError as error:
            print(f"  {kind.value}: not measured: {error}", flush=True)
    return found


def check(bench: Bench) -> None:
    """Each core against float64 on the CPU: values and gradients, self- and cross-attention, a clip of one token."""
    draw = torch.Generator().manual_seed(0)
    layout = PackLayout.build((200, 1, 77, 130), (5, 1, 64, 17))
    for name, core in cores(bench).items():
        for is_cross in (False, True):
            keys = layout.text_lengths if is_cross else layout.lengths
            title = f"core {name}, {'cross' if is_cross else 'self'}-attention: distance from float64"
            inputs = [
                torch.randn(sum(rows), 2, HEAD_WIDTH, generator=draw).to(bench.dtype)
                for rows in (layout.lengths, keys, keys)
            ]
            weights = torch.randn(inputs[0].shape, generator=draw).to(bench.dtype)
            exact = gradients(masked_sdpa, [x.double() for x in inputs], weights.double(), layout, is_cross)
            with bench.attempt(title):
                there = [x.to(bench.device) for x in inputs]
                got = gradients(core, there, weights.to(bench.device), layout.to(bench.device), is_cross)
                worst = max(error(a, b) for a, b in zip(got, exact, strict=True))
                conditions = "values and gradients, documents of 200, 1, 77 and 130 tokens, the worst"
                bench.record(title, worst, "relative", conditions, at_most=TOLERANCE)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative, in norm; infinite where a value is not finite."""
    distance = float((got.double().cpu() - exact).norm() / exact.norm())
    return distance if math.isfinite(distance) else math.inf


def gradients(core: Core, inputs: list[Tensor], weights: Tensor, layout: PackLayout, is_cross: bool) -> list[Tensor]:
    """What a core gives, and its gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = core(leaves[0], leaves[1], leaves[2], layout, is_cross)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def layouts(bench: Bench) -> dict[str, tuple[int, ...]]:
    """Packs of very different make, of about as many tokens."""
    limit = 32_768 // bench.scale
    mixed = mixed_packs(2, limit, bench.scale, seed=5)
    found = {
        "one clip": (limit,),
        "4 of 8k": (limit // 4,) * 4,
        "64 of 512": (max(1, limit // 64),) * 64,
        "a long clip among images": (limit // 2, *(max(1, limit // 32),) * 16),
    }
    for number, pack in enumerate(mixed):
        found[f"web mix {number + 1}"] = tuple(math.prod(clip) for clip in pack)
    return found


def speed(bench: Bench, heads: int) -> None:
    """Forward and backward of every core against one dense SDPA whose length gives the same sum of squares."""
    generator = random.Random(1)
    for where, lengths in layouts(bench).items():
        squares = sum(length**2 for length in lengths)
        dense_seconds, dense_name = dense(bench, heads, round(math.sqrt(squares)))
        layout = PackLayout.build(lengths, (1,) * len(lengths), bench.device)
        shape = (sum(lengths), heads, HEAD_WIDTH)
        inputs = [torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in range(4)]
        names = list(cores(bench).items())
        generator.shuffle(names)  # none always runs on the warmest device
        for name, core in names:
            if name == AttentionKind.masked.value and sum(lengths) > 16_384:
                continue  # a dense mask, and many times the work
            if bench.seconds_left < 0:
                return
            title = f"attention {name}, {where}, {heads} heads"
            with bench.attempt(title):
                run = functools.partial(gradients, core, inputs[:3], inputs[3], layout, False)
                seconds = bench.median_seconds(run)
                flops = 14 * heads * HEAD_WIDTH * squares  # 4 forward, 10 backward
                conditions = (
                    f"{len(lengths)} documents, {sum(lengths)} tokens, heads of {HEAD_WIDTH}, forward and backward, "
                    f"median of {bench.repeats}: {seconds * 1e3:.3g} ms, {flops / seconds / 1e12:.3g} TFLOP/s; "
                    f"{dense_name}: {dense_seconds * 1e3:.3g} ms"
                )
                bar = bench.bar(VARLEN_BAR) if name == AttentionKind.varlen.value else None
                bench.record(title, dense_seconds / seconds, "of dense", conditions, at_least=bar)


def dense(bench: Bench, heads: int, length: int) -> tuple[float, str]:
    """Seconds of one dense call, by cuDNN where it takes it, and what it was."""
    shape = (1, heads, length, HEAD_WIDTH)
    query, key, value, weights = (torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def run() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, weights)

    if bench.is_cuda:
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return bench.median_seconds(run), f"dense cuDNN SDPA of {length} tokens"
        except RuntimeError as reason:
            print(f"  cuDNN SDPA does not run here: {str(reason).splitlines()[0]}", flush=True)
    return bench.median_seconds(run), f"dense SDPA of {length} tokens (torch's choice, not cuDNN's)"
