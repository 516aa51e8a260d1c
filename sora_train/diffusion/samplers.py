"""From noise to latents along a velocity field, for a list of samples of any sizes at once."""

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from sora_train.config.validation import SamplingConfig, Solver
from sora_train.diffusion.timesteps import sampler_grid

# Velocities of all samples, [C, T, H, W] each, at one noise level t in (0, 1].
VelocityField = Callable[[list[Tensor], float], list[Tensor]]


def sample_latents(velocity_field: VelocityField, noise: Sequence[Tensor], config: SamplingConfig) -> list[Tensor]:
    """Integrates from t = 1 to 0.

    Euler asks for `steps` velocities. Heun (Karras et al. 2022, algorithm 1 without churn) corrects each step with
    the velocity at its end, except the last, whose end is t = 0: 2 * steps - 1 velocities.

    Args:
        velocity_field: (samples, t) -> velocities; guidance is its business.
        noise: standard normal, [C, T, H, W] each.
        config: solver, steps and shift.

    Returns:
        Latents, one a sample, of the noise's shapes.
    """
    samples = list(noise)
    levels = sampler_grid(config.steps, config.shift)
    for t, next_t in itertools.pairwise(levels):
        velocity = velocity_field(samples, t)
        ahead = _step(samples, velocity, next_t - t)
        if config.solver is Solver.heun and next_t > 0:
            corrected = velocity_field(ahead, next_t)
            mean = [(start + end) / 2 for start, end in zip(velocity, corrected, strict=True)]
            ahead = _step(samples, mean, next_t - t)
        samples = ahead
    return samples


def num_evaluations(config: SamplingConfig) -> int:
    """How often `sample_latents` asks for velocities."""
    return 2 * config.steps - 1 if config.solver is Solver.heun else config.steps


def _step(samples: list[Tensor], velocity: list[Tensor], dt: float) -> list[Tensor]:
    return [sample + dt * v for sample, v in zip(samples, velocity, strict=True)]
