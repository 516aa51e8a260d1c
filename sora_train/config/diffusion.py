"""Settings of the diffusion objective. Notation (one everywhere): t = 0 clean, t = 1 noise,
noisy = (1 - t) latents + t noise, velocity = noise - latents."""

from dataclasses import dataclass, field
from enum import Enum


class Target(Enum):
    velocity = "velocity"
    latents = "latents"


class TimestepDistribution(Enum):
    logit_normal = "logit_normal"
    uniform = "uniform"


class CountedBy(Enum):
    tokens = "tokens"
    samples = "samples"


@dataclass(frozen=True)
class TimestepConfig:
    distribution: TimestepDistribution = TimestepDistribution.logit_normal
    # Of the logit-normal: t = sigmoid(mean + std * normal).
    mean: float = 0.0
    std: float = 1.0
    # t -> shift * t / (1 + (shift - 1) * t) (Esser et al. 2024, eq. 23); 1 leaves t alone.
    shift: float = 1.0
    # With a value, the shift of a sample is shift * sqrt(tokens / shift_base_tokens): bigger clips, more noise.
    shift_base_tokens: int | None = None
    # Only t from low to high is drawn, after the shift: the distribution as it is there. One of Wan 2.2 A14B's two
    # experts has its own part of t.
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class DiffusionConfig:
    # What the network puts out, and in which space its error is squared.
    prediction: Target = Target.velocity
    loss_on: Target = Target.velocity
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    # With prediction=latents and loss_on=velocity the error is divided by max(t, min_t).
    min_t: float = 0.05
    # The summed error is divided by the step's planned number of tokens or of samples.
    counted_by: CountedBy = CountedBy.tokens
    # Share of the clips whose first frame is known (image to video). Where the model has condition_channels, it is
    # given beside the noise, and the share is 1. Otherwise the first latent frame stands there clean, with t = 0, and
    # the error is that of the other tokens; images, which are nothing but a first frame, stay noisy.
    first_frame_probability: float = 0.0
