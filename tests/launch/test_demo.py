"""The demo: its commands are those a user would type, it goes on where it was, and the whole path works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from hydra.core.override_parser.overrides_parser import OverridesParser
from typer.testing import CliRunner

from launch import demo as demo_module
from launch.demo import Stage, run_stage, setting, stages


@pytest.mark.parametrize("path", ["runs/demo", "/a b/c,d", "it's", "x=y", "back\\slash", "a\\'b", "end\\", "Größe (1)"])
def test_any_path_arrives_as_it_is(path):
    (parsed,) = OverridesParser.create().parse_overrides([setting("output", Path(path))])
    assert parsed.value() == path


def test_what_is_scored_apart_is_never_trained_on():
    render, curate, train, evaluate = stages(Path("runs/demo"), 10, 20, 2, 60)
    assert "exclude_held_out=true" in render.arguments
    assert setting("output", Path("runs/demo/videos")) in render.arguments
    assert setting("input", Path("runs/demo/videos")) in curate.arguments
    assert setting("data.shards", Path("runs/demo/shards")) in train.arguments
    assert "--truth=runs/demo/videos" in evaluate.arguments


def test_a_stage_that_fails_ends_the_demo_with_its_code(capsys):
    with pytest.raises(SystemExit) as end:
        run_stage(Stage("bad", "json.tool", ["/nowhere"]))
    assert end.value.code not in (0, None)
    assert "stage bad" in capsys.readouterr().err


def test_seconds_add_up_over_interrupted_runs(monkeypatch, tmp_path):
    ran = []

    def fake(stage):
        ran.append(stage.name)
        if stage.name == "train" and len(ran) <= 3:
            raise SystemExit(9)
        return 2.0

    monkeypatch.setattr(demo_module, "run_stage", fake)
    reported = []
    monkeypatch.setattr(
        demo_module,
        "write_report",
        lambda *arguments: reported.append(arguments) or {"color": 1.0, "shape": 1.0, "motion": 1.0},
    )
    app = typer.Typer()
    app.command()(demo_module.demo)
    assert CliRunner().invoke(app, ["--output", str(tmp_path)]).exit_code == 9
    assert CliRunner().invoke(app, ["--output", str(tmp_path)]).exit_code == 0
    assert reported[0][3] == {"render": 4.0, "curate": 4.0, "train": 2.0, "evaluate": 2.0}


@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_the_whole_path_on_two_ranks(tmp_path):
    """Rendered, curated, trained on two ranks under DeepSpeed, scored, reported; then sampled at a new size."""
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "launch.demo", "--output", str(folder)]
    command += ["--clips", "48", "--steps", "4", "--prompts", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    scores = json.loads((folder / "scores.json").read_text())
    assert [step for step, _ in scores["loss"]] == [1, 2, 3, 4]
    assert scores["prompts"] == 12
    assert min(scores["scorer_on_truth"][name] for name in ("color", "shape", "motion")) >= 0.99
    assert set(scores["seconds"]) == {"render", "curate", "train", "evaluate"}
    assert (folder / "report.html").stat().st_size > 50_000

    sample = [sys.executable, "-m", "sora_train.sample", str(folder / "train"), "a red circle, moving left (slowly)"]
    size = ["--height", "48", "--width", "96", "--frames", "13", "--steps", "2"]
    done = subprocess.run([*sample, *size], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_file()
