"""Whether long clips are spread over steps as a random order would spread them."""

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def long_clips_by_step(tokens: Numbers, tokens_per_step: int, least: float) -> NDArray[np.int64]:
    """How many clips of at least so many tokens each step of an epoch has, the last one left out.

    Args:
        tokens: of each clip, in the order in which they are trained on.
        tokens_per_step: of one step, or of several that are counted together.
        least: what makes a clip long.
    """
    starts = (np.cumsum(tokens) - tokens)[tokens >= least]
    num_steps = int(tokens.sum()) // tokens_per_step
    return np.bincount(starts // tokens_per_step, minlength=num_steps)[:num_steps]


def unevenness(tokens: Numbers, tokens_per_step: int, steps_together: int = 1, permutations: int = 100) -> float:
    """How far the variance of the longest tenth's counts lies from that of random permutations, in the standard
    deviations of the latter.

    Below about 3 there is no telling the order from a random one; a negative number is more even than random.
    """
    draw = np.random.default_rng(0)
    counted, least = tokens_per_step * steps_together, float(np.quantile(tokens, 0.9))
    random = [long_clips_by_step(draw.permutation(tokens), counted, least).var() for _ in range(permutations)]
    found = long_clips_by_step(tokens, counted, least).var()
    return float((found - np.mean(random)) / np.std(random))
