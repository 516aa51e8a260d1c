"""Writes the weights of a run for others to load.

    python -m sora_train.export RUN_DIR OUT_DIR
    python -m sora_train.export RUN_DIR/checkpoints/step-00000500 OUT_DIR --raw

A model of Wan's architecture becomes a folder for diffusers' `WanTransformer3DModel.from_pretrained`, which stands for
the transformer/ of a pipeline and may be another run's `init.weights`; any other, as those that read their text as
bytes, becomes model.safetensors and the config.yaml of its run. The weights pass through memory a file at a time.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from sora_train.config.command import fail
from sora_train.config.root import ConfigError, TrainConfig, build_config, config_text
from sora_train.models.wan_config import to_diffusers
from sora_train.models.wan_weights import MAX_SHARD_BYTES, write_tensors, write_wan
from sora_train.training.checkpoint_folders import reading
from sora_train.training.checkpoint_reading import latest_checkpoint
from sora_train.training.fragment_files import PieceReader, read_manifest


def export(
    run: Annotated[Path, typer.Argument(help="directory of a run, or one of its checkpoints")],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    ema: Annotated[bool, typer.Option("--ema/--raw", help="the averaged weights, or those of the last step")] = True,
) -> None:
    """Writes the weights of a run's newest checkpoint."""
    try:
        print(export_weights(run, out, "ema" if ema else "master"))
    except ConfigError as error:
        fail(error)


def export_weights(run: Path, out: Path, kind: str = "ema", max_shard_bytes: int = MAX_SHARD_BYTES) -> str:
    """Writes `kind` ("ema" or "master") of the newest checkpoint of `run` to `out`; returns a line about it.

    Raises:
        ConfigError: there is no checkpoint, it does not hold `kind`, or something stands in `out`.
    """
    checkpoint = latest_checkpoint(run)
    manifest = read_manifest(checkpoint)
    config = build_config(TrainConfig, manifest["config"])
    shapes = {name: torch.Size(shape) for name, shape in manifest["parameters"].items()}
    sizes = {name: 4 * shape.numel() for name, shape in shapes.items()}  # float32, as they are trained
    with reading(checkpoint):
        reader = PieceReader(checkpoint, manifest)
        if not reader.has(kind, next(iter(shapes))):
            raise ConfigError(f"{checkpoint} holds an average alone: leave --raw out")

        def read(name: str) -> Tensor:
            flat = torch.empty(shapes[name].numel())
            reader.fill(kind, name, 0, flat)
            return flat.view(shapes[name])

        why = not_of_wan(config)
        if why is None:
            write_wan(config.model, sizes, read, out, max_shard_bytes)
        else:
            write_tensors(out, "model", sizes, read, {"config.yaml": config_text(config)}, max_shard_bytes)
        reader.close()
    what = "averaged weights" if kind == "ema" else "weights"
    form = "for diffusers' WanTransformer3DModel" if why is None else f"with its config.yaml ({why})"
    return f"{out}: {what} after step {manifest['step']}, {form}"


def not_of_wan(config: TrainConfig) -> str | None:
    """Why diffusers' class cannot load the model; None: it can."""
    try:
        to_diffusers(config.model)
    except ConfigError as error:
        return str(error).split(",")[0]
    return None


if __name__ == "__main__":
    typer.run(export)
