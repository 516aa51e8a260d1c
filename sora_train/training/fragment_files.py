"""Folders of fragments: safetensors files of flat pieces of parameters, and a manifest of their sizes and SHA-256.

    rank-00000.safetensors  …   "KIND/NAME@START": flat fp32 pieces of what is kept of a parameter
    manifest.json               "files" and, in the same order, "pieces": [name, start, stop] of each

Checkpoints and snapshots of the moving average are such folders. Whoever reads one takes the stretches it needs,
whatever the number of ranks that wrote it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sora_train.config.root import ConfigError
from sora_train.training.places import Folder, open_tensors, size_of

# Raised by whoever changes what a reader must know; the code then says from which on it still reads.
FORMAT_VERSION = 1
OLDEST_READABLE = 1
MANIFEST = "manifest.json"
# Beside the tensors of a checkpoint: what could not be decoded up to it. Also the name of the run's own.
LEDGER = "quarantine.jsonl"


class DamagedCheckpointError(Exception):
    """A file of a checkpoint is not as its manifest says; the message names it."""


class OtherFormatError(ConfigError):
    """A folder is whole, but not of a format that this code reads."""


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        DamagedCheckpointError: it does not parse, or has changed since it was written.
        OtherFormatError: it is of a version that this code does not read. Nobody falls back from it to an older one:
            the newer would be lost from sight.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        version, written = manifest["format_version"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{MANIFEST}: {error!r}") from error
    if not isinstance(manifest.get("files"), list):
        raise DamagedCheckpointError(f"{MANIFEST} lists no files")
    if written != digest(manifest):
        raise DamagedCheckpointError(f"{MANIFEST} has another SHA-256 than when it was written")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise OtherFormatError(
            f"{folder} has format_version {version}, this sora_train reads up to {FORMAT_VERSION}: use the one that "
            "wrote it, or a newer one"
        )
    if version < OLDEST_READABLE:
        raise OtherFormatError(
            f"{folder} has format_version {version}, this sora_train reads {OLDEST_READABLE} and later: go on with "
            "the one that wrote it, or save it anew with one that reads both"
        )
    return manifest


def verify(folder: Folder, share: int = 0, shares: int = 1) -> None:
    """Compares sizes and SHA-256 of every `shares`-th file with the manifest.

    Raises:
        DamagedCheckpointError: naming the first file that differs or is missing.
    """
    for entry in read_manifest(folder)["files"][share::shares]:
        verify_file(folder, entry)


def verify_file(folder: Folder, entry: dict[str, Any]) -> None:
    """Compares size and SHA-256 of a file with its entry in the manifest.

    Raises:
        DamagedCheckpointError: naming the file.
    """
    try:
        name, size, sha256 = str(entry["name"]), entry["bytes"], entry["sha256"]
        check_file(folder, name, size)
        if sha256_of(folder / name) != sha256:
            raise DamagedCheckpointError(f"{name} has another SHA-256 than when it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{entry}: {error!r}") from error


def check_file(folder: Folder, name: str, size: int) -> None:
    """What can be said of a file without reading it.

    Raises:
        DamagedCheckpointError: it is missing, of another size, a link, or named as no file in this folder is.
    """
    if Path(name).name != name:
        raise DamagedCheckpointError(f"{name!r} is no plain file name")
    path = folder / name
    if isinstance(path, Path) and path.is_symlink():
        raise DamagedCheckpointError(f"{name} is a link, not a file")
    if not path.is_file():
        raise DamagedCheckpointError(f"{name} is missing")
    if size_of(path) != size:
        raise DamagedCheckpointError(f"{name} has {size_of(path)} bytes instead of {size}")


def sha256_of(path: Folder) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class PieceReader:
    """Reads any stretch of any flattened parameter from the pieces that ranks wrote."""

    def __init__(self, folder: Folder, manifest: dict[str, Any]) -> None:
        self._pieces: dict[str, list[tuple[int, int, str]]] = {}
        names = [entry["name"] for entry in manifest["files"]]
        for file_name, pieces in zip(names, manifest["pieces"], strict=False):  # the ledger comes after the ranks
            for name, start, stop in pieces:
                self._pieces.setdefault(name, []).append((start, stop, file_name))
        self._folder = folder
        self._open: dict[str, Any] = {}

    def fill(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Copies elements [start, start + into.numel()) of `kind/name` into a flat tensor."""
        stop, filled = start + into.numel(), 0
        for first, last, file_name in self._pieces.get(name, ()):
            low, high = max(start, first), min(stop, last)
            if low < high:
                try:
                    piece = self._file(file_name).get_slice(f"{kind}/{name}@{first}")
                    into[low - start : high - start].copy_(piece[low - first : high - first])
                except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                    raise DamagedCheckpointError(f"{file_name}: {kind}/{name}: {error}") from error
                filled += high - low
        if filled != into.numel():
            raise DamagedCheckpointError(f"{kind}/{name}: {filled} of {into.numel()} elements from {start} are there")

    def has(self, kind: str, name: str) -> bool:
        """Whether that is kept of the parameter."""
        first, file_name = next((first, file) for first, last, file in self._pieces[name] if first < last)
        return f"{kind}/{name}@{first}" in self._file(file_name).keys()  # noqa: SIM118  (no mapping)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = open_tensors(self._folder / name).__enter__()
            except (SafetensorError, OSError, ValueError) as error:
                raise DamagedCheckpointError(f"{name}: {error}") from error
        return self._open[name]

    def close(self) -> None:
        """Ends the reading."""
        for file in self._open.values():
            file.__exit__(None, None, None)


def digest(manifest: dict[str, Any]) -> str:
    """Of a manifest without its "sha256"."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def entry_of(path: Path) -> dict[str, Any]:
    """How a manifest names a file."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
