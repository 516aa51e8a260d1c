from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.cost.flops import forward_flops, mfu, peak_flops, text_tokens
from sora_train.models.video_dit import VideoDiT, predict

MODEL = ModelConfig(width=96, heads=4, depth=3, mlp_width=384, in_channels=8, out_channels=8)
TEXT = "a red circle moving left"


@pytest.mark.parametrize("kind", list(TextKind))
def test_the_formula_counts_what_torch_counts(kind: TextKind) -> None:
    config = replace(MODEL, text=TextConfig(kind=kind, width=32))
    model = VideoDiT(config)
    shapes = [(8, 5, 8, 8), (8, 3, 12, 6), (8, 1, 4, 4)]
    latents = [torch.zeros(shape) for shape in shapes]
    rows = [1 + len(TEXT), 1, 7]
    text = [TEXT, "", "circle"] if kind is TextKind.bytes else [torch.zeros(count, 32) for count in rows]
    # The counter knows no fused attention kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        predict(model, latents, torch.full((3,), 0.5), text)
    expected = sum(
        forward_flops(config, shape[1] * shape[2] * shape[3] // 4, count)
        for shape, count in zip(shapes, rows, strict=True)
    )
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_text_rows_follow_the_caption() -> None:
    assert text_tokens(MODEL, 10) == 11
    assert text_tokens(MODEL, 10**6) == 1 + MODEL.text.max_bytes


def test_utilisation_is_known_for_known_devices_only() -> None:
    peak = peak_flops("NVIDIA H200")
    assert mfu(0.5 * peak, 1.0, peak) == pytest.approx(0.5)
    assert mfu(1e12, 1.0, peak_flops("a new device")) == 0.0
