"""The run directory's memory of what is being trained: config, fingerprints, how it ended."""

import atexit
import fcntl
import hashlib
import json
import logging
import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fsspec
from omegaconf import OmegaConf

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.data import DataConfig, dataset_configs
from sora_train.config.limits import check_limits
from sora_train.config.root import ConfigError, TrainConfig, known_keys, save_config
from sora_train.data.loader import check_settings
from sora_train.data.order import open_datasets
from sora_train.data.stages import build_stages
from sora_train.distributed.collectives import barrier, gather_facts
from sora_train.distributed.topology import World
from sora_train.encoders.video_codec import codec_shape
from sora_train.generation import check_sizes
from sora_train.models.video_dit import check_model
from sora_train.training.checkpoint_folders import complete_checkpoints, folder_of
from sora_train.training.checkpoint_reading import checkpoints_of
from sora_train.training.first_frames import check_first_frames
from sora_train.training.fragment_files import DamagedCheckpointError, read_manifest
from sora_train.training.initial_weights import check_initial, check_prompts
from sora_train.training.places import Folder
from sora_train.training.quarantine import restore_ledger
from sora_train.training.validation import validation_requests

STATUS = "status.json"
LOCK = ".lock"
# May differ between the start of a run and its continuation: they do not change what is learnt, or are meant to be
# extended. Everything else needs allow_changes.
FREE_TO_CHANGE = (
    "name",
    "run_dir",
    "steps",
    "threads",
    "allow_changes",
    "data.shards",  # may have moved; the fingerprint tells whether it is the same data
    "data.cache_dir",
    "data.workers",
    "data.read_ahead",
    "data.stall_seconds",
    "data.worker_memory_gib",
    "data.cache_gib",
    "data.max_bad_share",
    "data.max_tokens_per_pack",  # packs are cut anew for each world; the batch stays
    "parallel.",
    "checkpoint.",
    "ema.snapshot_every",
    "validation.",
    "sampling.",
    "tracking.",
)

log = logging.getLogger(__name__)


