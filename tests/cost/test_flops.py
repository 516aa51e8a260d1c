"""The formulas against torch's own counter, which sees every product that the model does."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.cost.flops import backward_flops, forward_flops, mfu, peak_flops, step_flops, text_tokens
from sora_train.models.inputs import Conditioning
from sora_train.models.video_dit import VideoDiT, predict

MODEL = ModelConfig(width=96, heads=4, depth=3, mlp_width=384, in_channels=8, out_channels=8)
ROWS = TextConfig(kind=TextKind.encoder, width=32)
VARIANTS = {
    "bytes": replace(MODEL, text=TextConfig(width=32)),
    "T2V": replace(MODEL, text=ROWS),
    "concat": replace(MODEL, text=ROWS, condition_channels=5),
    "I2V": replace(MODEL, text=ROWS, condition_channels=5, image_width=40),
    "FLF2V": replace(MODEL, text=ROWS, condition_channels=5, image_width=40, image_positions=6),
    "patches of 2 x 2 x 2": replace(MODEL, text=ROWS, patch_frames=2, out_channels=6),
}
WAN_1_3B = ModelConfig(
    width=1536, depth=30, heads=12, mlp_width=8960, text=TextConfig(kind=TextKind.encoder, width=4096)
)
SHAPES = [(16, 21, 60, 104)]  # 81 frames of 480 x 832


def counted(
    config: ModelConfig,
    shapes: Sequence[tuple[int, int, int, int]],
    text_rows: Sequence[int],
    image_rows: Sequence[int] = (),
    clean_frames: Sequence[int] = (),
    per_token: bool = False,
) -> tuple[int, int]:
    """What torch counts on the meta device: forward, backward. Attention is SDPA a document."""
    with torch.device("meta"):
        model = VideoDiT(config)
        latents = [torch.empty(shape) for shape in shapes]
        if config.text.kind is TextKind.bytes:
            text: list[str] | list[torch.Tensor] = ["x" * (count - 1) for count in text_rows]
        else:
            text = [torch.empty(count, config.text.width) for count in text_rows]
        conditioning = Conditioning(
            latents=[torch.empty(config.condition_channels, *shape[1:]) for shape in shapes]
            if config.condition_channels
            else (),
            image=[torch.empty(count, config.image_width) for count in image_rows],
            clean_frames=clean_frames,
        )
        num_times = sum(tokens(config, shape) for shape in shapes) if per_token else len(shapes)
    # The counter knows no fused attention kernel of this device, but sees the products of the plain one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predictions = predict(model, latents, torch.empty(num_times, device="meta"), text, conditioning)
        forward = counter.get_total_flops()
        torch.cat([prediction.flatten() for prediction in predictions]).sum().backward()
    return forward, counter.get_total_flops() - forward


def tokens(config: ModelConfig, shape: tuple[int, int, int, int]) -> int:
    return shape[1] * shape[2] * shape[3] // (config.patch_frames * config.patch_height * config.patch_width)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_formulas_count_what_torch_counts(name: str, seed: int) -> None:
    """Random packs, forward and backward, to the last one."""
    config, draw = VARIANTS[name], random.Random(seed)
    count = draw.randint(1, 6)
    shapes = [(8, 2 * draw.randint(1, 3), 2 * draw.randint(1, 8), 2 * draw.randint(1, 8)) for _ in range(count)]
    text_rows = [draw.randint(1, 40) for _ in range(count)]
    image_rows = [config.image_positions or draw.randint(1, 9) for _ in range(count)] if config.image_width else []
    clean, per_token = ([0] * count, False) if seed == 1 else ((), seed == 2)
    torch_forward, torch_backward = counted(config, shapes, text_rows, image_rows, clean, per_token)
    sizes = [
        (tokens(config, shape), text, image, tokens(config, shape) if per_token else 1 + (seed == 1))
        for shape, text, image in zip(shapes, text_rows, image_rows or [0] * count, strict=True)
    ]
    assert sum(forward_flops(config, *size) for size in sizes) == torch_forward
    assert sum(backward_flops(config, *size) for size in sizes) == torch_backward


def test_wans_1_3b_at_a_whole_clip() -> None:
    """32,760 tokens and Wan's 512 rows of text: on the meta device, as big as it is."""
    assert tokens(WAN_1_3B, SHAPES[0]) == 32_760
    forward, backward = counted(WAN_1_3B, SHAPES, [512])
    assert forward_flops(WAN_1_3B, 32_760, 512) == forward
    assert step_flops(WAN_1_3B, 32_760, 512) == forward + backward


def test_text_rows_follow_the_caption() -> None:
    assert text_tokens(MODEL, 10) == 11
    assert text_tokens(MODEL, 10**6) == 1 + MODEL.text.max_bytes


def test_utilisation_is_known_for_known_devices_only() -> None:
    peak = peak_flops("NVIDIA H200")
    assert mfu(0.5 * peak, 1.0, peak) == pytest.approx(0.5)
    assert mfu(1e12, 1.0, peak_flops("a new device")) == 0.0
