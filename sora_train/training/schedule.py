"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math

from sora_train.config.optim import OptimConfig, ScheduleKind


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`.

    Linear warm-up, then constant; or a half cosine (Loshchilov & Hutter 2017, eq. 5) down to
    `final_fraction`; or stable until the last `decay_steps`, over which it falls linearly (Hu et al. 2024).
    """
    peak, floor = config.learning_rate, config.learning_rate * config.final_fraction
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule is ScheduleKind.cosine:
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule is ScheduleKind.wsd:
        left = (steps - step) / max(1, config.decay_steps)
        return floor + (peak - floor) * min(1.0, max(0.0, left))
    return peak
