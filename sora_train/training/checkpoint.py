"""Checkpoints: a directory per step, complete or absent, safetensors only, readable at any world size.

    RUN_DIR/checkpoints/step-00000500/
        rank-00000.safetensors  …   "master/NAME@START", "exp_avg/NAME@START", "exp_avg_sq/…", "ema/…": flat fp32 pieces
        manifest.json               sizes and SHA-256 of the files, shapes of the parameters, step, seed, config, …
        quarantine.jsonl            what could not be decoded up to here

A save writes everything into a hidden folder beside, syncs it to disk, and renames it: a kill at any instant leaves
the checkpoints that were complete. A load takes the newest one whose every byte is as its manifest says.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.root import ConfigError
from sora_train.distributed.collectives import barrier, gather_facts
from sora_train.distributed.partitions import Fragment, apply_loaded, optimizer_steps, reset_optimizer
from sora_train.distributed.topology import World
from sora_train.training.ema import Ema
from sora_train.training.fragment_files import (
    FORMAT_VERSION,
    MANIFEST,
    DamagedCheckpointError,
    PieceReader,
    digest,
    entry_of,
    read_manifest,
    sync,
    verify,
)

LEDGER = "quarantine.jsonl"
_STEP = re.compile(r"step-(\d{8})")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """All of a run that is not a tensor."""

    step: int = 0  # optimizer steps done: the next step's number

    def next(self) -> "TrainState":
        """After one more optimizer step."""
        return TrainState(self.step + 1)


class Checkpoints:
    """Saves and restores one run's engine, moving average and state."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        world: World,
        *,
        engine: Any,
        held: list[Fragment],
        ema: Ema,
        facts: dict[str, Any],
    ) -> None:
        """`facts` go into every manifest: the resolved config, fingerprints of code and data."""
        self.folder = run_dir / "checkpoints"
        self.ledger = run_dir / LEDGER
        self.config = config
        self.world = world
        self.engine, self.held, self.ema = engine, held, ema
        self.facts = facts

    # --- saving

    def save(self, state: TrainState) -> Path:
        """Writes the checkpoint of `state`; on return it is complete on disk. Every rank must call it.

        Raises:
            FloatingPointError: something of it is not finite; on all ranks alike, and nothing is written.
        """
        tensors = self._tensors()
        if broken := next(filter(None, gather_facts(_not_finite(tensors))), None):
            raise FloatingPointError(
                f"{broken} is not finite after step {state.step}, which is not saved: run the command again to go on "
                "from the checkpoint before, with a lower optim.learning_rate"
            )
        final = self.folder / f"step-{state.step:08d}"
        temporary = self.folder / f".writing-{final.name}"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while writing
            temporary.mkdir(parents=True)
        barrier()
        path = temporary / f"rank-{self.world.global_rank:05d}.safetensors"
        save_file(tensors, path)
        sync(path)
        entries = gather_facts(entry_of(path))
        pieces = gather_facts([(f.name, f.start + f.written[0], f.start + f.written[1]) for f in self.held])
        shapes = _shapes_of(self.engine.module)
        if self.world.is_main:
            self._commit(temporary, final, state, entries, pieces, shapes)
        barrier()
        return final

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for fragment, average in zip(self.held, self.ema.averages, strict=True):
            first, last = fragment.written
            if first == last:
                continue
            for kind, values in {"master": fragment.master, "ema": average, **fragment.states}.items():
                tensors[f"{kind}/{fragment.name}@{fragment.start + first}"] = values[first:last].detach().cpu().clone()
        return tensors

    def _commit(
        self,
        temporary: Path,
        final: Path,
        state: TrainState,
        entries: list[Any],
        pieces: list[Any],
        shapes: dict[str, Any],
    ) -> None:
        if self.ledger.exists():
            shutil.copyfile(self.ledger, temporary / LEDGER)
            sync(temporary / LEDGER)
            entries.append(entry_of(temporary / LEDGER))
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "world_size": self.world.world_size,
            "optimizer_steps": optimizer_steps(self.engine),
            "files": entries,
            "parameters": shapes,
            "pieces": pieces,
            **self.facts,
        }
        manifest["sha256"] = digest(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, sort_keys=True))
        sync(temporary / MANIFEST)
        sync(temporary)
        for later in complete_checkpoints(self.folder):
            # A checkpoint of this step or a later one was damaged, or this run would have gone on from it: kept, out of
            # the way, or it would count as one of the newest and push whole ones out.
            if later.name >= final.name:
                later.rename(_free_name(self.folder / f"replaced-{later.name}"))
        if final.exists():  # without a manifest
            final.rename(_free_name(self.folder / f"replaced-{final.name}"))
        temporary.rename(final)
        sync(self.folder)
        for old in self._beyond_retention():
            shutil.rmtree(old)

    def _beyond_retention(self) -> list[Path]:
        kept = complete_checkpoints(self.folder)
        return kept[self.config.keep :] if self.config.keep > 0 else []

    # --- loading

    def load_latest(self) -> TrainState:
        """Restores the newest checkpoint that is whole; without one, a fresh start. Every rank must call it.

        Raises:
            ConfigError: the checkpoint is of another model, or all there are are damaged.
        """
        found = complete_checkpoints(self.folder)
        for folder in found:
            if problem := self._agreed_problem(folder):
                if self.world.is_main:
                    log.warning("%s is damaged (%s): trying the one before", folder, problem)
                continue
            return self._load(folder)
        if found:
            raise ConfigError(
                f"all {len(found)} checkpoints in {self.folder} are damaged: move them away to start from nothing, or "
                "choose another run_dir"
            )
        reset_optimizer(self.engine)
        return TrainState()

    def _agreed_problem(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint; each rank reads a share of the files and all come to one answer."""
        problem = None
        try:
            verify(folder, self.world.global_rank, self.world.world_size)
        except DamagedCheckpointError as error:
            problem = str(error)
        return next((found for found in gather_facts(problem) if found), None)

    def _load(self, folder: Path) -> TrainState:
        manifest = read_manifest(folder)
        shapes = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
        check_same_model(shapes, _shapes_of(self.engine.module), folder)
        reader = PieceReader(folder, manifest)
        for fragment, average in zip(self.held, self.ema.averages, strict=True):
            for kind, into in {"master": fragment.master, "ema": average, **fragment.states}.items():
                reader.fill(kind, fragment.name, fragment.start, into)
        reader.close()
        apply_loaded(self.engine, manifest["optimizer_steps"])
        barrier()
        return TrainState(step=manifest["step"])


def latest_checkpoint(run_dir: Path) -> Path:
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
    for folder in complete_checkpoints(run_dir / "checkpoints"):
        try:
            verify(folder)
            return folder
        except DamagedCheckpointError as error:
            log.warning("%s is damaged (%s): trying the one before", folder, error)
    raise ConfigError(f"{run_dir} holds no whole checkpoint: give the directory of a run that has saved one")


def load_weights(checkpoint: Path, model: nn.Module, kind: str = "ema") -> int:
    """Fills a model on one process from a checkpoint of any world size; returns the checkpoint's step.

    Args:
        kind: "ema" for the averaged weights, "master" for the plain ones.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    manifest = read_manifest(checkpoint)
    shapes = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
    check_same_model(shapes, {name: tuple(p.shape) for name, p in model.named_parameters()}, checkpoint)
    reader = PieceReader(checkpoint, manifest)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = torch.empty(parameter.numel())
            reader.fill(kind, name, 0, flat)
            parameter.copy_(flat.view_as(parameter))
    reader.close()
    return int(manifest["step"])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, reverse=True)


def check_same_model(saved: dict[str, tuple[int, ...]], built: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raises ConfigError naming the first parameter in which a checkpoint and a model differ."""
    for name in sorted(saved.keys() | built.keys()):
        if saved.get(name) != built.get(name):
            raise ConfigError(
                f"{folder} is a checkpoint of another model: {name} is {saved.get(name, 'absent')} there and "
                f"{built.get(name, 'absent')} in this config; use its model settings or another run_dir"
            )


def _shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained}


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The first tensor that holds an infinity or a nan."""
    return next((name for name, values in tensors.items() if not values.isfinite().all()), None)


def _free_name(path: Path) -> Path:
    def names() -> Iterator[Path]:
        yield path
        number = 1
        while True:
            number += 1
            yield path.with_name(f"{path.name}-{number}")

    return next(name for name in names() if not name.exists())
