"""Rectified flow: a straight line from latents (t = 0) to noise (t = 1), and what the network is asked for on it.

Liu et al. 2022 (arXiv:2209.03003), Lipman et al. 2022 (arXiv:2210.02747), Esser et al. 2024 (arXiv:2403.03206).
All functions take one sample, or anything that broadcasts.
"""

from torch import Tensor

from sora_train.config.diffusion import Target


def interpolate(latents: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """noisy_latents = (1 - t) latents + t noise (Esser et al. 2024, eq. 13)."""
    return (1 - t) * latents + t * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """d noisy_latents / dt = noise - latents (Liu et al. 2022, eq. 1, time reversed)."""
    return noise - latents


def to_velocity(
    prediction: Tensor, noisy_latents: Tensor, t: float | Tensor, target: Target, min_t: float = 0.0
) -> Tensor:
    """What the network put out, as a velocity: (noisy - latents) / t when it predicts latents.

    `min_t` bounds the division in a loss; a sampler leaves it at 0, since it never asks at t = 0.
    """
    if target is Target.velocity:
        return prediction
    return (noisy_latents - prediction) / (t.clamp(min=min_t) if isinstance(t, Tensor) else max(t, min_t))


def to_latents(prediction: Tensor, noisy_latents: Tensor, t: float | Tensor, target: Target) -> Tensor:
    """What the network put out, as latents: noisy - t velocity when it predicts velocity."""
    return prediction if target is Target.latents else noisy_latents - t * prediction


def squared_error(
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: float | Tensor,
    *,
    prediction_is: Target,
    loss_on: Target,
    min_t: float,
) -> Tensor:
    """Squared error of each element, in the space of `loss_on`, whatever the network predicts.

    Measured on velocity, an error of predicted latents counts 1 / max(t, min_t)^2 times (Li & He 2025,
    arXiv:2511.13720); measured on latents, an error of predicted velocity counts t^2 times.
    """
    if prediction_is is loss_on:
        wanted = latents if loss_on is Target.latents else velocity_target(latents, noise)
        return (prediction - wanted).square()
    noisy_latents = interpolate(latents, noise, t)
    if loss_on is Target.latents:
        return (to_latents(prediction, noisy_latents, t, prediction_is) - latents).square()
    # Both sides go through the same bounded division: at t < min_t a perfect prediction must still cost nothing.
    wanted = to_velocity(latents, noisy_latents, t, prediction_is, min_t)
    return (to_velocity(prediction, noisy_latents, t, prediction_is, min_t) - wanted).square()
