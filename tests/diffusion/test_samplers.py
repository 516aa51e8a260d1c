import pytest
import torch

from sora_train.config.validation import SamplingConfig, Solver
from sora_train.diffusion.conditioning import guided, guided_samples
from sora_train.diffusion.samplers import num_evaluations, sample_latents

SHAPES = [(2, 3, 4, 4), (2, 1, 2, 6)]


def noises() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_known_sample_is_reached_exactly(solver, shift):
    """With one possible outcome the true velocity is (noisy - latents) / t and every path is straight."""
    goals = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]

    def field(samples, t):
        return [(sample - goal) / t for sample, goal in zip(samples, goals, strict=True)]

    reached = sample_latents(field, noises(), SamplingConfig(steps=4, solver=solver, shift=shift))
    for got, goal in zip(reached, goals, strict=True):
        torch.testing.assert_close(got, goal)


def gaussian_error(solver: Solver, steps: int) -> float:
    """Latents normal with spread s: the exact flow maps noise to s * noise (Karras et al. 2022, appendix B.3)."""
    spread = 0.3

    def field(samples, t):
        slope = (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2)
        return [slope * sample for sample in samples]

    reached = sample_latents(field, noises(), SamplingConfig(steps=steps, solver=solver))
    return float((reached[0] / noises()[0] - spread).abs().max())


def test_solvers_converge_at_their_order():
    euler = gaussian_error(Solver.euler, 20) / gaussian_error(Solver.euler, 40)
    heun = gaussian_error(Solver.heun, 20) / gaussian_error(Solver.heun, 40)
    assert 1.7 < euler < 2.4
    assert heun > 3
    assert gaussian_error(Solver.heun, 20) < 0.2 * gaussian_error(Solver.euler, 20)


def test_heun_never_asks_at_the_clean_end():
    levels = []

    def field(samples, t):
        levels.append(t)
        return samples

    sample_latents(field, noises(), SamplingConfig(steps=3, solver=Solver.heun))
    assert len(levels) == 5
    assert min(levels) > 0


def test_guidance_extends_the_line_from_without_to_with_text():
    with_text, without = torch.tensor([2.0]), torch.tensor([1.0])
    assert guided(with_text, without, 1.0) == 2
    assert guided(with_text, without, 0.0) == 1
    assert guided(with_text, without, 5.0) == 6
    assert [float(x) for x in guided_samples([with_text] * 2, [without, with_text], 3.0)] == [4, 2]


@pytest.mark.parametrize("solver", list(Solver))
def test_the_number_of_evaluations_is_known_beforehand(solver):
    asked = []
    config = SamplingConfig(steps=5, solver=solver)
    sample_latents(lambda samples, t: asked.append(t) or samples, [torch.zeros(1, 1, 1, 1)], config)
    assert len(asked) == num_evaluations(config)
