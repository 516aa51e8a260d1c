"""What there is of a run's checkpoints, for people and scripts.

    python -m sora_train.training.checkpoint list DIR       a table; only names and sizes are looked at
    python -m sora_train.training.checkpoint verify DIR     reads every byte
    python -m sora_train.training.checkpoint inspect DIR    what the newest (or the one given) was made from

DIR is a run's directory, a folder or fsspec URL of checkpoints, or one checkpoint. Exit codes: 0 all are complete, 1
one is damaged, 2 there is none.
"""

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sora_train.config.command import fail
from sora_train.config.root import ConfigError
from sora_train.training.checkpoint_folders import complete_checkpoints, incomplete_checkpoints, reading
from sora_train.training.checkpoint_reading import checkpoints_of
from sora_train.training.fragment_files import (
    MANIFEST,
    DamagedCheckpointError,
    OtherFormatError,
    check_file,
    read_manifest,
    verify,
)
from sora_train.training.places import Folder, folder_at

EXIT_DAMAGED = 1
Place = Annotated[str, typer.Argument(help="directory of a run, folder or URL of checkpoints, or one checkpoint")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.command("list")
def list_checkpoints(place: Place) -> None:
    """A line for each checkpoint: step, size, age, and whether its files are there in full length."""
    _show(place, reads_all=False)


@app.command("verify")
def verify_checkpoints(place: Place) -> None:
    """Reads every byte and compares it with the SHA-256 of when it was written."""
    _show(place, reads_all=True)


@app.command("inspect")
def inspect_checkpoint(place: Place) -> None:
    """What the newest checkpoint, or the one given, holds and was made from."""
    checkpoint = _found(place)[0]
    try:
        manifest = read_manifest(checkpoint)
    except (DamagedCheckpointError, OtherFormatError) as error:
        typer.echo(f"{checkpoint} is damaged: {error}", err=True)
        raise typer.Exit(EXIT_DAMAGED) from error
    for name, value in _facts(checkpoint, manifest).items():
        typer.echo(f"{name + ':':16}{value}")


def _show(place: str, *, reads_all: bool) -> None:
    checkpoints = _found(place)
    table = Table("checkpoint", "step", "GiB", "ranks", "hours old", "state", box=None, pad_edge=False)
    is_whole = True
    for checkpoint in checkpoints:
        cells, problem = ["", "", "", ""], None
        try:
            manifest = read_manifest(checkpoint)
            hours = (time.time() - manifest.get("saved_at", 0)) / 3600
            cells = [str(manifest["step"]), f"{_gib(manifest):.3f}", str(manifest["world_size"]), f"{hours:.1f}"]
            if reads_all:
                with reading(checkpoint):
                    verify(checkpoint)
            for entry in manifest["files"]:
                check_file(checkpoint, entry["name"], entry["bytes"])
        except (DamagedCheckpointError, OtherFormatError) as error:
            problem, is_whole = str(error), False
        except (KeyError, TypeError) as error:
            problem, is_whole = f"{MANIFEST} has no {error}", False
        good = "complete, every byte as written" if reads_all else "complete"
        table.add_row(checkpoint.name, *cells, f"damaged: {problem}" if problem else good)
    for folder in incomplete_checkpoints(checkpoints[0].parent):
        table.add_row(folder.name, "", "", "", "", _why_incomplete(folder))
    Console(width=200, soft_wrap=True).print(table, markup=False, highlight=False)
    if not is_whole:
        raise typer.Exit(EXIT_DAMAGED)


def _why_incomplete(folder: Folder) -> str:
    if folder.name.startswith("replaced-"):
        return "damaged: kept aside"
    return "not complete: being written, or left by a run that was killed"


def _found(place: str) -> list[Folder]:
    """The checkpoints meant, newest first; leaves with 2 where there is none."""
    try:
        folder = folder_at(place)
        if (folder / MANIFEST).is_file():
            return [folder]
        found = complete_checkpoints(folder)
        if not found and isinstance(folder, Path):
            found = complete_checkpoints(checkpoints_of(folder))
        if not found:
            raise ConfigError(f"{place} holds no checkpoint: give the directory of a run that has saved one")
    except ConfigError as error:
        fail(error)
    return found


def _facts(checkpoint: Folder, manifest: dict[str, Any]) -> dict[str, Any]:
    shapes = manifest["parameters"]
    numbers = sum(math.prod(shape) for shape in shapes.values())
    config = manifest.get("config", {})
    facts = {
        "checkpoint": str(checkpoint),
        "step": manifest["step"],
        "saved": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(manifest.get("saved_at", 0))),
        "format version": manifest["format_version"],
        "written by": f"{manifest['world_size']} ranks, {len(manifest['files'])} files, {_gib(manifest):.3f} GiB",
        "parameters": f"{numbers:,} in {len(shapes)} tensors",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
        "code": manifest.get("code", ""),
    }
    for name, sha256 in manifest.get("data_sha256", {}).items():
        facts[f"data {name}".rstrip()] = sha256
    for section in ("name", "seed", "steps", "model", "data", "optim", "ema", "parallel"):
        if section in config:
            facts[section] = _in_one_line(config[section])
    return facts


def _in_one_line(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    shown = {key: f"({_in_one_line(item)})" if isinstance(item, dict) else item for key, item in value.items()}
    return " ".join(f"{key}={item}" for key, item in shown.items())


def _gib(manifest: dict[str, Any]) -> float:
    return float(sum(entry["bytes"] for entry in manifest["files"]) / 2**30)
