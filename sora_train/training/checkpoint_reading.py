"""Weights out of a checkpoint, for whoever does not train: one process, any number of ranks that wrote it."""

import logging
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.root import ConfigError
from sora_train.training.checkpoint_folders import complete_checkpoints, folder_of, reading
from sora_train.training.fragment_files import MANIFEST, DamagedCheckpointError, PieceReader, read_manifest, verify
from sora_train.training.places import Folder

log = logging.getLogger(__name__)


def latest_checkpoint(run_dir: Path) -> Folder:
    """The newest whole checkpoint of a run; `run_dir` may also be a checkpoint itself.

    Raises:
        ConfigError: there is none, or the checkpoint given is damaged.
    """
    if (run_dir / MANIFEST).exists():
        try:
            verify(run_dir)
        except DamagedCheckpointError as error:
            raise ConfigError(f"{run_dir} is damaged ({error}): give another checkpoint or the run itself") from error
        return run_dir
    for folder in complete_checkpoints(checkpoints_of(run_dir)):
        try:
            verify(folder)
            return folder
        except DamagedCheckpointError as error:
            log.warning("%s is damaged (%s): trying the one before", folder, error)
    raise ConfigError(f"{run_dir} holds no whole checkpoint: give the directory of a run that has saved one")


def checkpoints_of(run_dir: Path) -> Folder:
    """Where a run's checkpoints are, by the config it left: not always in its directory, unless it was moved there."""
    written, inside = run_dir / "config.yaml", run_dir / "checkpoints"
    place = OmegaConf.select(OmegaConf.load(written), "checkpoint.folder") if written.is_file() else None
    folder = folder_of(run_dir, CheckpointConfig(folder=place or ""))
    return inside if inside.is_dir() and not complete_checkpoints(folder) else folder


def load_weights(checkpoint: Folder, model: nn.Module, kind: str = "ema") -> int:
    """Fills a model on one process from a checkpoint of any world size; returns the checkpoint's step.

    Args:
        kind: "ema" for the averaged weights, "master" for the plain ones.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    manifest = read_manifest(checkpoint)
    shapes = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
    check_same_model(shapes, {name: tuple(p.shape) for name, p in model.named_parameters()}, checkpoint)
    with torch.no_grad(), reading(checkpoint):
        reader = PieceReader(checkpoint, manifest)
        for name, parameter in model.named_parameters():
            flat = torch.empty(parameter.numel())
            reader.fill(kind, name, 0, flat)
            parameter.copy_(flat.view_as(parameter))
        reader.close()
    return int(manifest["step"])


def check_same_model(saved: dict[str, tuple[int, ...]], built: dict[str, tuple[int, ...]], folder: Folder) -> None:
    """Raises ConfigError naming the first parameter in which a checkpoint and a model differ."""
    for name in sorted(saved.keys() | built.keys()):
        if saved.get(name) != built.get(name):
            raise ConfigError(
                f"{folder} is a checkpoint of another model: {name} is {saved.get(name, 'absent')} there and "
                f"{built.get(name, 'absent')} in this config; use its model settings or another run_dir"
            )
