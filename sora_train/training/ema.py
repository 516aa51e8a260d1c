"""The exponential moving average of the weights, kept beside each rank's own pieces of the fp32 weights: no copy of
the whole model is gathered, whatever the ZeRO stage."""

import torch
from torch import Tensor

from sora_train.config.optim import EmaConfig
from sora_train.distributed.collectives import sum_over_ranks
from sora_train.distributed.partitions import Fragment


class Ema:
    """One averaged tensor per fragment, in the fragments' order."""

    def __init__(self, held: list[Fragment], config: EmaConfig) -> None:
        self.config = config
        self.held = held
        self.averages = [fragment.master.clone() for fragment in held]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (0-based): average += (1 - decay) (weights - average), with
        decay = min(config.decay, (1 + step) / (10 + step)) so that early averages forget the initialisation."""
        decay = min(self.config.decay, (1 + step) / (10 + step))
        for average, fragment in zip(self.averages, self.held, strict=True):
            average.lerp_(fragment.master, 1 - decay)

    @torch.no_grad()
    def gather(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The whole averaged weights by name, on every rank; every rank must call it.

        Args:
            shapes: of every trained parameter, the same on all ranks.
        """
        mine = {fragment.name: (fragment, average) for fragment, average in zip(self.held, self.averages, strict=True)}
        device = self.averages[0].device
        weights = {}
        for name, shape in shapes.items():
            whole = torch.zeros(shape, device=device)
            if name in mine:
                fragment, average = mine[name]
                first, last = fragment.written
                whole.view(-1)[fragment.start + first : fragment.start + last] = average[first:last]
            weights[name] = sum_over_ranks(whole)
        return weights
