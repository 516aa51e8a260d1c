"""Whether long clips are spread over steps as a random order would spread them."""

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def long_clips_by_step(tokens: Numbers, tokens_per_step: int, steps_together: int = 1) -> NDArray[np.float64]:
    """Clips of the longest tenth in each step (or in as many steps as are counted together) of an epoch.

    Args:
        tokens: of each clip, in the order in which they are trained on.
    """
    step = np.concatenate([[0], np.cumsum(tokens)[:-1]]) // (tokens_per_step * steps_together)
    return np.bincount(step, weights=tokens >= np.quantile(tokens, 0.9))[:-1]


def unevenness(tokens: Numbers, tokens_per_step: int, steps_together: int = 1, permutations: int = 100) -> float:
    """How far the variance of these counts lies from that of random permutations, in their standard deviations.

    Below about 3 there is no telling the order from a random one; a negative number is more even than random.
    """
    draw = np.random.default_rng(0)
    random = [
        long_clips_by_step(draw.permutation(tokens), tokens_per_step, steps_together).var() for _ in range(permutations)
    ]
    found = long_clips_by_step(tokens, tokens_per_step, steps_together).var()
    return float((found - np.mean(random)) / np.std(random))
