import pytest
import torch

from sora_train.config.diffusion import Target
from sora_train.diffusion.flow_matching import interpolate, squared_error, to_latents, to_velocity, velocity_target

V, X = Target.velocity, Target.latents


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 4, 5, generator=generator, dtype=torch.float64)
    return latents, noise


def test_ends_of_the_path(sample):
    latents, noise = sample
    assert torch.equal(interpolate(latents, noise, 0.0), latents)
    assert torch.equal(interpolate(latents, noise, 1.0), noise)


def test_velocity_is_the_derivative_of_the_path(sample):
    latents, noise = sample
    slope = (interpolate(latents, noise, 0.7) - interpolate(latents, noise, 0.3)) / 0.4
    torch.testing.assert_close(velocity_target(latents, noise), slope)


@pytest.mark.parametrize("t", [0.01, 0.5, 1.0, torch.tensor(0.5, dtype=torch.float64)])
def test_predictions_convert_into_each_other(sample, t):
    latents, noise = sample
    noisy, velocity = interpolate(latents, noise, t), velocity_target(latents, noise)
    torch.testing.assert_close(to_velocity(latents, noisy, t, X), velocity)
    torch.testing.assert_close(to_latents(velocity, noisy, t, V), latents)
    assert to_velocity(velocity, noisy, t, V) is velocity
    assert to_latents(latents, noisy, t, X) is latents


@pytest.mark.parametrize("prediction", [V, X])
@pytest.mark.parametrize("loss", [V, X])
@pytest.mark.parametrize("t", [0.001, 0.5])
def test_a_perfect_prediction_costs_nothing(sample, prediction, loss, t):
    latents, noise = sample
    perfect = latents if prediction is X else velocity_target(latents, noise)
    error = squared_error(perfect, latents, noise, t, prediction_is=prediction, loss_on=loss, min_t=0.05)
    assert error.shape == latents.shape
    assert error.max() < 1e-20


@pytest.mark.parametrize(
    ("prediction", "loss", "t", "factor"),
    [(V, V, 0.5, 1), (X, X, 0.5, 1), (X, V, 0.5, 4), (X, V, 0.01, 400), (V, X, 0.5, 0.25)],
)
def test_errors_are_weighed_by_the_space_of_the_loss(sample, prediction, loss, t, factor):
    latents, noise = sample
    perfect = latents if prediction is X else velocity_target(latents, noise)
    error = squared_error(perfect + 0.1, latents, noise, t, prediction_is=prediction, loss_on=loss, min_t=0.05)
    torch.testing.assert_close(error, torch.full_like(error, 0.01 * factor))
