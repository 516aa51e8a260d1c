"""Sums over the steps between two log lines. They stay on the device; the host reads them once a log step."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_train.config.parallel import ParallelConfig
from sora_train.cost.flops import mfu, peak_flops
from sora_train.data.pack import Pack
from sora_train.data.shard_table import KINDS
from sora_train.distributed.collectives import sum_over_ranks
from sora_train.distributed.topology import World

T_BINS = 4
# How the loss is told apart by caption; the last is for samples trained without one.
CAPTION_KINDS = (*KINDS, "none")


# What is counted of what is trained on; of FLOPs the useful ones, forward and backward.
COUNTED = ("tokens", "clips", "frames", "flops")


@dataclass(frozen=True)
class PackLoss:
    """What one pack adds: `loss` is this rank's share of the step's loss (a scalar with gradient).

    Of a clip that ranks share, what they add sums to what one rank would that held it whole.
    """

    loss: Tensor
    sample_loss_S: Tensor  # mean squared error of each document's tokens, detached
    t_S: Tensor
    weight_S: Tensor  # the share of its clip that each document is; 0 for masked clips and filler
    kind_S: Tensor  # number in CAPTION_KINDS of the caption trained on
    counts: Tensor  # float64, as COUNTED
    tried: int  # clips that were to be read; those not trained on have failed


@dataclass(frozen=True)
class Means:
    """What `Metrics.reduce` says of the steps since it was last asked."""

    step_losses: list[float]  # of each step, in order
    values: dict[str, float]  # means over steps and ranks
    clips: int  # trained on, on all ranks
    failed: int  # clips that could not be read, on all ranks

    @property
    def loss(self) -> float:
        """Mean over the steps."""
        return sum(self.step_losses) / len(self.step_losses)


class Metrics:
    """Sums of what packs add, and the wall clock they took."""

    def __init__(self, world: World, parallel: ParallelConfig) -> None:
        self.world = world
        # MFU is against the dense bf16 peak, with fp8 too: what its faster products gain then shows. The peak of fp32
        # is another, which is not guessed.
        self.peak_flops = peak_flops(world.device_name) if parallel.precision.is_bf16 else 0.0
        self._restart()

    def _restart(self) -> None:
        device = self.world.device
        self.step_losses = [torch.zeros((), dtype=torch.float64, device=device)]
        # Weighted sums and weights of the loss by quarter of t, and by kind of caption.
        self.by_t = torch.zeros(2, T_BINS, dtype=torch.float64, device=device)
        self.by_kind = torch.zeros(2, len(CAPTION_KINDS), dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(COUNTED), dtype=torch.float64, device=device)
        self.tried, self.wait_seconds = 0, 0.0
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
        loss_S = pack_loss.sample_loss_S.double() * weight_S
        for sums, bins_S in ((self.by_t, bins), (self.by_kind, pack_loss.kind_S)):
            sums[0].index_add_(0, bins_S, loss_S)
            sums[1].index_add_(0, bins_S, weight_S)
        self.counts += pack_loss.counts
        self.tried += pack_loss.tried

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
        of_host = losses.new_tensor([self.tried, self.wait_seconds])
        parts = [losses, self.by_t[0], self.by_t[1], self.by_kind[0], self.by_kind[1], self.counts, of_host]
        summed = sum_over_ranks(torch.cat(parts)).split([len(part) for part in parts])
        step_losses, t_losses, t_weights, kind_losses, kind_weights, counts, waits = (part.tolist() for part in summed)
        (tokens, clips, frames, flops), (tried, waited) = counts, waits
        failed = tried - clips
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
        by_t = [f"t{i}of{T_BINS}" for i in range(1, T_BINS + 1)]
        by_kind = [f"caption_{kind.replace('/', '_')}" for kind in CAPTION_KINDS]
        for names, sums, weights in ((by_t, t_losses, t_weights), (by_kind, kind_losses, kind_weights)):
            for name, total, weight in zip(names, sums, weights, strict=True):
                if weight > 0:
                    values[f"loss_{name}"] = total / weight
        if failed > 0:
            values["failed_clips"] = failed
        self._restart()
        return Means(step_losses, values, int(clips), int(failed))
