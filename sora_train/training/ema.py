"""Moving averages of the weights, kept beside each rank's own pieces of the fp32 weights: no copy of the whole model is
gathered, whatever the ZeRO stage.

With profile=constant, one average of constant decay. With profile=power, one for each length in `ema.lengths`; the
first is the one that is validated, sampled and exported. From snapshots of them (`ema_snapshots`) an average of any
length comes out after training:

    python -m sora_train.training.ema list RUN_DIR
    python -m sora_train.training.ema rebuild RUN_DIR OUT --length 0.08
    python -m sora_train.sample OUT "a red circle moving left"
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sora_train.config.optim import EmaConfig, EmaProfile
from sora_train.distributed.collectives import sum_over_ranks
from sora_train.distributed.partitions import Fragment
from sora_train.training import ema_profiles

# How the average that is used is called in checkpoints and snapshots.
PRIMARY = "ema"


def kinds(config: EmaConfig) -> dict[str, float | None]:
    """Names of the averages, the primary one first, and their relative lengths."""
    if config.profile is EmaProfile.constant:
        return {PRIMARY: None}
    first, *others = config.lengths
    return {PRIMARY: first, **{f"{PRIMARY}-{length:g}": length for length in others}}


class Ema:
    """The averages of every fragment."""

    def __init__(self, held: list[Fragment], config: EmaConfig) -> None:
        self.config = config
        self.held = held
        self.kinds = kinds(config)
        # By kind, in the fragments' order.
        self.kept = [{kind: fragment.master.clone() for kind in self.kinds} for fragment in held]

    @property
    def averages(self) -> list[Tensor]:
        """The primary one, in the fragments' order."""
        return [averages[PRIMARY] for averages in self.kept]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (0-based): average += (1 - decay) (weights - average).

        With profile=constant, decay = min(config.decay, (1 + step) / (10 + step)), so that early averages forget the
        initialisation; with profile=power see `ema_profiles.decay`, which forgets it in the first step.
        """
        for kind, length in self.kinds.items():
            if length is None:
                decay = min(self.config.decay, (1 + step) / (10 + step))
            else:
                decay = ema_profiles.decay(step, length)
            for averages, fragment in zip(self.kept, self.held, strict=True):
                averages[kind].lerp_(fragment.master, 1 - decay)

    def gather(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """All of `each_whole` at once."""
        return dict(self.each_whole(shapes))

    @torch.no_grad()
    def each_whole(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
        """The whole weights of the primary average by name, one after another, on every rank; every rank must go
        through all of them.

        Args:
            shapes: of every trained parameter, the same on all ranks.
        """
        mine = {fragment.name: (fragment, average) for fragment, average in zip(self.held, self.averages, strict=True)}
        device = self.averages[0].device
        for name, shape in shapes.items():
            whole = torch.zeros(shape, device=device)
            if name in mine:
                fragment, average = mine[name]
                first, last = fragment.written
                whole.view(-1)[fragment.start + first : fragment.start + last] = average[first:last]
            yield name, sum_over_ranks(whole)


if __name__ == "__main__":
    from sora_train.training.ema_command import app

    app()
