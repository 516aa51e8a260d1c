"""Where randomness comes from: a generator for each (seed, step, index in the global batch, purpose).

Counter based, so nothing is consumed in order: it does not matter which rank, worker or attempt computes a sample,
and a resumed run draws what the first run drew (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from enum import IntEnum

import numpy as np

# The step under which held-out clips draw: no training step reaches it, and it is the same at every validation.
VALIDATION_STEP = 2**63


class Purpose(IntEnum):
    """What a draw is for; each has a stream of its own, so that a new one leaves the others as they are."""

    caption = 0
    timestep = 1
    noise = 2
    shard_order = 3
    clip_order = 4


def generator(seed: int, step: int, index: int, purpose: Purpose) -> np.random.Generator:
    """The generator of one sample (or, for the orders, of one epoch and window). Pure."""
    # The lowest word of the counter is the one that counts up while drawing.
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), 0], counter=[0, int(purpose), index, step]))
