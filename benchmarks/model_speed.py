"""A pack against diffusers' WanTransformer3DModel with the same weights, forward and backward, in CPU-seconds.

diffusers takes batches of one size: so clips go through it one at a time, or padded to the largest time, height and
width of the list (without a mask, which its class does not take: less work than a right answer would be).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.figure import Figure
from benchmarks.model_packs import (
    MODEL,
    TEXT_ROWS,
    TEXT_WIDTH,
    Grid,
    cpu_seconds,
    latents_of,
    said,
    small_clips,
    spread,
    threads,
    twins,
    web_clips,
)
from sora_train.models.video_dit import VideoDiT, predict

SHRINK, FPS = 8, 4.0
MIXED = web_clips(16, SHRINK, FPS)
SMALL = small_clips(32, 256)
EQUAL = [(2, 8, 8)] * 16
TOLERANCE = 1e-4  # diffusers takes the phase of t in float32


@dataclass(frozen=True)
class Step:
    """A list of clips for both classes; each method is a forward and a backward pass over all of it."""

    theirs: Any
    ours: VideoDiT
    latents: list[Tensor]
    t_S: Tensor
    text: list[Tensor]

    @staticmethod
    def of(theirs: Any, ours: VideoDiT, clips: Sequence[Grid]) -> "Step":
        """Random latents, texts and t."""
        generator = torch.Generator().manual_seed(2)
        text = [torch.randn(TEXT_ROWS, TEXT_WIDTH, generator=generator) for _ in clips]
        return Step(theirs, ours, latents_of(clips), torch.rand(len(clips), generator=generator), text)

    def packed(self) -> list[Tensor]:
        """Ours: packing, the model, unpacking."""
        self.ours.zero_grad()
        predictions = predict(self.ours, self.latents, self.t_S, self.text)
        torch.stack([prediction.square().sum() for prediction in predictions]).sum().backward()
        return predictions

    def one_at_a_time(self) -> list[Tensor]:
        """diffusers, gradients accumulated."""
        self.theirs.zero_grad()
        predictions = []
        for latents, t, text in zip(self.latents, self.t_S, self.text, strict=True):
            prediction = self.theirs(latents[None], t[None] * 1000, text[None]).sample[0]
            prediction.square().sum().backward()
            predictions.append(prediction)
        return predictions

    def batch(self) -> list[Tensor]:
        """diffusers, padded where clips differ."""
        self.theirs.zero_grad()
        largest = [max(latents.shape[axis] for latents in self.latents) for axis in (3, 2, 1)]
        padded = torch.stack([_padded(latents, largest) for latents in self.latents])
        predictions = self.theirs(padded, self.t_S * 1000, torch.stack(self.text)).sample
        predictions.square().sum().backward()
        return list(predictions)

    def check(self, method: Callable[[], list[Tensor]]) -> float:
        """Raises RuntimeError unless ours gives the same; returns the largest difference."""
        pairs = zip(self.packed(), method(), strict=True)
        difference = max(float((mine - other).detach().abs().max()) for mine, other in pairs)
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{method.__name__}: predictions differ by {difference}")
        return difference


def _padded(latents: Tensor, largest: Sequence[int]) -> Tensor:
    """[C, T, H, W] with zeros to the largest W, H, T."""
    missing = [size - latents.shape[axis] for size, axis in zip(largest, (3, 2, 1), strict=True)]
    return F.pad(latents, (0, missing[0], 0, missing[1], 0, missing[2]))


def padding() -> list[Figure]:
    """The mixed list against one padded batch, with one thread."""
    step = Step.of(*twins(), MIXED)
    spent = cpu_seconds({"packed": step.packed, "padded": step.batch})
    where = f"{said(MIXED)}; {MODEL}; {_rule(MIXED)}; 1 thread"
    return [_ratio("mixed list: padded / packed", spent, "padded", 8.0, where)]


def figures() -> list[Figure]:
    """Against one clip at a time and equal batches, with one thread and with two."""
    theirs, ours = twins()
    mixed, small, equal = (Step.of(theirs, ours, clips) for clips in (MIXED, SMALL, EQUAL))
    for step in (mixed, small, equal):
        step.check(step.one_at_a_time)
    equal.check(equal.batch)
    found: list[Figure] = []
    for count in (1, 2):
        with threads(count):
            for clips, step, bar in ((MIXED, mixed, 1.05), (SMALL, small, 1.15)):
                name = "mixed" if step is mixed else "small"
                spent = cpu_seconds({"packed": step.packed, "one at a time": step.one_at_a_time})
                where = f"{said(clips)}; {MODEL}; {_rule(clips)}; {count} thread{'s' * (count > 1)}"
                found.append(_ratio(f"{name} list: one clip at a time / packed", spent, "one at a time", bar, where))
                tokens = sum(map(math.prod, clips))
                value = tokens / min(spent["packed"])
                found.append(Figure(f"{name} list: packed", value, "tokens/CPU-s", "", None, where))
            spent = cpu_seconds({"packed": equal.packed, "batch": equal.batch})
            where = f"{said(EQUAL)}; {MODEL}; {count} thread{'s' * (count > 1)}"
            found.append(_ratio("equal list: batch / packed", spent, "batch", 1.0, where))
    return found


def _ratio(name: str, spent: dict[str, list[float]], other: str, bar: float, where: str) -> Figure:
    value = min(spent[other]) / min(spent["packed"])
    return Figure(name, value, "", f">= {bar}", value >= bar, f"{where}; {spread(spent, other, 'packed')}")


def _rule(clips: Sequence[Grid]) -> str:
    """How the list was made, and what padding it would take."""
    if clips is SMALL:
        return f"first {len(clips)} of the web mix, sides / 10, 2 frames/s, cut to 256 tokens"
    largest = math.prod(max(clip[axis] for clip in clips) for axis in range(3))
    padding = len(clips) * largest / sum(map(math.prod, clips))
    return (
        f"first {len(clips)} of the web mix, own sizes and durations, sides / {SHRINK}, {FPS:g} frames/s; "
        f"{padding:.1f} x as many tokens when padded"
    )
