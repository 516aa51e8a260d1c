"""sora_train.sample: any prompt, nothing overwritten, what was made is on record."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from sora_train import sample as sample_module
from sora_train.config.data import DataConfig
from sora_train.config.encoders import CodecConfig
from sora_train.config.model import ModelConfig, TextConfig
from sora_train.config.root import TrainConfig
from sora_train.config.validation import SamplingConfig, ValidationConfig
from sora_train.data.video_file import read_video, save_video
from sora_train.encoders.wavelet import WaveletCodec
from sora_train.models.video_dit import VideoDiT
from sora_train.sample import TrainedRun, contact_sheet, file_words, seeds, strip

NASTY = ["a red circle, moving left (slowly)", 'she said "no" = {x: [1,2]}', "Größe ✓ 雪", "--not-an-option"]


@pytest.fixture
def command(monkeypatch):
    """Runs the command on a tiny untrained run; returns (exit code, lines of output)."""
    text = TextConfig(width=16, heads=2, layers=1)
    model = ModelConfig(width=16, depth=1, heads=2, mlp_width=16, in_channels=96, out_channels=96, text=text)
    config = TrainConfig(
        model=model,
        codec=CodecConfig(),
        data=DataConfig(shards="/d"),
        validation=ValidationConfig(height=16, width=24, frames=3, fps=8.0),
        sampling=SamplingConfig(steps=2, guidance_scale=2.0),
    )
    run = TrainedRun(config, VideoDiT(model), WaveletCodec(config.codec), list, Path("step-00000007"), 7)
    monkeypatch.setattr(sample_module, "open_run", lambda run_dir, device: run)
    app = typer.Typer()
    app.command()(sample_module.sample)

    def invoke(*arguments: str) -> tuple[int, list[str]]:
        result = CliRunner().invoke(app, list(arguments))
        return result.exit_code, result.output.splitlines()

    return invoke


def test_any_prompt_becomes_a_video_of_the_runs_size(command, tmp_path):
    code, lines = command(str(tmp_path), "--", *NASTY)
    assert code == 0, lines
    folder = tmp_path / "samples"
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == NASTY
    for record in records:
        assert read_video(folder / record["file"]).shape == (3, 16, 24, 3)
        assert (record["step"], record["solver"], record["guidance_scale"]) == (7, "euler", 2.0)
    assert (folder / "0001-contact-sheet.png").is_file()
    assert not list(folder.glob(".*"))


def test_nothing_is_overwritten(command, tmp_path):
    for _ in range(2):
        assert command(str(tmp_path), "a", "b", "--output", str(tmp_path / "out"))[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.mp4"))
    assert names == ["0001-a.mp4", "0002-b.mp4", "0003-a.mp4", "0004-b.mp4"]
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 4


def test_the_ten_thousandth_overwrites_none(command, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "10000-a.mp4").write_text("mine")
    assert command(str(tmp_path), "a", "--output", str(out))[0] == 0
    assert sorted(path.name for path in out.glob("*.mp4")) == ["10000-a.mp4", "10001-a.mp4"]


def test_size_length_sampler_and_prompts_can_be_chosen(command, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("from, the file\n\n  and (another)  \n")
    size = ["--height", "24", "--width", "16", "--frames", "5", "--fps", "12"]
    options = [*size, "--steps", "3", "--guidance-scale", "1", "--solver", "heun", "--seed", "4"]
    code, lines = command(str(tmp_path), "given", "--prompts", str(prompts), *options)
    assert code == 0, lines
    records = [json.loads(line) for line in (tmp_path / "samples" / "samples.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["given", "from, the file", "and (another)"]
    assert {(r["height"], r["width"], r["num_frames"], r["fps"]) for r in records} == {(24, 16, 5, 12.0)}
    assert {(r["steps"], r["guidance_scale"], r["solver"], r["seed"]) for r in records} == {(3, 1.0, "heun", 4)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a", "--height", "20"], "height=20 is not a multiple of 8: use 16 or 24"),
        (["a", "--frames", "4"], "frames=4 is not 1 plus a multiple of 2: use 3 or 5"),
        (["a", "--steps", "0"], "steps=0: give 1 or more"),
        (["a", "--height", "0"], "height=0 is not a multiple of 8"),
        (["a", "--fps", "0"], "fps=0"),
        ([], "no prompt"),
        (["--prompts", "/nowhere.txt"], "/nowhere.txt: no such file"),
    ],
)
def test_bad_use_is_one_line_and_code_2(command, tmp_path, arguments, says):
    code, lines = command(str(tmp_path), *arguments)
    assert code == 2
    assert len(lines) == 1
    assert says in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_or_written_is_said_before_sampling(command, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_module, "generate", None)
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    for option, says in (("--output", "File exists"), ("--prompts", "is not UTF-8 text")):
        code, lines = command(str(tmp_path), "a", option, str(tmp_path / "file"))
        assert (code, len(lines)) == (2, 1)
        assert says in lines[0]


def test_a_folder_without_a_run_is_one_line(tmp_path):
    app = typer.Typer()
    app.command()(sample_module.sample)
    result = CliRunner().invoke(app, [str(tmp_path), "a"])
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert len(result.output.splitlines()) == 1


def test_seeds_depend_on_the_prompt_alone():
    assert seeds(["a", "b", "a"], 5) == [5, 5, 6]
    assert seeds(["b"], 5) == [5]


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "", "雪", "a" * 300, "a/b\\c\0d"])
def test_file_names_are_plain(prompt):
    assert file_words(prompt).replace("-", "").isalnum()
    assert len(file_words(prompt)) <= 40


def test_a_contact_sheet_holds_first_and_last_frame():
    frames = np.stack([np.full((10, 12, 3), value, np.uint8) for value in (1, 90, 180, 255)])
    shown = strip(frames, 2)
    assert shown.shape == (10, 12 * 2 + 2, 3)
    assert (shown[0, 0, 0], shown[0, -1, 0]) == (1, 255)
    assert strip(frames[:1], 5).shape == (10, 12, 3)
    sheet = contact_sheet([("one", [frames, frames]), ("two ✓", [frames])], frames_shown=4)
    assert (np.asarray(sheet) == 255).all(-1).sum() == 3 * 10 * 12


def test_a_video_survives_its_file(tmp_path):
    rows = np.linspace(40, 200, 64, dtype=np.uint8)[:, None]
    frames = np.stack([np.repeat(np.broadcast_to(rows + shift, (64, 80))[..., None], 3, -1) for shift in range(9)])
    save_video(frames, tmp_path / "a.mp4", fps=8)
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 2
