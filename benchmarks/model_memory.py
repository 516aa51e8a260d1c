"""What a forward pass leaves in memory under each checkpointing mode, what that costs in FLOPs, and how well
`cost.memory` knows it. Counted, not timed: every storage still alive after the forward pass, and torch's own counter.

The counter knows no attention kernel of the CPU, so it is given torch's formulas for it.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.figure import Figure
from benchmarks.model_packs import web_clips
from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.parallel import Checkpointing, Precision
from sora_train.cost.memory import PackSize, activation_bytes
from sora_train.distributed.activations import BlockRunner
from sora_train.models.pack_layout import PackLayout
from sora_train.models.video_dit import VideoDiT, call_block
from tests.allocations import Allocations

ROWS = TextConfig(kind=TextKind.encoder, width=4096)
WAN_1_3B = ModelConfig(name="1.3b", width=1536, depth=30, heads=12, mlp_width=8960, text=ROWS)
FEW_BLOCKS = replace(WAN_1_3B, depth=4)
SMALL = ModelConfig(name="s", width=384, depth=2, heads=6, mlp_width=1536, text=TextConfig(kind=TextKind.encoder))
MODES = (Checkpointing.none, Checkpointing.operations, Checkpointing.block)
CONFIGS = 20


def _forward(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def kept_and_counted(
    config: ModelConfig,
    lengths: Sequence[int],
    text: Sequence[int],
    mode: Checkpointing,
    dtype: torch.dtype = torch.float32,
    has_backward: bool = True,
    layout: PackLayout | None = None,
) -> tuple[int, int]:
    """Bytes kept after a forward pass, and FLOPs, of a random pack. Fake tensors make no layout: it is given then."""
    torch.set_default_dtype(dtype)  # fake weights take no `.to`
    model = VideoDiT(config)
    torch.set_default_dtype(torch.float32)
    model.run_block = BlockRunner(dict.fromkeys(model.blocks, mode), None, call_block)
    channels = config.in_channels * config.patch_frames * config.patch_height * config.patch_width
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        with Allocations(list(model.parameters())) as allocations:
            # What goes in is counted too, where the model keeps it.
            out = model(
                torch.randn(sum(lengths), channels),
                torch.zeros(sum(lengths), 3, dtype=torch.int64),
                torch.rand(len(lengths)),
                _text(config.text, sum(text)),
                layout or PackLayout.build(lengths, text),
            )
        kept = allocations.alive
        if has_backward:
            out.sum().backward()
    return kept, counter.get_total_flops()


def _text(config: TextConfig, rows: int) -> Tensor:
    """Bytes, or rows as a frozen encoder gives them."""
    is_bytes = config.kind is TextKind.bytes
    return torch.randint(0, 256, (rows,)) if is_bytes else torch.randn(rows, config.width)


def random_case(seed: int) -> tuple[ModelConfig, list[int], list[int]]:
    """A model, and the tokens and text rows of each document of a pack."""
    draw = random.Random(seed)
    heads, samples = draw.randint(1, 6), draw.randint(1, 6)
    width = heads * draw.choice([16, 32, 48])
    config = ModelConfig(
        width=width,
        depth=draw.randint(1, 5),
        heads=heads,
        mlp_width=draw.randint(1, 6) * width,
        in_channels=4,
        out_channels=4,
        qk_norm=draw.random() < 0.8,
        cross_attention_norm=draw.random() < 0.8,
        text=TextConfig(kind=draw.choice(list(TextKind)), width=64, layers=draw.randint(1, 3)),
    )
    return config, [draw.randint(1, 300) for _ in range(samples)], [draw.randint(1, 64) for _ in range(samples)]


def figures() -> list[Figure]:
    """Of a mixed pack in memory, of Wan 1.3B at a whole clip by shapes alone, and of random configs."""
    lengths = [math.prod(clip) for clip in web_clips(16, 8, 4)]
    found = _checkpointing(SMALL, lengths, [64] * len(lengths), "2 blocks of size S, fp32", torch.float32)
    for tokens in (8190, 32_760):
        what, layout = "4 blocks of Wan 1.3B, bf16, shapes alone", PackLayout.build([tokens], [512])
        with FakeTensorMode(allow_non_fake_inputs=True):
            found += _checkpointing(FEW_BLOCKS, [tokens], [512], what, torch.bfloat16, layout)
    for precision, dtype in ((Precision.fp32, torch.float32), (Precision.bf16, torch.bfloat16)):
        for mode in MODES:
            errors = []
            for seed in range(CONFIGS):
                config, lengths, text = random_case(seed)
                measured, _ = kept_and_counted(config, lengths, text, mode, dtype, has_backward=False)
                pack = PackSize(sum(lengths), sum(text), len(lengths))
                estimated = activation_bytes(config, pack, (mode,) * config.depth, precision)
                errors.append(abs(estimated / measured - 1))
            where = f"{CONFIGS} random models and packs, {precision.value}, checkpointing={mode.value}, no images"
            value = max(errors)
            found.append(Figure("memory.py: largest error", value, "", "<= 0.05", value <= 0.05, where))
    return found


def _checkpointing(
    config: ModelConfig,
    lengths: list[int],
    text: list[int],
    what: str,
    dtype: torch.dtype,
    layout: PackLayout | None = None,
) -> list[Figure]:
    kept, flops = {}, {}
    for mode in MODES:
        kept[mode], flops[mode] = kept_and_counted(config, lengths, text, mode, dtype, layout=layout)
    none = Checkpointing.none
    where = f"{what}, {len(lengths)} clips of {sum(lengths)} tokens in all, {sum(text)} text rows"
    found = [Figure("bytes kept, none", kept[none] / 2**20, "MiB", "", None, where)]
    for mode in MODES[1:]:
        has_bar = mode is Checkpointing.operations
        told = f"{where}; {kept[mode] / 2**20:.5g} MiB, {flops[mode] / 1e12:.5g} TFLOP forward and backward"
        value = kept[mode] / kept[none]
        bar, holds = ("<= 0.4", value <= 0.4) if has_bar else ("", None)
        found.append(Figure(f"bytes kept, {mode.value} / none", value, "", bar, holds, told))
        value = flops[mode] / flops[none] - 1
        bar, holds = ("<= 0.1", value <= 0.1) if has_bar else ("", None)
        found.append(Figure(f"more FLOPs, {mode.value}", value, "", bar, holds, told))
    return found
