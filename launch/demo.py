"""The whole path in one command: `make demo`, or `python -m launch.demo`.

    render a world -> curate it into shards -> train with torchrun -> sample and score -> report.html, scores.json

Every stage is the command a user would type, run with this interpreter. Run again after an interruption, it goes on
where it was: rendering, curation and training each know what they have done.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launch.report import REPORT, SCORES, write_report

SECONDS = "seconds.json"


@dataclass(frozen=True)
class Stage:
    """One command of the path."""

    name: str
    module: str
    arguments: list[str]


def stages(folder: Path, clips: int, steps: int, processes: int, prompts: int) -> list[Stage]:
    """The commands of the demo, in order. The triples that will be scored apart are left out of the rendered world."""
    videos, shards = folder / "videos", folder / "shards"
    return [
        Stage(
            "render",
            "data_pipelines.world",
            [setting("output", videos), f"clips={clips}", "level=simple", "exclude_held_out=true"],
        ),
        Stage(
            "curate",
            "data_pipelines.curate",
            [setting("input", videos), setting("output", shards), f"workers={os.cpu_count() or 1}"],
        ),
        Stage(
            "train",
            "launch.submit",
            [
                "experiment=demo",
                setting("data.shards", shards),
                setting("run_dir", folder / "train"),
                f"steps={steps}",
                f"cluster.processes_per_node={processes}",
            ],
        ),
        Stage(
            "evaluate",
            "sora_train.evaluate",
            [str(folder / "train"), f"--output={folder / 'samples'}", f"--truth={videos}", f"--prompts={prompts}"],
        ),
    ]


def setting(key: str, path: Path) -> str:
    """A Hydra argument whose value is a path, whatever characters it has."""
    # Inside quotes Hydra reads backslashes as they are, but for those right before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(path))
    return f"{key}='{escaped}'"


def run_stage(stage: Stage) -> float:
    """Runs one command; returns its seconds. Leaves with its exit code when it fails."""
    print(f"\n== {stage.name}: python -m {stage.module} {' '.join(stage.arguments)}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, "-m", stage.module, *stage.arguments], check=False).returncode
    if code:
        print(f"error: the demo's stage {stage.name} ended with exit code {code}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
    return time.monotonic() - started


def demo(
    output: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path("runs/demo"),
    clips: Annotated[int, typer.Option(help="clips to render", min=1)] = 1200,
    steps: Annotated[int, typer.Option(help="optimizer steps", min=1)] = 1600,
    processes: Annotated[int, typer.Option(help="ranks of torchrun", min=1)] = 2,
    prompts: Annotated[int, typer.Option(help="videos to generate and score", min=2)] = 60,
) -> None:
    """Renders, curates, trains, samples, scores and reports."""
    output.mkdir(parents=True, exist_ok=True)
    seconds_file = output / SECONDS
    seconds: dict[str, float] = json.loads(seconds_file.read_text()) if seconds_file.exists() else {}
    for stage in stages(output, clips, steps, processes, prompts):
        # Added up over interrupted runs.
        seconds[stage.name] = seconds.get(stage.name, 0.0) + run_stage(stage)
        seconds_file.write_text(json.dumps(seconds, indent=1))
    scores = write_report(output, output / "train", output / "samples", seconds, steps)
    print(f"\ncolor {scores['color']:.3f}  shape {scores['shape']:.3f}  motion {scores['motion']:.3f}")
    print(f"report: {output / REPORT}\nscores: {output / SCORES}")


if __name__ == "__main__":
    typer.run(demo)
