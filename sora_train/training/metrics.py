"""Sums over the steps between two log lines. They stay on the device; the host reads them once a log step."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

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


class Metrics:
    """Sums of what packs add, and the wall clock they took."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._start()

    def _start(self) -> None:
        device = self.world.device
        self.step_losses = [torch.zeros((), dtype=torch.float64, device=device)]
        # Weighted sums and weights of the loss by quarter of t.
        self.by_t = torch.zeros(2, T_BINS, dtype=torch.float64, device=device)
        self.counts = torch.zeros(4, dtype=torch.float64)  # tokens, clips, frames, FLOPs
        self.wait_seconds = 0.0
        self.started = time.perf_counter()

    def add(self, pack_loss: PackLoss) -> None:
        """One micro-step."""
        self.step_losses[-1] += pack_loss.loss.detach()
        bins = (pack_loss.t_S * T_BINS).long().clamp_(0, T_BINS - 1)
        weight_S = pack_loss.weight_S.double()
        self.by_t[0].index_add_(0, bins, pack_loss.sample_loss_S.double() * weight_S)
        self.by_t[1].index_add_(0, bins, weight_S)
        self.counts += torch.tensor([pack_loss.tokens, pack_loss.clips, pack_loss.frames, pack_loss.flops]).double()

    def end_step(self, wait_seconds: float) -> None:
        """After the last micro-step; `wait_seconds` is how long this rank waited for data."""
        self.step_losses.append(torch.zeros_like(self.step_losses[0]))
        self.wait_seconds += wait_seconds

    def reduce(self, peak_flops: float) -> tuple[list[float], dict[str, float]]:
        """The loss of each step since the last call, and means over steps and ranks; then starts anew. Every rank must
        call it, after `end_step`."""
        seconds = time.perf_counter() - self.started
        steps = len(self.step_losses) - 1
        losses = torch.stack(self.step_losses[:steps])
        rest = torch.cat([self.counts, torch.tensor([self.wait_seconds]).double()]).to(losses.device)
        values = sum_over_ranks(torch.cat([losses, self.by_t.view(-1), rest])).tolist()
        step_losses, values = values[:steps], values[steps:]
        weighted, weights = values[:T_BINS], values[T_BINS : 2 * T_BINS]
        tokens, clips, frames, flops, waited = values[2 * T_BINS :]
        means = {
            "loss": sum(step_losses) / steps,
            "tokens_per_second": tokens / seconds,
            "clips_per_second": clips / seconds,
            "frames_per_second": frames / seconds,
            "tokens_per_step": tokens / steps,
            "step_seconds": seconds / steps,
            "data_wait_share": waited / seconds / self.world.world_size,
        }
        if peak_flops > 0:
            means["mfu"] = flops / seconds / (peak_flops * self.world.world_size)
        for i in range(T_BINS):
            if weights[i] > 0:
                means[f"loss_t{i + 1}of{T_BINS}"] = weighted[i] / weights[i]
        self._start()
        return step_losses, means
