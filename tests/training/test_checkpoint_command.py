"""list, verify and inspect: what they show, and the codes they leave with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from test_checkpoint_async import checkpoints
from typer.testing import CliRunner

from sora_train.training.checkpoint import TrainState
from sora_train.training.checkpoint_command import app
from sora_train.training.fragment_files import digest


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    saved = checkpoints(tmp_path)
    saved.facts = {
        "config": {"name": "tiny", "model": {"width": 8, "text": {"kind": "bytes"}}},
        "versions": {"torch": torch.__version__},
        "data_sha256": {"": "ab" * 32},
        "code": "cafe",
    }
    for step in (5, 10):
        saved.save(TrainState(step))
    saved.wait()
    return tmp_path


def test_a_run_a_folder_a_url_and_a_checkpoint_are_all_understood(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    for place in (run_dir, folder, f"file://{folder}"):
        done = run("list", place)
        assert done.exit_code == 0, done.output
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["checkpoint", "step-00000010", "step-00000005"]
        assert all(line.endswith("complete") for line in map(str.rstrip, lines[1:]))
    assert "step-00000010" not in run("list", folder / "step-00000005").stdout
    assert "step-00000010" in run("list", folder / "latest").stdout.replace("latest", "step-00000010")


def test_verify_reads_what_list_does_not(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "step-00000005" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run("list", run_dir).exit_code == 0
    done = run("verify", run_dir)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert "every byte as written" in lines[1]
    assert "damaged: rank-00000.safetensors has another SHA-256" in lines[2]
    path.write_bytes(content[:-1])
    assert run("list", run_dir).exit_code == 1, "its size is seen without reading"
    (path.parent / "manifest.json").write_text("{}")
    assert "damaged: manifest.json" in run("list", run_dir).stdout


def test_what_is_not_complete_is_said_to_be(run_dir: Path) -> None:
    (run_dir / "checkpoints" / ".writing-step-00000015").mkdir()
    (run_dir / "checkpoints" / "replaced-step-00000007").mkdir()
    done = run("list", run_dir)
    assert done.exit_code == 0
    assert "not complete" in next(line for line in done.stdout.splitlines() if ".writing" in line)
    assert "kept aside" in next(line for line in done.stdout.splitlines() if "replaced" in line)


def test_inspect_says_what_it_was_made_from(run_dir: Path) -> None:
    shown = run("inspect", run_dir).stdout
    for part in ("step:           10", "1 ranks", "6 in 1 tensors", "cafe", "text=(kind=bytes) width=8", "ab" * 32):
        assert part in shown, shown
    (run_dir / "checkpoints" / "step-00000010" / "manifest.json").write_text("x")
    assert run("inspect", run_dir).exit_code == 1


def test_none_and_a_format_of_the_future(run_dir: Path, tmp_path: Path) -> None:
    module = "sora_train.training.checkpoint"
    command = [sys.executable, "-m", module, "list", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds no checkpoint" in done.stderr
    path = run_dir / "checkpoints" / "step-00000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["format_version"] = 99
    path.write_text(json.dumps({**manifest, "sha256": digest(manifest)}))
    done = run("list", run_dir)
    assert done.exit_code == 1
    assert "format_version 99" in done.stdout
