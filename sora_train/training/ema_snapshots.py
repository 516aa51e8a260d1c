"""Snapshots of the moving averages, and averages of other lengths made from them after training.

    RUN_DIR/ema_snapshots/step-00000500/
        rank-00000.safetensors  …   "ema/NAME@START", "ema-0.1/NAME@START": flat fp32 pieces
        manifest.json               as a checkpoint's, and "lengths" of the averages by name

They stay, whatever becomes of checkpoints. Written like those: into a hidden folder beside, synced, renamed. Snapshots
that different numbers of ranks wrote go together. What `rebuild` makes is a checkpoint of one average alone: it is
sampled, evaluated and exported as any other, and no run goes on from it.
"""

import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from sora_train.config.root import ConfigError
from sora_train.distributed.collectives import barrier, gather_facts
from sora_train.distributed.partitions import Fragment
from sora_train.distributed.topology import World
from sora_train.training.ema_profiles import coefficients
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

FOLDER = "ema_snapshots"
# Of the norm of a profile: rebuilt any worse, it is no average of that length.
WORST_FIT = 0.1
_STEP = re.compile(r"step-(\d{8,})")

log = logging.getLogger(__name__)


class Averages(Protocol):
    """What is asked of `Ema`, whose command imports this module."""

    held: list[Fragment]
    kept: list[dict[str, Tensor]]
    kinds: dict[str, float | None]


class Snapshots:
    """Writes those of one run."""

    def __init__(
        self,
        run_dir: Path,
        world: World,
        ema: Averages,
        *,
        shapes: dict[str, tuple[int, ...]],
        facts: dict[str, Any],
        step: int,
    ) -> None:
        """Snapshots of later steps than the one the run goes on from are of steps that will be taken again, perhaps
        otherwise: they are put aside.

        Args:
            run_dir: of the run.
            world: of the run.
            ema: the averages.
            shapes: of all trained parameters.
            facts: as in checkpoints: config, fingerprints of code and data.
            step: after which the run goes on.
        """
        self.folder = run_dir / FOLDER
        self.world, self.ema, self.shapes, self.facts = world, ema, shapes, facts
        for path in complete_snapshots(self.folder) if world.is_main else ():
            if _step_of(path) > step:
                self._put_aside(path)
                log.info("%s is of a step that the run has gone back behind: put aside", path)

    def save(self, step: int) -> None:
        """Of the averages after `step` steps; returns when they are on disk. Every rank must call it.

        Raises:
            FloatingPointError: an average is not finite; on all ranks alike, and nothing is written.
        """
        tensors = {}
        for fragment, averages in zip(self.ema.held, self.ema.kept, strict=True):
            first, last = fragment.written
            for kind, average in averages.items() if first < last else ():
                tensors[f"{kind}/{fragment.name}@{fragment.start + first}"] = average[first:last].cpu().clone()
        broken = next((name for name, values in tensors.items() if not values.isfinite().all()), None)
        if broken := next(filter(None, gather_facts(broken)), None):
            raise FloatingPointError(f"{broken} is not finite after step {step}: no snapshot is taken of it")
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".writing-{final.name}"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while writing
            temporary.mkdir(parents=True)
        barrier()
        path = temporary / f"rank-{self.world.global_rank:05d}.safetensors"
        save_file(tensors, path)
        sync(path)
        pieces = [(f.name, f.start + f.written[0], f.start + f.written[1]) for f in self.ema.held]
        parts = gather_facts((entry_of(path), pieces))
        if self.world.is_main:
            manifest = {
                "format_version": FORMAT_VERSION,
                "saved_at": time.time(),
                "step": step,
                "world_size": self.world.world_size,
                "lengths": self.ema.kinds,
                "files": [entry for entry, _ in parts],
                "pieces": [written for _, written in parts],
                "parameters": self.shapes,
                **self.facts,
            }
            _commit(temporary, manifest)
            if final.exists():
                self._put_aside(final)
            temporary.rename(final)
            sync(self.folder)
        barrier()

    def _put_aside(self, path: Path) -> None:
        """Under another name; of each step the last one."""
        aside = path.with_name(f"replaced-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def _commit(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["sha256"] = digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, sort_keys=True))
    sync(folder / MANIFEST)
    sync(folder)


def complete_snapshots(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def whole_snapshots(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Those of a run whose every byte is as its manifest says, and the manifests; oldest first.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for path in complete_snapshots(run_dir / FOLDER):
        try:
            verify(path)
            found.append((path, read_manifest(path)))
        except DamagedCheckpointError as error:
            log.warning("%s is damaged (%s): left out", path, error)
    if not found:
        raise ConfigError(f"{run_dir} holds no snapshot: train with ema.profile=power and ema.snapshot_every above 0")
    return found


def rebuild(run_dir: Path, out: Path, length: float, step: int | None = None) -> float:
    """Writes the average of relative length `length` after `step` steps (those of the last snapshot unless told
    otherwise) into the new folder `out`. Holds the whole weights once, in float64.

    Returns:
        How far the profile is from the one asked for, as a share of its norm.

    Raises:
        ConfigError: no snapshots, none of that step, too few for that length, or `out` exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: give a new folder, nothing is overwritten")
    snapshots = whole_snapshots(run_dir)
    steps = [manifest["step"] for _, manifest in snapshots]
    if step is not None and step not in steps:
        raise ConfigError(f"--step {step}: {run_dir} has snapshots of steps {', '.join(map(str, steps))}")
    snapshots = [item for item in snapshots if step is None or item[1]["step"] <= step]
    newest = snapshots[-1][1]
    if other := next((path for path, manifest in snapshots if manifest["parameters"] != newest["parameters"]), None):
        raise ConfigError(f"{other} is of another model than the snapshots after it: move it away")
    averages = [(m["step"], size) for _, m in snapshots for size in m["lengths"].values()]
    found, misfit = coefficients(averages, (newest["step"], length))
    if misfit > WORST_FIT:
        raise ConfigError(
            f"--length {length:g} after {newest['step']} steps cannot be made from {len(snapshots)} snapshots: its "
            f"profile is met to within {misfit:.0%}, which should be {WORST_FIT:.0%}; choose one nearer to those kept "
            f"({', '.join(f'{size:g}' for size in newest['lengths'].values())}), or take snapshots more often"
        )
    weights = {name: torch.zeros(tuple(shape), dtype=torch.float64) for name, shape in newest["parameters"].items()}
    factors = iter(found.tolist())
    for path, manifest in snapshots:
        reader = PieceReader(path, manifest)
        for kind in manifest["lengths"]:
            factor = next(factors)
            for name, whole in weights.items():
                piece = torch.empty(whole.numel())
                reader.fill(kind, name, 0, piece)
                whole.view(-1).add_(piece, alpha=factor)
        reader.close()
    _write_average(out, weights, newest, length)
    return misfit


def _write_average(out: Path, weights: dict[str, Tensor], newest: dict[str, Any], length: float) -> None:
    temporary = out.with_name(f".writing-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    file = temporary / "rank-00000.safetensors"
    save_file({f"ema/{name}@0": whole.view(-1).float() for name, whole in weights.items()}, file)
    sync(file)
    pieces = [(name, 0, whole.numel()) for name, whole in weights.items()]
    replaced = {"files": [entry_of(file)], "pieces": [pieces], "lengths": {"ema": length}}
    _commit(temporary, {**newest, **replaced, "world_size": 1})
    temporary.rename(out)
    sync(out.parent)
