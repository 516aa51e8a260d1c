"""Saving while training goes on: what is written is the state of the step, and no error is lost."""

import errno
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.optim import EmaConfig
from sora_train.distributed.partitions import Fragment
from sora_train.distributed.topology import World
from sora_train.training import checkpoint
from sora_train.training.checkpoint import Checkpoints, TrainState
from sora_train.training.checkpoint_folders import complete_checkpoints
from sora_train.training.ema import Ema
from sora_train.training.fragment_files import LEDGER, verify
from sora_train.training.host_copy import HostCopy
from sora_train.training.places import Folder, new_file
from sora_train.training.writers import SaveError

WORLD = World(global_rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


def checkpoints(run_dir: Path, **config: Any) -> Checkpoints:
    module = nn.Linear(3, 2, bias=False)
    flat = module.weight.detach().view(-1)
    held = [Fragment("weight", (2, 3), 0, flat, {"exp_avg": torch.zeros(6)}, (0, 6))]
    engine: Any = SimpleNamespace(module=module, optimizer=torch.optim.AdamW(module.parameters()))
    average = Ema(held, EmaConfig())
    return Checkpoints(
        run_dir, CheckpointConfig(**config), WORLD, engine=engine, held=held, ema=average, facts={}
    )


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No writer begins before it is set."""
    opened = threading.Event()
    write = HostCopy.write

    def waits(self: HostCopy, file: BinaryIO) -> dict[str, Any]:
        assert opened.wait(20)
        return write(self, file)

    monkeypatch.setattr(HostCopy, "write", waits)
    yield opened
    opened.set()


def full(part: str) -> Callable[[Folder], Any]:
    """A disk that has no room for files of that name."""

    @contextmanager
    def opens(file: Folder) -> Iterator[BinaryIO]:
        with new_file(file) as opened:
            yield opened
            if part in file.name:
                raise OSError(errno.ENOSPC, "No space left on device", str(file))

    return opens


def test_what_is_written_is_the_state_of_the_step(tmp_path: Path, gate: threading.Event) -> None:
    saved = checkpoints(tmp_path)
    fragment = saved.held[0]
    before = {"master": fragment.master.clone(), "exp_avg": fragment.states["exp_avg"].clone()}
    before["ema"] = saved.ema.averages[0].clone()
    folder = saved.save(TrainState(5))
    assert not complete_checkpoints(saved.folder), "training goes on before the checkpoint is there"
    with torch.no_grad():
        for live in (fragment.master, fragment.states["exp_avg"], saved.ema.averages[0]):
            live.add_(1)
    gate.set()
    saved.wait()
    written = load_file(folder / "rank-00000.safetensors")
    assert {name.split("/")[0] for name in written} == before.keys()
    for kind, values in before.items():
        assert torch.equal(written[f"{kind}/weight@0"], values), kind


def test_a_save_waits_for_the_one_before_and_says_so(
    tmp_path: Path, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    saved = checkpoints(tmp_path)
    saved.save(TrainState(5))
    second = threading.Thread(target=saved.save, args=(TrainState(6),))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the memory of the first is not written over"
    gate.set()
    second.join(20)
    saved.wait()
    assert [path.name for path in complete_checkpoints(saved.folder)] == ["step-00000006", "step-00000005"]
    for path in complete_checkpoints(saved.folder):
        verify(path)
    assert "the checkpoint of step 5 is still being written: the next one waits for it" in caplog.text


@pytest.mark.parametrize("part", ["rank-00000", "manifest", LEDGER])
def test_a_full_disk_is_told_at_the_next_step_and_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    (tmp_path / LEDGER).write_text('{"step": 1, "key": "k", "shard": "s", "reason": "decode"}\n')
    saved = checkpoints(tmp_path)
    saved.save(TrainState(5))
    saved.wait()
    for module in ("checkpoint", "checkpoint_folders"):
        monkeypatch.setattr(f"sora_train.training.{module}.new_file", full(part))
    saved.save(TrainState(6))
    while saved._writers.is_busy:
        pass
    assert saved.has_failed
    line = rf"step 6 could not be written: rank 0: .*No space left.*{part}.*step-00000005 is the last good"
    with pytest.raises(SaveError, match=line) as caught:
        saved.save(TrainState(7))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in saved.folder.iterdir()) == ["latest", "step-00000005"], "no partial folder"
    verify(complete_checkpoints(saved.folder)[0])
    monkeypatch.undo()
    saved.save(TrainState(8))  # room was made
    saved.wait()
    assert complete_checkpoints(saved.folder)[0].name == "step-00000008"


def test_whatever_goes_wrong_behind_is_raised_in_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint, "digest", lambda manifest: 1 / 0)
    saved.save(TrainState(5))
    with pytest.raises(SaveError, match="division by zero"):
        saved.wait()
    saved.wait()  # told once
    assert not complete_checkpoints(saved.folder)


def test_the_ledger_is_that_of_the_step(tmp_path: Path, gate: threading.Event) -> None:
    rows = [{"step": step, "key": f"clip-{step}", "shard": "a.tar", "reason": "decode"} for step in (2, 4, 5, 9)]
    ledger = tmp_path / LEDGER
    ledger.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    saved = checkpoints(tmp_path)
    folder = saved.save(TrainState(5))
    with ledger.open("a") as file:  # the steps that follow
        file.write("".join(json.dumps(row) + "\n" for row in rows[2:]) + '{"step": 10, "ke')
    gate.set()
    saved.wait()
    assert [json.loads(line) for line in (folder / LEDGER).read_text().splitlines()] == rows[:2]
    verify(folder)


def test_figures_are_told_once_after_the_save_has_ended(tmp_path: Path, gate: threading.Event) -> None:
    saved = checkpoints(tmp_path)
    assert saved.figures() == {}
    saved.save(TrainState(5))
    assert saved.figures() == {}
    gate.set()
    saved.wait()
    figures = saved.figures()
    assert 0 < figures["checkpoint_blocked_seconds"] < figures["checkpoint_seconds"]
    assert saved.figures() == {}


def test_a_file_is_safetensors_byte_for_byte_in_any_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sora_train.training.host_copy.CHUNK_BYTES", 24)
    tensors = [("a", torch.arange(13.0)), ("b/c@7", torch.randn(2)), ("d", torch.zeros(1))]
    copy = HostCopy(tensors, torch.device("cpu"))
    copy.take(tensors)
    with new_file(tmp_path / "x") as file:
        entry = copy.write(file)
    assert entry["bytes"] == (tmp_path / "x").stat().st_size
    read = load_file(tmp_path / "x")
    assert all(torch.equal(read[name], values) for name, values in tensors)
    tensors[1][1][1] = float("inf")
    copy.take(tensors)
    with new_file(tmp_path / "y") as file, pytest.raises(FloatingPointError, match=r"^b/c@7$"):
        copy.write(file)
