"""Where randomness comes from: a generator for each (seed, step, index in the global batch, purpose).

Counter based, so nothing is consumed in order: it does not matter which rank, worker or attempt computes a sample,
and a resumed run draws what the first run drew (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

What a data set itself draws, its shuffles and the parts taken of its clips, has (epoch, place) for (step, index) and
the data set's own `stream`: it stays the same whatever else is trained on beside it.
"""

from enum import IntEnum
from hashlib import sha256

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
    caption_field = 5
    clip_part = 6
    first_frame = 7


def generator(seed: int, step: int, index: int, purpose: Purpose, stream: int = 0) -> np.random.Generator:
    """The generator of one sample (or, of a data set, of one epoch and window or clip). Pure."""
    # The lowest word of the counter is the one that counts up while drawing.
    key = [seed & (2**64 - 1), stream]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, int(purpose), index, step]))


def dataset_stream(name: str) -> int:
    """The stream of a data set, by its name: another order of data sets in the config, or one more, changes none."""
    return int.from_bytes(sha256(name.encode()).digest()[:8], "little")
