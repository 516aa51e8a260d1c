"""The whole configuration of a training run, as one frozen tree, and how YAML becomes it.

`build_config` is strict: a key the schema does not know, a value of the wrong type or a missing value is an error
of one line that names the key.
"""

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.data import DataConfig
from sora_train.config.diffusion import DiffusionConfig
from sora_train.config.encoders import CodecConfig, ImageEncoderConfig, TextEncoderConfig
from sora_train.config.initial import InitConfig
from sora_train.config.model import ModelConfig
from sora_train.config.optim import EmaConfig, OptimConfig
from sora_train.config.parallel import ParallelConfig
from sora_train.config.tracking import TrackingConfig
from sora_train.config.validation import SamplingConfig, ValidationConfig

Schema = TypeVar("Schema")


class ConfigError(ValueError):
    """A user's mistake in the configuration: one line, naming field, value and fix."""


@dataclass(frozen=True)
class TrainConfig:
    # Names the run in W&B and, by default, its directory.
    name: str = "run"
    # Everything the run writes is in here; running the same command again resumes from it.
    run_dir: str = "runs/run"
    seed: int = 0
    # Optimizer steps in all.
    steps: int = 100000
    # Threads of torch on each rank's CPU; 0 shares the host's cores among its ranks.
    threads: int = 0
    # Settings (or whole sections) that a resumed run may have changed, by name; see training/run.py.
    allow_changes: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    # How `sora_train.sample` generates from this run unless told otherwise.
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def build_config(schema: type[Schema], values: DictConfig | dict[str, Any]) -> Schema:
    """Lays `values` over the defaults of the dataclass `schema`; returns the frozen tree.

    Raises:
        ConfigError: unknown key, wrong type, or a value left at `???`.
    """
    try:
        plain = OmegaConf.to_container(values) if isinstance(values, DictConfig) else values
        config = OmegaConf.merge(writable(schema), OmegaConf.create(plain))
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{missing[0]} is not set: pass {missing[0]}=VALUE")
        built: Schema = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, schema)) from error
    if isinstance(built, TrainConfig):
        check_data_named(built.data)
    return built


def check_data_named(config: DataConfig) -> None:
    """Raises ConfigError unless one data set is named, or several are, but not both ways at once."""
    if config.shards and config.datasets:
        raise ConfigError(
            f"data.shards={config.shards} and data.datasets={','.join(config.datasets)} are both set: keep one of them"
        )
    if not config.shards and not config.datasets:
        raise ConfigError("data.shards is not set: pass data.shards=VALUE (or several in data.datasets)")


def save_config(config: Any, path: Path) -> None:
    """Writes the resolved tree as YAML: `load_config` reads it back to an equal tree, and the command it configures
    runs on it with `--config-path DIR --config-name NAME`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(config_text(config))
    temporary.replace(path)


def config_text(config: Any) -> str:
    """What `save_config` writes."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
    return f"defaults: [{schema_name(type(config))}, _self_]\n{text}"


def schema_name(schema: type) -> str:
    """Under which a YAML file names the dataclass in its defaults list: `TrainConfig` for TrainConfig."""
    return schema.__name__


def load_config(schema: type[Schema], path: Path) -> Schema:
    """Reads a YAML file written by `save_config`."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give the directory of a run")
    values = OmegaConf.load(path)
    assert isinstance(values, DictConfig)
    values.pop("defaults", None)
    return build_config(schema, values)


def explain(error: Exception, schema: type) -> str:
    """One line for an omegaconf or Hydra error: the key, what is wrong, and the nearest key that exists."""
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and "Could not override" not in str(error):
        error = cause
    key = str(getattr(error, "full_key", None) or getattr(error, "key", None) or "")
    message = str(getattr(error, "msg", None) or error).splitlines()[0]
    if "not in" in message or "Could not override" in message:
        quoted = message.split("'")
        key = key or (quoted[1] if len(quoted) > 1 else "")
        near = difflib.get_close_matches(key, known_keys(schema), n=1, cutoff=0.5)
        return f"{key} is not a setting" + (f": did you mean {near[0]}?" if near else "")
    return f"{key}: {message}" if key and key not in message else message


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, sections included."""
    hints = get_type_hints(schema)
    keys: list[str] = []
    for item in fields(schema):
        keys.append(prefix + item.name)
        if is_dataclass(hints[item.name]):
            keys += known_keys(hints[item.name], prefix + item.name + ".")  # type: ignore[arg-type]
    return keys


def writable(schema: type) -> DictConfig:
    """The schema's defaults as an omegaconf tree that takes overrides, which a frozen dataclass alone does not."""
    config = OmegaConf.structured(schema)
    _set_writable(config)
    return config


def _set_writable(config: Any) -> None:
    if isinstance(config, DictConfig):
        OmegaConf.set_readonly(config, False)
        for key in config:
            if not OmegaConf.is_missing(config, key):
                _set_writable(config._get_node(key))
