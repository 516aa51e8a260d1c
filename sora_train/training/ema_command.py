"""`python -m sora_train.training.ema`: averages of any length after training, from a run's snapshots."""

from pathlib import Path
from typing import Annotated

import typer

from sora_train.config.command import fail
from sora_train.config.limits import LONGEST_AVERAGE, SHORTEST_AVERAGE
from sora_train.config.root import ConfigError
from sora_train.training import ema_snapshots

app = typer.Typer(help=__doc__, add_completion=False)


@app.command(name="list")
def list_(run_dir: Annotated[Path, typer.Argument(help="directory of a run")]) -> None:
    """Shows the snapshots of a run, each verified."""
    try:
        snapshots = ema_snapshots.whole_snapshots(run_dir)
    except ConfigError as error:
        fail(error)
    for path, manifest in snapshots:
        size = sum(entry["bytes"] for entry in manifest["files"])
        lengths = ", ".join(f"{length:g}" for length in manifest["lengths"].values())
        print(f"{path}  lengths {lengths}  {size / 2**20:.1f} MiB")


@app.command()
def rebuild(
    run_dir: Annotated[Path, typer.Argument(help="directory of a run that took snapshots")],
    out: Annotated[Path, typer.Argument(help="new folder, for `sora_train.sample` and others to take as a run")],
    length: Annotated[
        float, typer.Option(help="of the average, as a share of the run", min=SHORTEST_AVERAGE, max=LONGEST_AVERAGE)
    ],
    step: Annotated[int | None, typer.Option(help="of a snapshot; default: the last")] = None,
) -> None:
    """Makes the average of a given length from the snapshots, as if it had been kept in training."""
    try:
        misfit = ema_snapshots.rebuild(run_dir, out, length, step)
    except ConfigError as error:
        fail(error)
    print(f"{out}: length {length:g}, its profile met to within {misfit:.2%}")
