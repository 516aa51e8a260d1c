"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math

from sora_train.config.optim import DecayShape, OptimConfig, ScheduleKind


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`.

    Linear warm-up, then constant; or a half cosine (Loshchilov & Hutter 2017, eq. 5) down to `final_fraction`; or
    stable until the last `decay_steps` (or what the warm-up leaves of them), over which it falls linearly (Hu et al.
    2024) or as 1 - sqrt (Hägele et al. 2024, arXiv:2405.18392, section 3). Both reach their end after the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    falling = steps - config.warmup_steps
    share = 1.0  # of the way between the final learning rate and the peak
    if config.schedule is ScheduleKind.cosine:
        share = 0.5 * (1 + math.cos(math.pi * _done(step, steps, falling)))
    elif config.schedule is ScheduleKind.wsd:
        done = _done(step, steps, min(config.decay_steps, falling))
        share = 1 - (math.sqrt(done) if config.decay_shape is DecayShape.sqrt else done)
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * share)


def _done(step: int, steps: int, last: int) -> float:
    """What share of the last steps lies behind."""
    return min(1.0, max(0.0, 1 - (steps - step) / max(1, last)))
