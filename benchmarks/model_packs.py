"""What the model is measured on: clips of a web corpus made small, the same weights in two classes, CPU-seconds."""

import csv
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from sora_train.models.video_dit import VideoDiT
from sora_train.models.wan_weights import load_wan

WEB_MIX = Path(__file__).parent / "workloads" / "web_mix.csv"
Grid = tuple[int, int, int]  # tokens of a clip along time, height and width
WIDTH, HEADS, MLP, DEPTH, TEXT_WIDTH, TEXT_ROWS, CHANNELS = 384, 6, 1536, 2, 256, 64, 16
MODEL = f"width {WIDTH}, depth {DEPTH}, {HEADS} heads, MLP {MLP}, {TEXT_ROWS} text rows a clip for all, fp32"
REPEATS = 7


def web_clips(count: int, shrink: int, fps: float, longest_seconds: float = 60.0) -> list[Grid]:
    """The first clips of the web mix at their own sizes, durations and aspects: every side divided by `shrink`, so
    many frames a second, one latent frame for four frames, one token for 16 x 16 pixels."""
    with WEB_MIX.open() as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(count), strict=False)]
    return [_grid(row, shrink, fps, longest_seconds) for row in rows]


def _grid(row: Mapping[str, str], shrink: int, fps: float, longest_seconds: float) -> Grid:
    native_fps = float(row["fps"])  # 0 of an image
    frames = int(fps * min(longest_seconds, int(row["num_frames"]) / native_fps)) if native_fps else 1
    height, width = (max(1, round(int(row[side]) / (16 * shrink))) for side in ("height", "width"))
    return 1 + (max(1, frames) - 1) // 4, height, width


def small_clips(count: int, most_tokens: int) -> list[Grid]:
    """The same, smaller still, and clips of more tokens cut in time."""
    clips = web_clips(count, 10, 2)
    return [(max(1, min(t, most_tokens // (h * w))), h, w) for t, h, w in clips]


def said(clips: Sequence[Grid]) -> str:
    """A list of clips in words."""
    tokens = [math.prod(clip) for clip in clips]
    return f"{len(clips)} clips of {min(tokens)} to {max(tokens)} tokens, {sum(tokens)} in all"


def twins() -> tuple[Any, VideoDiT]:
    """diffusers' class and ours with the same random weights, nothing at zero."""
    import diffusers

    torch.manual_seed(0)
    theirs: Any = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        ffn_dim=MLP,
        num_layers=DEPTH,
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2 if "table" in name else parameter[0].numel() ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_wan(folder)


def latents_of(clips: Sequence[Grid]) -> list[Tensor]:
    """Random latents, [C, T, H, W] a clip, patches being of 1 x 2 x 2."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(CHANNELS, t, 2 * h, 2 * w, generator=generator) for t, h, w in clips]


def cpu_seconds(methods: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """CPU-seconds of this process, of all its threads: methods in turn, a first round that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in methods}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True
    ) as progress:
        task = progress.add_task("", total=(repeats + 1) * len(methods))
        for repeat in range(repeats + 1):
            for name, run in methods.items():
                progress.update(task, description=name)
                start = time.process_time()
                run()
                if repeat:
                    spent[name].append(time.process_time() - start)
                progress.advance(task)
    return spent


def spread(spent: Mapping[str, Sequence[float]], over: str, under: str) -> str:
    """How a ratio of two minima came about, for its conditions."""
    ratios = [a / b for a, b in zip(spent[over], spent[under], strict=True)]
    return (
        f"{min(spent[over]):.3g} / {min(spent[under]):.3g} CPU-s, minima of {len(ratios)} in turn; "
        f"repeat by repeat {min(ratios):.3g} to {max(ratios):.3g}; load {os.getloadavg()[0]:.1f}"
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many for torch, as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
