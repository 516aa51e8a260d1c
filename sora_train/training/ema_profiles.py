"""How much of an average each step has: power functions of the step, and any of them as a sum of others.

Karras et al. 2024 ("Analyzing and improving the training dynamics of diffusion models", arXiv:2312.02696), section 3
and appendix C. An average of exponent gamma after step t weighs step s by s^gamma: it is as wide at any time as a fixed
share of the run, and its length is that width (the standard deviation of its weights) as a share of t. Everything in
float64.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
# gamma = 0, in which all steps count alike.
LONGEST = 12**-0.5


def exponent(length: float) -> float:
    """gamma of a relative length (sigma_rel): the largest root of length^2 (gamma + 2)^2 (gamma + 3) = gamma + 1."""
    ratio = length**-2
    return float(np.roots([1, 7, 16 - ratio, 12 - ratio]).real.max())


def decay(step: int, length: float) -> float:
    """What is left of an average after step `step` (from 0): (1 - 1/t)^(gamma + 1), t = step + 1 (eq. 2)."""
    return float((1 - 1 / (step + 1)) ** (exponent(length) + 1))


def overlap(t_a: Vector, gamma_a: Vector, t_b: Vector, gamma_b: Vector) -> Vector:
    """Inner product of two profiles, which weigh step s by (gamma + 1) s^gamma / t^(gamma + 1) up to t and by nothing
    after (the integral of appendix C)."""
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma_last = np.where(t_a > t_b, gamma_a, gamma_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * last)
    product: Vector = scale * (first / last) ** gamma_last
    return product


def coefficients(averages: Sequence[tuple[int, float]], target: tuple[int, float]) -> tuple[Vector, float]:
    """What to multiply averages with, so that their sum is the nearest there is to an average that was not kept.

    The least squares of appendix C, with coefficients that sum to 1 as the weights of any average do: what the network
    began with is then kept exactly, which matters when there are few averages.

    Args:
        averages: steps done and length of each; no two alike.
        target: of the one wanted.

    Returns:
        The coefficients, and how far the sum of profiles is from the one wanted, as a share of its norm.
    """
    t, length = np.array(averages, dtype=np.float64).T
    gamma = np.array([exponent(value) for value in length])
    t_wanted, gamma_wanted = np.array(float(target[0])), np.array(exponent(target[1]))
    products = overlap(t[:, None], gamma[:, None], t[None], gamma[None])
    wanted = overlap(t, gamma, t_wanted, gamma_wanted)
    size = overlap(t_wanted, gamma_wanted, t_wanted, gamma_wanted)
    unit = 1 / np.sqrt(np.diag(products))  # profiles of norm 1: early ones are large, and late ones count as much
    sides = unit[:, None] * np.stack([wanted, np.ones_like(wanted)], axis=1)
    free, shift = (unit[:, None] * np.linalg.solve(unit[:, None] * products * unit[None], sides)).T
    found = free + shift * (1 - free.sum()) / shift.sum()
    square = found @ products @ found - 2 * found @ wanted + size
    return found, float(np.sqrt(max(square, 0.0) / size))
