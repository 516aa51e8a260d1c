"""Settings of what the weights of a new run start from."""

from dataclasses import dataclass
from enum import Enum


class Expert(Enum):
    """Of the two transformers of Wan 2.2 A14B."""

    high = "high"  # samples from pure noise down to the pipeline's boundary
    low = "low"  # from there to the end


@dataclass(frozen=True)
class InitConfig:
    # Folder of a Wan pipeline, or of one transformer, as diffusers lays it out; `experiment=wan2.1_t2v_1.3b` and its
    # like set all that goes with it. Empty: weights are drawn from `seed`. A run that goes on has its checkpoint.
    weights: str = ""
    # Which one, where the pipeline has two.
    expert: Expert | None = None
