"""Settings of the optimizer, the learning-rate schedule and the moving average of the weights."""

from dataclasses import dataclass
from enum import Enum


class OptimizerKind(Enum):
    adamw = "adamw"
    # Muon for the matrices of the transformer's blocks, AdamW for the rest; both take one learning rate.
    muon = "muon"


class ScheduleKind(Enum):
    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"  # warm up, stable, decay (Hu et al. 2024)


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
    # Last steps over which wsd decays.
    decay_steps: int = 0
    # Learning rate at the end of cosine and wsd, as a share of learning_rate.
    final_fraction: float = 0.0


@dataclass(frozen=True)
class EmaConfig:
    # Decay per step, reached gradually: min(decay, (1 + step) / (10 + step)).
    decay: float = 0.999
