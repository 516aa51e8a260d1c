"""The demo's report: one HTML file that needs nothing beside it, and scores.json with the same numbers.

Shows the loss, what was generated beside what was rendered, how much of it is right and how much of that is luck, where
the time went, and what to try next.
"""

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from launch.template import fill
from sora_train.config.world import Level
from sora_train.data.video_file import Frames, read_video
from sora_train.evaluate import RESULTS
from sora_train.sample import contact_sheet
from sora_train.world.render import render
from sora_train.world.sampling import sample_scene

SCORES, REPORT = "scores.json", "report.html"
# Seed of the rendered clips shown beside the generated ones; no corpus of the demo is drawn from it.
_COUNTERPART_SEED = 20_000
_MOST_SCENES = 6000
# Rows of the sheet of stills.
_SHEET_ROWS = 12
_CHART_WIDTH, _CHART_HEIGHT = 760.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 16.0, 12.0, 28.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A line chart in SVG units: polylines and where its axes are marked."""

    width: float
    height: float
    raw: str
    smooth: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    last: str


def write_report(
    folder: Path, run_dir: Path, samples_dir: Path, seconds: dict[str, float], steps: int
) -> dict[str, Any]:
    """Writes report.html and scores.json into `folder`; returns the scores.

    Args:
        folder: of the demo.
        run_dir: of its training run (metrics.jsonl is read).
        samples_dir: where `sora_train.evaluate` left its samples and evaluation.json.
        seconds: wall time of each stage.
        steps: of the training.
    """
    results = json.loads((samples_dir / RESULTS).read_text())
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [(int(row["step"]), float(row["loss"])) for row in metrics if "loss" in row]
    samples = results.pop("samples")
    scores = {
        **results,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "steps": steps,
        "throughput": throughput(metrics),
        "loss": losses,
    }
    generated = [read_video(samples_dir / sample["file"]) for sample in samples]
    rendered = counterparts(samples, generated)
    page = fill(
        "report.html.j2",
        scores=scores,
        chart=chart(losses),
        cards=[
            {**sample, "generated": animation(frames), "rendered": animation(real)}
            for sample, frames, real in zip(samples, generated, rendered, strict=True)
        ],
        sheet=png(sheet_of_stills(samples, rendered, generated)),
        bars=bars(scores["seconds"]),
        run_dir=str(run_dir),
    )
    (folder / SCORES).write_text(json.dumps(scores, indent=1))
    (folder / REPORT).write_text(page)
    return scores


def throughput(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the logged intervals, the first left out: it holds the start."""
    keys = ("tokens_per_second", "clips_per_second", "step_seconds", "data_wait_share")
    rows = [row for row in metrics if keys[0] in row]
    rows = rows[1:] or rows
    return {key: float(np.mean([row[key] for row in rows])) for key in keys if rows and all(key in row for row in rows)}


def counterparts(samples: Sequence[dict[str, Any]], generated: Sequence[Frames]) -> list[Frames]:
    """For each sample, a rendered clip that shows what its prompt says, of its size where one turns up soon."""
    wanted = [
        ((sample["color"], sample["shape"], sample["motion"]), frames.shape[:3])
        for sample, frames in zip(samples, generated, strict=True)
    ]
    exact: dict[Any, Any] = {}
    similar: dict[Any, Any] = {}
    for index in range(_MOST_SCENES):
        scene = sample_scene(_COUNTERPART_SEED, index, Level.simple)
        if scene.num_frames > 1:
            (figure,) = scene.shots[0].figures
            triple = (figure.color, figure.shape, figure.motion)
            exact.setdefault((triple, (scene.num_frames, scene.height, scene.width)), scene)
            similar.setdefault(triple, scene)
            if len(similar) >= len({triple for triple, _ in wanted}) and all(key in exact for key in wanted):
                break
    return [render(exact.get(key) or similar[key[0]]) for key in wanted]


def animation(frames_THWC: Frames, seconds_per_frame: float = 0.125) -> str:
    """A looping WebP of the frames as a data URI; it rests on the last frame before it starts again."""
    images = [Image.fromarray(image) for image in frames_THWC]
    durations = [int(1000 * seconds_per_frame)] * len(images)
    durations[-1] += 500
    file = io.BytesIO()
    images[0].save(
        file, "WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0, quality=85, method=4
    )
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def png(image: Image.Image) -> str:
    """An image as a data URI."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def sheet_of_stills(
    samples: Sequence[dict[str, Any]], rendered: Sequence[Frames], generated: Sequence[Frames]
) -> Image.Image:
    """Rendered (left) beside generated (right): first the triples that were never trained on."""
    order = sorted(range(len(samples)), key=lambda index: (not samples[index]["held_out"], index))
    chosen = order[: _SHEET_ROWS // 2] + order[-(_SHEET_ROWS - _SHEET_ROWS // 2) :]
    rows = []
    for index in dict.fromkeys(chosen):
        label = samples[index]["prompt"] + (" (never trained on)" if samples[index]["held_out"] else "")
        rows.append((label, [rendered[index], generated[index]]))
    return contact_sheet(rows, frames_shown=4)


def bars(seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Stages with their share of the longest one, for bars."""
    longest = max([*seconds.values(), 1e-9])
    return [{"name": name, "seconds": value, "percent": 100 * value / longest} for name, value in seconds.items()]


def chart(points: Sequence[Point]) -> Chart:
    """Loss over steps on a logarithmic axis: every step thin, a moving average on top. Steps without a finite,
    positive loss are left out."""
    shown = [(step, value) for step, value in points if math.isfinite(value) and value > 0]
    if not shown:
        return Chart(_CHART_WIDTH, _CHART_HEIGHT, "", "", [], [], "no loss was logged")
    averaged = smooth(shown)
    low, high = (bound([value for _, value in shown]) for bound in (min, max))
    high = max(high, low * 1.1)
    last_step = max(step for step, _ in shown) or 1

    def x(step: float) -> float:
        return _LEFT + (_CHART_WIDTH - _LEFT - _RIGHT) * step / last_step

    def y(value: float) -> float:
        share = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return _CHART_HEIGHT - _BOTTOM - (_CHART_HEIGHT - _TOP - _BOTTOM) * share

    def polyline(values: Iterable[Point]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in values)

    return Chart(
        _CHART_WIDTH,
        _CHART_HEIGHT,
        polyline(thinned(shown, 1500)),
        polyline(thinned(averaged, 400)),
        [(x(step), f"{step:,.0f}") for step in linear_ticks(last_step)],
        [(y(value), f"{value:g}") for value in log_ticks(low, high)],
        f"{averaged[-1][1]:.3g}",
    )


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a fortieth of the steps, unbiased at the start."""
    decay = 1 - 1 / max(1, len(points) / 40)
    mean, weight, averaged = 0.0, 0.0, []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        averaged.append((step, mean / weight))
    return averaged


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` of the points, the last among them."""
    stride = max(1, math.ceil(len(points) / most))
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def linear_ticks(last: float, count: int = 6) -> list[float]:
    """Round numbers from 0 to `last`, about `count`."""
    rough = last / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * number for number in range(int(last / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between the bounds; of a wide range the powers alone, of a narrow one its ends."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]
