"""Which noise levels are trained on, and through which a sampler steps."""

import math
from statistics import NormalDist

import numpy as np

from sora_train.config.diffusion import TimestepConfig, TimestepDistribution

SMALLEST = 5e-324  # number above 0


def shifted(t: float, shift: float) -> float:
    """Moves t towards noise: shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23). 1 leaves t alone."""
    return shift * t / (1 + (shift - 1) * t)


def unshifted(t: float, shift: float) -> float:
    """The inverse of `shifted`."""
    return t / (t + shift * (1 - t))


def size_shift(config: TimestepConfig, num_tokens: int) -> float:
    """The shift of a sample: with `shift_base_tokens`, larger clips get more noise (Esser et al. 2024, 5.3.2)."""
    if config.shift_base_tokens is None:
        return config.shift
    return config.shift * math.sqrt(num_tokens / config.shift_base_tokens)


def sample_t(config: TimestepConfig, num_tokens: int, generator: np.random.Generator) -> float:
    """One draw of t in (0, 1) for a sample of `num_tokens` tokens, from the sample's own generator.

    Logit-normal (Esser et al. 2024, eq. 19) or uniform, then shifted for the sample's size; with bounds, that
    distribution on condition of low <= t <= high.
    """
    shift = size_shift(config, num_tokens)
    is_normal = config.distribution is TimestepDistribution.logit_normal
    if (config.low, config.high) != (0.0, 1.0):
        # The shift keeps the order of t, so bounds behind it are bounds before it.
        low, high = unshifted(config.low, shift), unshifted(config.high, shift)
        share = float(generator.random())
        t = _bounded_logit_normal(config, low, high, share) if is_normal else low + (high - low) * share
        # Rounded beyond a bound; or, where all of the distribution is far from both, at the nearer one.
        return min(max(shifted(t, shift), config.low), config.high)
    if is_normal:
        t = 1 / (1 + math.exp(-(config.mean + config.std * float(generator.standard_normal()))))
    else:
        t = float(generator.random())
    return shifted(t, shift)


def _bounded_logit_normal(config: TimestepConfig, low: float, high: float, share: float) -> float:
    """The t below which `share` of the distribution between `low` and `high` lies."""
    if config.std == 0:
        return 1 / (1 + math.exp(-config.mean))
    first, last = (_normal_of(t, config) for t in (low, high))
    # In the tail above the mean shares are all near 1 and lose their digits: mirrored, they are near 0.
    sign = -1.0 if first > 0 else 1.0
    below, above = (math.erfc(-sign * bound / math.sqrt(2)) / 2 for bound in (first, last))
    place = below + (above - below) * share
    place = min(max(place, SMALLEST), 1 - 2**-53)  # at an open end, or so far out that shares have no digits at all
    return 1 / (1 + math.exp(-(config.mean + config.std * sign * NormalDist().inv_cdf(place))))


def _normal_of(t: float, config: TimestepConfig) -> float:
    """Where t stands in the standard normal distribution it is drawn from."""
    if t in (0.0, 1.0):
        return math.inf if t else -math.inf
    return (math.log(t / (1 - t)) - config.mean) / config.std


def sampler_grid(steps: int, shift: float) -> list[float]:
    """steps + 1 noise levels from 1 to 0, evenly spaced before the shift. Raises ValueError for steps < 1."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    return [shifted(1 - step / steps, shift) for step in range(steps + 1)]
