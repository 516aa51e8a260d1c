"""Checkpoints where they lie: which there are, how one comes to be all at once, which go.

On a file system a checkpoint is written into `.writing-step-…`, synced, and renamed; then the link `latest` moves, and
what is beyond retention goes. An object store has no renaming: there the manifest is written last, and a folder
without one is no checkpoint.
"""

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.training.fragment_files import MANIFEST, DamagedCheckpointError, OtherFormatError, read_manifest, sync
from sora_train.training.places import Folder, RemoteFolder, folder_at, new_file, size_of

LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})")
_WRITING, _REMOVING = ".writing-", ".removing-"
_LEFT = re.compile(r"\.(writing|removing)-step-\d{8,}")

log = logging.getLogger(__name__)


def folder_of(run_dir: Path, config: CheckpointConfig) -> Folder:
    """Where a run's checkpoints are."""
    return folder_at(config.folder) if config.folder else run_dir / "checkpoints"


def complete_checkpoints(folder: Folder) -> list[Folder]:
    """Committed checkpoints, newest first."""
    if isinstance(folder, Path) and not folder.is_dir():
        return []
    found = {step_of(path): path for path in folder.iterdir() if _STEP.fullmatch(path.name)}
    return [found[step] for step in sorted(found, reverse=True) if (found[step] / MANIFEST).is_file()]


def incomplete_checkpoints(folder: Folder) -> list[Folder]:
    """What is being written, or was when a run was killed; and what was damaged and is kept aside."""
    if isinstance(folder, Path) and not folder.is_dir():
        return []
    whole = {path.name for path in complete_checkpoints(folder)}
    return [path for path in folder.iterdir() if "step-" in path.name and path.name not in whole]


def step_of(checkpoint: Folder) -> int:
    """Steps done, by the folder's name."""
    match = _STEP.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


class LocalCheckpoints:
    """Writing into a folder of a file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def writing(self, step: int) -> Path:
        """Where the files of a checkpoint are written until it is complete."""
        return self.folder / f"{_WRITING}{_name(step)}"

    def prepare(self, step: int) -> None:
        """Makes room, first of all by removing what a run that was killed while writing or removing left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if _LEFT.fullmatch(path.name):
                _remove_tree(path)
        self.writing(step).mkdir()

    def commit(self, step: int, manifest: str) -> None:
        """The files are complete: from here on, so is the checkpoint. In one instant: the renaming."""
        temporary, final = self.writing(step), self.folder / _name(step)
        with new_file(temporary / MANIFEST) as file:
            file.write(manifest.encode())
        sync(temporary)
        for later in complete_checkpoints(self.folder):
            # A checkpoint of this step or a later one was damaged, or this run would have gone on from it: kept, out of
            # the way, or it would count as one of the newest and push whole ones out.
            if step_of(later) >= step:
                (self.folder / later.name).rename(_free_name(self.folder / f"replaced-{later.name}"))
        if final.exists():  # without a manifest
            final.rename(_free_name(self.folder / f"replaced-{final.name}"))
        temporary.rename(final)
        sync(self.folder)
        self._point_at(final)

    def _point_at(self, final: Path) -> None:
        link = self.folder / f"{_WRITING}{LATEST}"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            link.replace(self.folder / LATEST)
        except OSError as error:  # for people and scripts; nothing here reads it
            log.warning("%s does not point at %s: %s", self.folder / LATEST, final.name, error)

    def discard(self, step: int) -> None:
        """Removes what was written of a checkpoint that will not be."""
        _remove_tree(self.writing(step))

    def remove(self, checkpoint: Folder) -> None:
        """Removes a checkpoint, unless somebody is reading it (see `reading`)."""
        path = self.folder / checkpoint.name
        if path.is_symlink():
            return  # somebody else's
        with (path / MANIFEST).open("r+b") as manifest:  # some network file systems lock only what could be written
            try:
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s is being read: it is removed later", path)
                return
            except OSError as error:
                log.debug("%s: no locks here: %s", path, error)
            away = path.with_name(_REMOVING + path.name)  # a kill while removing leaves no half checkpoint
            path.rename(away)
        shutil.rmtree(away)


class RemoteCheckpoints:
    """Writing into an object store."""

    def __init__(self, folder: RemoteFolder) -> None:
        self.folder = folder

    def writing(self, step: int) -> RemoteFolder:
        """Where the files of a checkpoint are written."""
        return self.folder / _name(step)

    def prepare(self, step: int) -> None:
        """Removes what there is of that step: damaged, or this run would have gone on from it; or never completed."""
        self.discard(step)

    def commit(self, step: int, manifest: str) -> None:
        """The files are complete: from here on, so is the checkpoint."""
        for later in complete_checkpoints(self.folder):
            if step_of(later) > step:  # damaged, see `LocalCheckpoints.commit`; its files stay
                _put_aside(self.folder / later.name)
        with new_file(self.writing(step) / MANIFEST) as file:
            file.write(manifest.encode())

    def discard(self, step: int) -> None:
        """Removes what was written of a checkpoint that will not be; the manifest first."""
        (self.writing(step) / MANIFEST).remove()
        self.writing(step).remove()

    def remove(self, checkpoint: Folder) -> None:
        """Removes a checkpoint."""
        self.discard(step_of(checkpoint))


def _put_aside(checkpoint: RemoteFolder) -> None:
    """Makes it none, of which nothing is lost: what could not be read may have been the network."""
    with suppress(OSError):
        content = (checkpoint / MANIFEST).read_bytes()
        with new_file(checkpoint / f"replaced-{MANIFEST}") as file:
            file.write(content)
    (checkpoint / MANIFEST).remove()


Store = LocalCheckpoints | RemoteCheckpoints


def store_at(folder: Folder) -> Store:
    """How to write there."""
    return LocalCheckpoints(folder) if isinstance(folder, Path) else RemoteCheckpoints(folder)


def beyond_retention(saved: Sequence[tuple[int, float]], config: CheckpointConfig) -> list[int]:
    """Steps of the checkpoints that go.

    Args:
        saved: (step, age in hours) of each, in any order.
    """
    if config.keep == 0:
        return []
    newest_first = sorted(saved, reverse=True)
    return [
        step
        for step, hours in newest_first[config.keep :]
        if hours >= config.keep_hours and not (config.keep_every > 0 and step % config.keep_every == 0)
    ]


def apply_retention(store: Store, config: CheckpointConfig) -> None:
    """Removes what is beyond retention. Only what a run wrote: a manifest of ours, of the step that the name says;
    and nothing at all while the newest is not all there."""
    saved: dict[int, tuple[float, Folder]] = {}
    for checkpoint in complete_checkpoints(store.folder):
        try:
            manifest = read_manifest(checkpoint)
        except (DamagedCheckpointError, OtherFormatError):
            continue
        if not saved and any(size_of(checkpoint / entry["name"]) != entry["bytes"] for entry in manifest["files"]):
            return
        if manifest["step"] == step_of(checkpoint):
            saved[manifest["step"]] = ((time.time() - manifest.get("saved_at", 0)) / 3600, checkpoint)
    for step in beyond_retention([(step, hours) for step, (hours, _) in saved.items()], config):
        store.remove(saved[step][1])


@contextmanager
def reading(checkpoint: Folder) -> Iterator[None]:
    """A checkpoint that is read in here is not removed by a run that goes on saving (on one file system)."""
    if not isinstance(checkpoint, Path):
        yield
        return
    with (checkpoint / MANIFEST).open("rb") as manifest:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(manifest, fcntl.LOCK_SH)
        yield


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _remove_tree(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
