"""What the weights of a new run start from: those of a Wan folder, each rank reading the pieces that it holds."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

import torch
from omegaconf import OmegaConf

from sora_train.config.diffusion import TimestepConfig
from sora_train.config.initial import Expert, InitConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.distributed.partitions import Fragment, apply_loaded
from sora_train.distributed.topology import World
from sora_train.models.wan_weights import WanWeights, expert_boundary
from sora_train.training.checkpoint import TrainState
from sora_train.training.ema import Ema

# A name, and what only the byte text path has.
NOT_OF_WAN = ("name", "text.layers", "text.heads", "text.max_bytes")
# More settings than these are of another model, not of one that was changed.
MAX_SETTINGS_NAMED = 6

log = logging.getLogger(__name__)


def check_initial(init: InitConfig, model: ModelConfig, timesteps: TimestepConfig) -> None:
    """Compares what the folder says of itself, names and shapes of its tensors included, with the settings.

    Raises:
        ConfigError: no folder of Wan's, weights that are not whole, a model of other sizes, or an expert that would be
            trained on all levels of noise, or on those of the other.
    """
    if not init.weights:
        if init.expert is not None:
            raise ConfigError(f"init.expert={init.expert.value} is one of a folder's two: set init.weights too")
        return
    try:
        weights = WanWeights(init.weights, expert_name(init))
    except ConfigError as error:
        raise ConfigError("init.weights: " + str(error).replace("expert=", "init.expert=")) from error
    check_same_model(model, weights.config, init.weights)
    boundary = expert_boundary(init.weights)
    if init.expert is not None and boundary is not None:
        low, high = (boundary, 1.0) if init.expert is Expert.high else (0.0, boundary)
        is_all = (timesteps.low, timesteps.high) == (0, 1)
        if is_all or timesteps.low >= high or timesteps.high <= low:
            raise ConfigError(
                f"init.expert={init.expert.value} is asked for t from {low:g} to {high:g} alone, but "
                f"diffusion.timesteps draws {timesteps.low:g} to {timesteps.high:g}: set "
                f"diffusion.timesteps.low={low:g} diffusion.timesteps.high={high:g}"
            )


def check_prompts(init: InitConfig, prompts: Sequence[str]) -> None:
    """Raises ConfigError for prompts that an expert would have to sample alone."""
    if init.expert is not None and prompts:
        raise ConfigError(
            f"validation.prompts would be sampled with the expert of {init.expert.value} noise alone: leave them empty "
            "and use sora_train.sample, which takes both"
        )


def check_same_model(ours: ModelConfig, theirs: ModelConfig, folder: str) -> None:
    """Raises ConfigError naming the first setting in which they differ, and the `model=` that is the folder's."""
    mine, wanted = _settings(ours), _settings(theirs)
    different = [name for name in mine if mine[name] != wanted[name]]
    if different:
        first = different[0]
        raise ConfigError(
            f"model.{first}={mine[first]}, but init.weights={folder} has {wanted[first]}: {_fix(different, wanted)}"
        )


def load_initial(
    init: InitConfig, engine: Any, held: list[Fragment], ema: Ema, state: TrainState, world: World
) -> None:
    """Fills this rank's pieces, and their averages, from the folder. Every rank must call it.

    A run that has a checkpoint goes on from that: nothing is read then.
    """
    if not init.weights:
        return
    if state.step > 0:
        if world.is_main:
            log.info("init.weights=%s is not read: going on from the checkpoint of step %d", init.weights, state.step)
        return
    weights = WanWeights(init.weights, expert_name(init))
    weights.fill((fragment.name, fragment.start, fragment.master) for fragment in held)
    with torch.no_grad():
        for fragment, averages in zip(held, ema.kept, strict=True):
            for average in averages.values():
                average.copy_(fragment.master)
    apply_loaded(engine, 0)
    if world.is_main:
        number = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
        log.info("weights: %s parameters of %s", f"{number:,}", weights.folder)


def expert_name(init: InitConfig) -> str | None:
    """As `WanWeights` takes it."""
    return None if init.expert is None else init.expert.value


def _settings(model: ModelConfig) -> dict[str, Any]:
    """Those that a folder determines, by dotted name, as YAML shows them."""
    flat = {**asdict(model), **{f"text.{name}": value for name, value in asdict(model.text).items()}}
    return {name: getattr(v, "value", v) for name, v in flat.items() if name not in ("text", *NOT_OF_WAN)}


def _fix(different: list[str], wanted: dict[str, Any]) -> str:
    """The shipped size that leaves the fewest settings to be given, and those; or, where none is near, all."""
    remaining = {"": different}
    defaults = _settings(ModelConfig())
    for file in sorted(resources.files("sora_train.configs").joinpath("model").iterdir(), key=lambda file: file.name):
        shipped = OmegaConf.create(file.read_text())
        size = {name: OmegaConf.select(shipped, name, default=value) for name, value in defaults.items()}
        remaining[f"model={file.name.removesuffix('.yaml')}"] = [name for name in wanted if size[name] != wanted[name]]
    best = min(remaining, key=lambda name: len(remaining[name]))
    if len(remaining[best]) > MAX_SETTINGS_NAMED:
        best = ""
    return " ".join(filter(None, ["choose", best, *(f"model.{name}={wanted[name]}" for name in remaining[best])]))
