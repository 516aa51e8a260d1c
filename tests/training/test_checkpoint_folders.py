"""Which checkpoints stay, and what a damaged one costs: nothing but itself."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.optim import EmaConfig
from sora_train.config.root import ConfigError
from sora_train.distributed.partitions import Fragment
from sora_train.distributed.topology import World
from sora_train.training.checkpoint import Checkpoints, TrainState
from sora_train.training.checkpoint_folders import complete_checkpoints
from sora_train.training.checkpoint_reading import latest_checkpoint
from sora_train.training.ema import Ema
from sora_train.training.fragment_files import verify

WORLD = World(global_rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


def checkpoints(run_dir: Path, keep: int) -> Checkpoints:
    module = nn.Linear(3, 2, bias=False)
    flat = module.weight.detach().view(-1)
    held = [Fragment("weight", (2, 3), 0, flat, {"exp_avg": torch.zeros(6)}, (0, 6))]
    engine: Any = SimpleNamespace(module=module, optimizer=torch.optim.AdamW(module.parameters()))
    average = Ema(held, EmaConfig())
    return Checkpoints(run_dir, CheckpointConfig(keep=keep), WORLD, engine=engine, held=held, ema=average, facts={})


def save(saved: Checkpoints, step: int) -> Any:
    folder = saved.save(TrainState(step))
    saved.wait()
    return folder


def cut(checkpoint: Path) -> None:
    path = checkpoint / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        save(saved, step)
    assert names(saved.folder) == ["latest", "step-00000010", "step-00000015"]
    assert (saved.folder / "latest").resolve().name == "step-00000015"


def test_a_damaged_one_does_not_push_out_what_is_saved_after_it(tmp_path: Path) -> None:
    """Steps 5 and 10 are saved, 10 is damaged, the run goes on from 5 and is stopped at 7."""
    saved = checkpoints(tmp_path, keep=1)
    cut(save(saved, 10))
    save(saved, 7)
    assert [path.name for path in complete_checkpoints(saved.folder)] == ["step-00000007"]
    assert "replaced-step-00000010" in names(saved.folder), "kept aside, for whoever wants to look"
    verify(latest_checkpoint(tmp_path))


def test_a_damaged_checkpoint_given_by_hand_is_one_line(tmp_path: Path) -> None:
    folder = save(checkpoints(tmp_path, keep=1), 3)
    assert latest_checkpoint(folder) == folder
    cut(folder)
    with pytest.raises(ConfigError, match=r"rank-00000\.safetensors has"):
        latest_checkpoint(folder)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """A loss looks at the weights before its step: the step itself may have broken them (fp32 at ZeRO-0)."""
    saved = checkpoints(tmp_path, keep=1)
    save(saved, 3)
    saved.held[0].master[1] = float("nan")
    with pytest.raises(FloatingPointError, match="master/weight@0 is not finite after step 6"):
        save(saved, 6)
    assert names(saved.folder) == ["latest", "step-00000003"]
