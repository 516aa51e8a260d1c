"""The demo's report: one file that needs nothing else, with the numbers of scores.json."""

import base64
import io
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.report import animation, chart, counterparts, linear_ticks, log_ticks, smooth, throughput, write_report
from sora_train.data.video_file import save_video
from sora_train.evaluate import RESULTS, grid, summary
from sora_train.world.score import Reading, score_clip
from sora_train.world.words import COLORS

SECONDS = {"render": 12.3, "curate": 30.0, "train": 300.0, "evaluate": 40.0}


@pytest.fixture
def demo(tmp_path) -> tuple[Path, list[Reading]]:
    """What a run and an evaluation of eight samples leave; the samples are patches that do not move."""
    cases = grid(8, 9, 0)
    readings = [Reading(case.color, None if index == 0 else case.shape, "still") for index, case in enumerate(cases)]
    results = summary(cases, readings)
    samples = tmp_path / "samples"
    samples.mkdir()
    for index, (case, sample) in enumerate(zip(cases, results["samples"], strict=True)):
        sample["file"] = f"{index:04d}.mp4"
        sample["prompt"] += " <b>" if index == 1 else ""
        frames = np.full((9, case.height, case.width, 3), 200, np.uint8)
        frames[:, 20:40, 20:40] = COLORS[case.color]
        save_video(frames, samples / sample["file"], 8)
    truth = {"color": 1.0, "shape": 0.995, "motion": 0.99, "clips": 500}
    values = {"scorer_on_truth": truth, "step": 40, "parameters": 1_500_000, **results}
    (samples / RESULTS).write_text(json.dumps(values))
    run_dir = tmp_path / "train"
    run_dir.mkdir()
    rows = [{"step": step, "loss": 1.5 / (1 + step / 5)} for step in range(40)]
    for step in (9, 19, 29, 39):
        rows[step] |= {"tokens_per_second": 100.0 * step, "step_seconds": 0.5, "clips_per_second": 3.0}
    rows.append({"step": 39, "held_out_loss": 0.3})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path, readings


class Page(HTMLParser):
    """Counts open tags and collects what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href")]


def test_the_report_is_whole_and_loads_nothing(demo):
    folder, _ = demo
    write_report(folder, folder / "train", folder / "samples", SECONDS, steps=40)
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.loads) == 8 * 2 + 1
    assert all(value.startswith("data:image/") for value in page.loads)
    assert "://" not in re.sub(r'"data:[^"]*"', "", text)
    assert "&lt;b&gt;" in text
    assert "prefers-color-scheme: dark" in text


def test_the_report_says_what_the_scores_say(demo):
    folder, readings = demo
    scores = write_report(folder, folder / "train", folder / "samples", SECONDS, steps=40)
    assert json.loads((folder / "scores.json").read_text()) == json.loads(json.dumps(scores))
    wanted = {"prompts", "color", "shape", "motion", "scorer_on_truth", "seconds", "steps", "parameters", "loss"}
    assert wanted <= set(scores)
    assert {"held_out", "trained", "shuffled", "chance", "throughput"} <= set(scores)
    assert scores["seconds"] == SECONDS
    assert scores["loss"][:2] == [(0, 1.5), (1, 1.25)]
    assert len(scores["loss"]) == 40
    assert scores["throughput"]["tokens_per_second"] == pytest.approx(100 * (19 + 29 + 39) / 3)
    text = (folder / "report.html").read_text()
    assert text.count('class="chip wrong"') == sum(
        asdict(reading)[name] != getattr(case, name)
        for case, reading in zip(grid(8, 9, 0), readings, strict=True)
        for name in ("color", "shape", "motion")
    )
    assert f"{scores['motion']:.2f}" in text
    assert "1,500,000" in text
    assert text.count("never trained on</span>") == sum(case.held_out for case in grid(8, 9, 0))


def test_a_counterpart_shows_what_the_prompt_says_at_the_samples_size():
    cases = grid(60, 9, 1)[:12]
    generated = [np.zeros((9, case.height, case.width, 3), np.uint8) for case in cases]
    real = counterparts([asdict(case) for case in cases], generated)
    for case, frames, shape in zip(cases, real, (frames.shape for frames in generated), strict=True):
        assert frames.shape == shape
        assert score_clip(frames) == Reading(case.color, case.shape, case.motion)


def test_an_animation_holds_every_frame():
    frames = np.stack([np.full((16, 24, 3), 20 * index, np.uint8) for index in range(5)])
    image = Image.open(io.BytesIO(base64.b64decode(animation(frames).split(",")[1])))
    assert (image.format, image.n_frames, image.size) == ("WEBP", 5, (24, 16))


def test_the_chart_falls_with_the_loss_and_stays_inside():
    drawn = chart([(step, 2.0 * 0.99**step) for step in range(300)])
    points = [tuple(map(float, pair.split(","))) for pair in drawn.smooth.split()]
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # down in SVG is larger
    assert 0 <= min(xs) <= max(xs) <= drawn.width
    assert 0 <= min(ys) <= max(ys) <= drawn.height
    assert len(drawn.y_ticks) >= 2
    assert drawn.x_ticks[0][1] == "0"


@pytest.mark.parametrize("points", [[], [(0, 1.0)], [(0, float("nan")), (1, 2.0)], [(0, 1.0), (1, 1.0)], [(0, -1.0)]])
def test_a_chart_of_little_or_bad_data_is_drawn_all_the_same(points):
    assert "nan" not in chart(points).raw


def test_ticks_are_round_and_inside():
    assert linear_ticks(1399) == [0, 500, 1000]
    assert linear_ticks(40) == [0, 10, 20, 30, 40]
    assert log_ticks(0.03, 1.2) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1])
    assert log_ticks(0.31, 0.4) == [0.31, 0.4]


def test_the_average_of_a_constant_is_that_constant():
    assert [value for _, value in smooth([(step, 3.0) for step in range(100)])] == pytest.approx([3.0] * 100)


def test_throughput_leaves_the_start_out_when_it_can():
    rows = [{"tokens_per_second": 1.0}, {"loss": 1.0}, {"tokens_per_second": 5.0}]
    assert throughput(rows) == {"tokens_per_second": 5.0}
    assert throughput(rows[:1]) == {"tokens_per_second": 1.0}
    assert throughput([]) == {}
