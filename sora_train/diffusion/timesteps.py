"""Which noise levels are trained on, and through which a sampler steps."""

import math

import numpy as np

from sora_train.config.diffusion import TimestepConfig, TimestepDistribution


def shifted(t: float, shift: float) -> float:
    """Moves t towards noise: shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23). 1 leaves t alone."""
    return shift * t / (1 + (shift - 1) * t)


def size_shift(config: TimestepConfig, num_tokens: int) -> float:
    """The shift of a sample: with `shift_base_tokens`, larger clips get more noise (Esser et al. 2024, 5.3.2)."""
    if config.shift_base_tokens is None:
        return config.shift
    return config.shift * math.sqrt(num_tokens / config.shift_base_tokens)


def sample_t(config: TimestepConfig, num_tokens: int, generator: np.random.Generator) -> float:
    """One draw of t in (0, 1) for a sample of `num_tokens` tokens, from the sample's own generator.

    Logit-normal (Esser et al. 2024, eq. 19) or uniform, then shifted for the sample's size.
    """
    if config.distribution is TimestepDistribution.logit_normal:
        t = 1 / (1 + math.exp(-(config.mean + config.std * float(generator.standard_normal()))))
    else:
        t = float(generator.random())
    return shifted(t, size_shift(config, num_tokens))


def sampler_grid(steps: int, shift: float) -> list[float]:
    """steps + 1 noise levels from 1 to 0, evenly spaced before the shift. Raises ValueError for steps < 1."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    return [shifted(1 - step / steps, shift) for step in range(steps + 1)]
