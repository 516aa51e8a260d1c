"""Parameters and FLOPs by formula against what torch builds and counts, on the meta device: nothing is computed."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figure import Figure
from benchmarks.model_memory import WAN_1_3B
from benchmarks.model_packs import Grid, web_clips
from sora_train.config.model import ModelConfig
from sora_train.config.root import writable
from sora_train.cost.flops import forward_flops, step_flops
from sora_train.cost.memory import num_parameters
from sora_train.models.video_dit import VideoDiT, predict

SIZES = Path(__file__).parent.parent / "configs" / "model"
# As published.
PARAMETERS = {"1.3b": 1_418_996_800, "14b": 14_288_491_584, "i2v_14b": 16_394_878_784, "5b": 4_999_787_712}
WHOLE_CLIP: Grid = (21, 30, 52)  # 81 frames of 480 x 832: 32,760 tokens
PACKS = 5


def counted(model: VideoDiT, clips: Sequence[Grid], text_rows: Sequence[int]) -> tuple[int, int]:
    """FLOPs that torch counts of a pack: forward, and with backward. Attention is SDPA a document."""
    config = model.config
    with torch.device("meta"):
        latents = [torch.empty(config.in_channels, t, 2 * h, 2 * w) for t, h, w in clips]
        text = [torch.empty(rows, config.text.width) for rows in text_rows]
        t_S = torch.empty(len(clips))
    # The counter sees the products of the plain kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predictions = predict(model, latents, t_S, text)
        forward = counter.get_total_flops()
        torch.cat([prediction.flatten() for prediction in predictions]).sum().backward()
    return forward, counter.get_total_flops()


def figures() -> list[Figure]:
    """Errors of the counts; parameters have to be exact."""
    found = []
    for name, published in PARAMETERS.items():
        merged = OmegaConf.merge(OmegaConf.structured(writable(ModelConfig)), OmegaConf.load(SIZES / f"{name}.yaml"))
        values: Any = OmegaConf.to_object(merged)
        with torch.device("meta"):
            built = sum(parameter.numel() for parameter in VideoDiT(values).parameters())
        holds = built == published == num_parameters(values)
        where = f"{built} built, {num_parameters(values)} by formula, {published} published"
        found.append(Figure(f"parameters of {name}", built, "", f"= {published}", holds, where))
    with torch.device("meta"):
        model = VideoDiT(WAN_1_3B)
    found += _errors([WHOLE_CLIP], [512], "Wan 1.3B, one clip of 32,760 tokens, 512 text rows", model)
    draw, clips = random.Random(0), web_clips(2000, 2, 8)
    worst: list[list[Figure]] = []
    for _ in range(PACKS):
        pack = draw.sample(clips, draw.randint(1, 5))
        rows = [draw.randint(1, 512) for _ in pack]
        tokens = sum(map(math.prod, pack))
        worst.append(_errors(pack, rows, f"Wan 1.3B, worst of {PACKS} random packs: {tokens} tokens", model))
    return found + [max(figures, key=lambda figure: figure.value) for figures in zip(*worst, strict=True)]


def _errors(clips: Sequence[Grid], text_rows: Sequence[int], what: str, model: VideoDiT) -> list[Figure]:
    forward, step = counted(model, clips, text_rows)
    found = []
    for name, formula, torchs in (("forward", forward_flops, forward), ("forward and backward", step_flops, step)):
        ours = sum(formula(model.config, math.prod(clip), rows) for clip, rows in zip(clips, text_rows, strict=True))
        where = f"{what}; {ours} by formula, {torchs} counted"
        value = abs(ours / torchs - 1)
        found.append(Figure(f"FLOPs, {name}: error", value, "", "<= 0.001", value <= 0.001, where))
    return found
