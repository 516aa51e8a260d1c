"""Ranges of the settings of a training run: what is outside cannot work, and is said before anything starts."""

import functools
from typing import Any

from sora_train.config.optim import EmaConfig, EmaProfile
from sora_train.config.parallel import GROUP_SIZES, Checkpointing, ParallelConfig
from sora_train.config.root import ConfigError, TrainConfig

# Of the moving average as a share of the run; at 0.289 all steps count alike.
SHORTEST_AVERAGE, LONGEST_AVERAGE = 0.005, 0.28
# From and including the first to and including the second, which may be open.
RANGES: dict[str, tuple[float, float | None]] = {
    "steps": (1, None),
    "threads": (0, None),
    "model.width": (1, None),
    "model.depth": (1, None),
    "model.heads": (1, None),
    "model.mlp_width": (1, None),
    "model.patch_frames": (1, None),
    "model.patch_height": (1, None),
    "model.patch_width": (1, None),
    "model.frequency_width": (2, None),
    "model.text.width": (1, None),
    "model.text.layers": (0, None),
    "model.text.heads": (1, None),
    "model.text.max_bytes": (1, None),
    "text_encoder.max_tokens": (1, None),
    "diffusion.first_frame_probability": (0, 1),
    "diffusion.timesteps.std": (0, None),
    "diffusion.timesteps.low": (0, 1),
    "diffusion.timesteps.high": (0, 1),
    "data.tokens_per_step": (1, None),
    "data.max_tokens_per_pack": (1, None),
    "data.held_out_fraction": (0, 1),
    "data.max_bad_share": (0, 1),
    "optim.beta1": (0, 1),
    "optim.beta2": (0, 1),
    "optim.momentum": (0, 1),
    "optim.weight_decay": (0, None),
    "optim.clip_norm": (0, None),
    "optim.warmup_steps": (0, None),
    "optim.decay_steps": (0, None),
    "optim.final_fraction": (0, 1),
    "ema.decay": (0, 1),
    "ema.snapshot_every": (0, None),
    "parallel.zero_stage": (0, 3),
    "parallel.activation_memory_gib": (0, None),
    "checkpoint.save_every": (1, None),
    "checkpoint.keep": (0, None),
    "checkpoint.keep_hours": (0, None),
    "checkpoint.keep_every": (0, None),
    "validation.evaluate_every": (0, None),
    "validation.clips": (0, None),
    "sampling.steps": (1, None),
    "tracking.log_every": (1, None),
}
# More than 0.
POSITIVE = (
    "optim.learning_rate",
    "optim.eps",
    "diffusion.timesteps.shift",
    "diffusion.min_t",
    "sampling.shift",
    "validation.fps",
)


def check_limits(config: TrainConfig) -> None:
    """Raises ConfigError for the first setting outside its range."""
    for key, (low, high) in RANGES.items():
        value = _value(config, key)
        # Said this way round, so that nan is refused as well.
        if not (value >= low and (high is None or value <= high)):
            raise ConfigError(f"{key}={value}: choose {f'{low} or more' if high is None else f'{low} to {high}'}")
    for key in ("optim.beta1", "optim.beta2", "optim.momentum"):
        if _value(config, key) == 1:
            raise ConfigError(f"{key}=1: choose less than 1")
    for key in POSITIVE:
        if not _value(config, key) > 0:
            raise ConfigError(f"{key}={_value(config, key)}: choose more than 0")
    timesteps = config.diffusion.timesteps
    if timesteps.low >= timesteps.high:
        raise ConfigError(f"diffusion.timesteps.low={timesteps.low} is not below high={timesteps.high}: change one")
    check_averages(config.ema)
    check_parallel(config.parallel)


def check_averages(config: EmaConfig) -> None:
    """Raises ConfigError for lengths that no average has or that are there twice, and for snapshots of none."""
    for length in config.lengths:
        if not SHORTEST_AVERAGE <= length <= LONGEST_AVERAGE:
            raise ConfigError(f"ema.lengths has {length:g}: choose {SHORTEST_AVERAGE} to {LONGEST_AVERAGE}")
    names = [f"{length:g}" for length in config.lengths]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"ema.lengths=[{','.join(names)}]: choose one or more, each once")
    if config.snapshot_every > 0 and (config.profile is not EmaProfile.power or len(names) < 2):
        raise ConfigError(
            f"ema.snapshot_every={config.snapshot_every} with ema.profile={config.profile.value} and ema.lengths="
            f"[{','.join(names)}]: other averages are rebuilt from two or more of ema.profile=power; set that, or "
            "ema.snapshot_every=0"
        )


def check_parallel(config: ParallelConfig) -> None:
    """Raises ConfigError for a size of groups that there is not, and for settings that do nothing together."""
    if config.largest_group not in GROUP_SIZES:
        raise ConfigError(f"parallel.largest_group={config.largest_group}: choose 1, 2, 4 or 8")
    has_budget = config.activation_memory_gib > 0
    if has_budget != (config.checkpointing is Checkpointing.budget):
        raise ConfigError(
            f"parallel.checkpointing={config.checkpointing.value} with parallel.activation_memory_gib="
            f"{config.activation_memory_gib:g}: a budget needs both, checkpointing=budget and more than 0 GiB"
        )
    if config.offload_activations and config.checkpointing is Checkpointing.none:
        raise ConfigError(
            "parallel.offload_activations moves what checkpointing keeps, and parallel.checkpointing=none keeps "
            "everything: choose operations, block or budget"
        )


def _value(config: TrainConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)
