"""Settings of the optimizer, the learning-rate schedule and the moving average of the weights."""

from dataclasses import dataclass, field
from enum import Enum


class OptimizerKind(Enum):
    adamw = "adamw"
    # Muon for the matrices of the transformer's blocks, AdamW for the rest; both take one learning rate.
    muon = "muon"


class ScheduleKind(Enum):
    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"  # warm up, stable, decay (Hu et al. 2024)


class DecayShape(Enum):
    """How wsd falls, over the share x of its decay that is done."""

    linear = "linear"  # 1 - x
    sqrt = "sqrt"  # 1 - sqrt(x): fast at first; the better one in Hägele et al. 2024


@dataclass(frozen=True)
class OptimConfig:
    kind: OptimizerKind = OptimizerKind.adamw
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    # Of kind=muon.
    momentum: float = 0.95
    weight_decay: float = 0.01
    # Largest norm of the gradient of one step; 0 turns clipping off.
    clip_norm: float = 1.0
    schedule: ScheduleKind = ScheduleKind.constant
    warmup_steps: int = 100
    # Last steps over which wsd decays, and how.
    decay_steps: int = 0
    decay_shape: DecayShape = DecayShape.linear
    # Learning rate at the end of cosine and wsd, as a share of learning_rate.
    final_fraction: float = 0.0


class EmaProfile(Enum):
    constant = "constant"  # a decay per step that stays
    # Step s counts as s^gamma: as wide as a fixed share of the run, whenever it ends (Karras et al. 2024). Several
    # lengths are kept; snapshots of two give any other after training (training/ema.py).
    power = "power"


@dataclass(frozen=True)
class EmaConfig:
    profile: EmaProfile = EmaProfile.constant
    # With profile=constant: decay per step, reached gradually: min(decay, (1 + step) / (10 + step)).
    decay: float = 0.999
    # With profile=power: widths as shares of the run so far; validation and samples use the first.
    lengths: list[float] = field(default_factory=lambda: [0.05, 0.1])
    # With profile=power: steps between snapshots of the averages, which stay; 0: none. 50 in a run give lengths from
    # 0.03 to 0.2 to within some 1e-5 of the weights.
    snapshot_every: int = 0