def resolved(config: TrainConfig) -> dict[str, Any]:
    """The config as plain values, as YAML and manifests hold it."""
    values = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def facts(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says about where it comes from."""
    return {
        "config": resolved(config),
        "data_sha256": data_fingerprints(config.data),
        "versions": {name: version(name) for name in ("sora_train", "torch", "deepspeed", "webdataset")},
        "code": code_fingerprint(),
    }


def data_fingerprints(config: DataConfig) -> dict[str, str]:
    """Of each data set the SHA-256 of dataset.json, which holds those of all shards."""
    fingerprints = {}
    for name, item in dataset_configs(config).items():
        with fsspec.open(f"{item.shards.rstrip('/')}/dataset.json", "rb") as file:
            fingerprints[name] = hashlib.sha256(file.read()).hexdigest()
    return fingerprints


def code_fingerprint() -> str:
    """The git commit of the installed source tree, or nothing when it is not one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def check(config: TrainConfig) -> dict[str, Any]:
    """All that can be checked without a device or a process group. Returns the run's facts (see `facts`).

    Raises:
        ConfigError: a setting that cannot work, no data, or a run directory trained with other settings.
    """
    check_limits(config)
    check_model(config.model)
    check_same_place(Path(config.run_dir), config.checkpoint)
    if not complete_checkpoints(folder_of(Path(config.run_dir), config.checkpoint)):  # a run that goes on has its own
        check_initial(config.init, config.model, config.diffusion.timesteps)
    channels = codec_shape(config.codec).channels
    for name in ("in_channels", "out_channels"):
        if getattr(config.model, name) != channels:
            raise ConfigError(
                f"model.{name}={getattr(config.model, name)}, but codec={config.codec.kind.value} has {channels} "
                f"channels: set model.{name}={channels}"
            )
    check_sizes(validation_requests(config), config.model, codec_shape(config.codec))
    check_prompts(config.init, config.validation.prompts)
    check_first_frames(config, codec_shape(config.codec))
    check_run_dir(Path(config.run_dir))
    check_settings(config.data)
    build_stages(config.data)
    open_datasets(config.data)
    new_facts = facts(config)
    check_continuation(config, new_facts)
    return new_facts


def check_run_dir(run_dir: Path) -> None:
    """Raises ConfigError unless the run directory can be made or written to; makes nothing."""
    there = next((path for path in (run_dir, *run_dir.parents) if path.exists()), Path())
    if not there.is_dir():
        raise ConfigError(f"run_dir={run_dir}: {there} is a file: choose another run_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir}: {there} is not writable: choose another run_dir")


def check_same_place(run_dir: Path, config: CheckpointConfig) -> None:
    """Raises ConfigError for a run whose checkpoints are elsewhere: it would begin anew and drop what it has logged."""
    old, new = checkpoints_of(run_dir), folder_of(run_dir, config)
    if old != new and complete_checkpoints(old) and not complete_checkpoints(new):
        raise ConfigError(
            f"checkpoint.folder={config.folder or '(empty)'}, but the checkpoints of {run_dir} are in {old}: set that, "
            "move them, or choose another run_dir"
        )


def open_run_dir(config: TrainConfig, world: World) -> Path:
    """Makes the run directory with its config and turns logging on; rank 0 speaks for all."""
    logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s", force=True)
    run_dir = Path(config.run_dir)
    if problem := gather_facts(lock(run_dir) if world.is_main else None)[0]:
        raise ConfigError(problem)
    if world.is_main:
        save_config(config, run_dir / "config.yaml")
        write_status(run_dir, "running", None)
        atexit.register(write_status, run_dir, "failed", None)  # a run that ends well leaves before that
        restore_ledger(run_dir, folder_of(run_dir, config.checkpoint))
    barrier()
    return run_dir


def lock(run_dir: Path, patience_seconds: float = 30.0) -> str | None:
    """Makes the run directory this process's own until it ends: two runs in one would remove what the other writes.

    Returns:
        What is wrong, where another process holds it for longer than one takes that was killed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # never closed: that would give the lock away
    last = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # children do not inherit it
            return None
        except (BlockingIOError, PermissionError):
            if time.monotonic() > last:
                return f"run_dir={run_dir} is being trained by another process: end that, or choose another run_dir"
            time.sleep(0.2)
        except OSError as error:
            log.info("%s: no locks here (%s): start no second run in it", run_dir, error)
            return None


def close_run_dir(run_dir: Path, world: World, state: str, step: int) -> None:
    """Leaves word of how the run ended."""
    if world.is_main:
        atexit.unregister(write_status)
        write_status(run_dir, state, step)
        log.info("%s after %d steps: %s", state, step, run_dir)


def check_continuation(config: TrainConfig, new_facts: dict[str, Any]) -> None:
    """Compares with the newest checkpoint of the run directory.

    Raises:
        ConfigError: a setting differs that is not free to change and not in `allow_changes`; or the data does.
    """
    known = known_keys(TrainConfig)
    for name in config.allow_changes:
        if name not in known and name != "data":
            raise ConfigError(f"allow_changes: {name} is not a setting")
    old_facts = _newest_manifest(folder_of(Path(config.run_dir), config.checkpoint))
    if old_facts is not None:
        old, new = _with_defaults(flatten(old_facts["config"])), flatten(new_facts["config"])
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        free = (*FREE_TO_CHANGE, *(f"data.datasets.{name}.shards" for name in old_facts["data_sha256"]))
        refused = [key for key in changed if not key.startswith((*free, *config.allow_changes))]
        if refused:
            difference = "; ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in refused)
            allow = sorted({_setting(key, known) for key in refused})
            raise ConfigError(
                f"{config.run_dir} was trained with other settings ({difference}): choose another run_dir, or pass "
                f"allow_changes=[{','.join(allow)}] to go on with the new ones"
            )
        # A data set that was not there before is one of the changed settings.
        fingerprints = new_facts["data_sha256"]
        others = [name for name, sha256 in old_facts["data_sha256"].items() if fingerprints.get(name) != sha256]
        if others and "data" not in config.allow_changes:
            what = f"data.shards={config.data.shards}" if config.data.shards else f"data.datasets: {', '.join(others)}"
            raise ConfigError(
                f"{what} holds other data than {config.run_dir} was trained on: "
                "choose another run_dir, or pass allow_changes=[data] to go on with it"
            )


def _with_defaults(old: dict[str, Any]) -> dict[str, Any]:
    """A run of before a setting existed did what the setting's default does."""
    defaults = flatten(resolved(TrainConfig()))
    missing = {key: value for key, value in defaults.items() if not any(f"{k}.".startswith(f"{key}.") for k in old)}
    return {**missing, **old}


def _setting(key: str, known: list[str]) -> str:
    """The setting that a flattened key is part of: of a dict's entry, the dict."""
    while key not in known and "." in key:
        key = key.rpartition(".")[0]
    return key


def _newest_manifest(checkpoints: Folder) -> dict[str, Any] | None:
    """Of the newest checkpoint that has one; a damaged manifest is passed over, as `Checkpoints.load_latest` will."""
    for folder in complete_checkpoints(checkpoints):
        try:
            return read_manifest(folder)
        except DamagedCheckpointError:
            continue
    return None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def write_status(run_dir: Path, state: str, step: int | None) -> None:
    """How the run stands, for the launcher: "running" (its step is in metrics.jsonl), "finished", "stopped" (by a
    signal, to be requeued) or "failed" (its last line says why)."""
    temporary = run_dir / (STATUS + ".tmp")
    temporary.write_text(json.dumps({"state": state, "step": step}))
    temporary.replace(run_dir / STATUS)
