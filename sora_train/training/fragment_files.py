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

from safetensors import safe_open
from torch import Tensor

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class DamagedCheckpointError(Exception):
    """A file of a checkpoint is not as its manifest says; the message names it."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        DamagedCheckpointError: it does not parse, has changed since it was written, or is of another format version.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        version, written = manifest["format_version"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST}: {error!r}") from error
    if written != digest(manifest):
        raise DamagedCheckpointError(f"{MANIFEST} has another SHA-256 than when it was written")
    if version != FORMAT_VERSION:
        raise DamagedCheckpointError(f"{MANIFEST}: format_version {version}, this code reads {FORMAT_VERSION}")
    return manifest


def verify(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Compares sizes and SHA-256 of every `shares`-th file with the manifest.

    Raises:
        DamagedCheckpointError: naming the first file that differs or is missing.
    """
    for entry in read_manifest(folder)["files"][share::shares]:
        name = entry["name"]
        if Path(name).name != name:
            raise DamagedCheckpointError(f"{name!r} is no plain file name")
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise DamagedCheckpointError(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        if sha256_of(path) != entry["sha256"]:
            raise DamagedCheckpointError(f"{name} has another SHA-256 than when it was written")


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PieceReader:
    """Reads any stretch of any flattened parameter from the pieces that ranks wrote."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
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
        for first, last, file_name in self._pieces[name]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                piece = self._file(file_name).get_slice(f"{kind}/{name}@{first}")
                into[low - start : high - start].copy_(piece[low - first : high - first])
                filled += high - low
        if filled != into.numel():
            raise DamagedCheckpointError(f"{kind}/{name}: {filled} of {into.numel()} elements from {start} are there")

    def has(self, kind: str, name: str) -> bool:
        """Whether that is kept of the parameter."""
        first, file_name = next((first, file) for first, last, file in self._pieces[name] if first < last)
        return f"{kind}/{name}@{first}" in self._file(file_name).keys()  # noqa: SIM118  (no mapping)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt").__enter__()
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
