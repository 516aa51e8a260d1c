"""Sums over the steps between two log lines. They stay on the device; the host reads them once a log step."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_train.config.parallel import ParallelConfig, Precision
from sora_train.cost.flops import mfu, peak_flops
from sora_train.data.pack import Pack
from sora_train.distributed.collectives import sum_over_ranks
from sora_train.distributed.topology import World

T_BINS = 4


@dataclass(frozen=True)
class PackLoss:
    """What one pack adds: `loss` is this rank's share of the step's loss (a scalar with gradient)."""

    loss: Tensor
    sample_loss_S: Tensor  # mean squared error of each sample, detached
    t_S: Tensor
    weight_S: Tensor  # 0 for masked clips and filler
    tokens: int  # trained on, on this rank
    clips: int
    frames: int
    flops: float  # useful forward and backward FLOPs


@dataclass(frozen=True)
class Means:
    """What `Metrics.reduce` says of the steps since it was last asked."""

    step_losses: list[float]  # of each step, in order
    values: dict[str, float]  # means over steps and ranks

    @property
    def loss(self) -> float:
        """Mean over the steps."""
        return sum(self.step_losses) / len(self.step_losses)


class Metrics:
    """Sums of what packs add, and the wall clock they took."""

    def __init__(self, world: World, parallel: ParallelConfig) -> None:
        self.world = world
        # MFU is against the dense bf16 peak; another precision has another peak, which is not guessed.
        self.peak_flops = peak_flops(world.device_name) if parallel.precision is Precision.bf16 else 0.0
        self._restart()

    def _restart(self) -> None:
        device = self.world.device
        self.step_losses = [torch.zeros((), dtype=torch.float64, device=device)]
        # Weighted sums and weights of the loss by quarter of t.
        self.by_t = torch.zeros(2, T_BINS, dtype=torch.float64, device=device)
        self.tokens, self.clips, self.frames, self.flops, self.wait_seconds = 0, 0, 0, 0.0, 0.0
        self.started = time.perf_counter()

    def timed(self, packs: Iterator[Pack]) -> Iterator[Pack]:
        """The same packs, counting how long this rank waited for each."""
        asked = time.perf_counter()
        for pack in packs:
            self.wait_seconds += time.perf_counter() - asked
            yield pack
            asked = time.perf_counter()

    def add(self, pack_loss: PackLoss) -> None:
        """One micro-step."""
        self.step_losses[-1] += pack_loss.loss.detach()
        bins = (pack_loss.t_S * T_BINS).long().clamp_(0, T_BINS - 1)
        weight_S = pack_loss.weight_S.double()
        self.by_t[0].index_add_(0, bins, pack_loss.sample_loss_S.double() * weight_S)
        self.by_t[1].index_add_(0, bins, weight_S)
        self.tokens += pack_loss.tokens
        self.clips += pack_loss.clips
        self.frames += pack_loss.frames
        self.flops += pack_loss.flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here is not part of the time that steps took."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    @property
    def has_steps(self) -> bool:
        """Whether a step has ended since `reduce` was last called."""
        return len(self.step_losses) > 1

    def end_step(self) -> None:
        """After the last micro-step of a step."""
        self.step_losses.append(torch.zeros_like(self.step_losses[0]))

    def reduce(self) -> Means:
        """Sums over ranks, and starts anew. Every rank must call it, after at least one `end_step`.

        Raises:
            FloatingPointError: a loss is not finite; on all ranks alike, so that none saves it.
        """
        seconds = time.perf_counter() - self.started
        steps = len(self.step_losses) - 1
        losses = torch.stack(self.step_losses[:steps])
        counts = losses.new_tensor([self.tokens, self.clips, self.frames, self.flops, self.wait_seconds])
        sums = sum_over_ranks(torch.cat([losses, self.by_t.view(-1), counts])).tolist()
        step_losses, by_t = sums[:steps], sums[steps : steps + 2 * T_BINS]
        tokens, clips, frames, flops, waited = sums[steps + 2 * T_BINS :]
        if not all(math.isfinite(loss) for loss in step_losses):
            raise FloatingPointError(f"the loss is not finite in the last {steps} steps: lower optim.learning_rate")
        values = {
            "tokens_per_second": tokens / seconds,
            "clips_per_second": clips / seconds,
            "frames_per_second": frames / seconds,
            "tokens_per_step": tokens / steps,
            "step_seconds": seconds / steps,
            "data_wait_share": waited / seconds / self.world.world_size,
        }
        if self.peak_flops > 0:
            values["mfu"] = mfu(flops, seconds, self.peak_flops * self.world.world_size)
        for i, (total, weight) in enumerate(zip(by_t[:T_BINS], by_t[T_BINS:], strict=True), start=1):
            if weight > 0:
                values[f"loss_t{i}of{T_BINS}"] = total / weight
        self._restart()
        return Means(step_losses, values)
