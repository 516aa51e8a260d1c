"""Settings of sampling, and of what is looked at during training: held-out loss and samples."""

from dataclasses import dataclass, field
from enum import Enum


class Solver(Enum):
    euler = "euler"
    heun = "heun"


@dataclass(frozen=True)
class SamplingConfig:
    """How frames are generated from a prompt."""

    steps: int = 50
    solver: Solver = Solver.euler
    guidance_scale: float = 5.0
    # Shift of the sampler's grid of t; see config.diffusion.
    shift: float = 1.0


@dataclass(frozen=True)
class ValidationConfig:
    # Steps between validations; 0 turns them off.
    evaluate_every: int = 500
    # Held-out clips whose loss is measured, on noise and timesteps that stay the same.
    clips: int = 16
    # Prompts sampled with the averaged weights at each validation, at this size.
    prompts: list[str] = field(default_factory=list)
    height: int = 128
    width: int = 224
    frames: int = 33
    fps: float = 16.0
