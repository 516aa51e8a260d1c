"""Does a model of the procedural world do what its prompts say? Read from the pixels it generates.

    python -m sora_train.evaluate RUN_DIR --output DIR --truth FOLDER_OF_RENDERED_CLIPS

Every (color, shape, motion) is asked for, at mixed sizes; world/score.py reads what came out. Beside the shares that
are right stand: the same for the triples that were never trained on; the samples scored against prompts that were not
theirs, which must come out near chance; and the scorer's own shares on rendered clips whose truth is known. A scorer
that misreads more than one in a hundred of those may not judge.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sora_train.config.command import fail
from sora_train.config.root import ConfigError
from sora_train.data.video_file import read_video, save_video
from sora_train.generation import Request
from sora_train.sample import best_device, open_output, open_run
from sora_train.world.sampling import SIMPLE_SIZES
from sora_train.world.score import Reading, score_clip, share_correct
from sora_train.world.words import COLORS, HELD_OUT, MOTIONS, SHAPES, TRIPLES, prompt

ATTRIBUTES = ("color", "shape", "motion")
CHANCE = {"color": 1 / len(COLORS), "shape": 1 / len(SHAPES), "motion": 1 / len(MOTIONS)}
# The scorer's least share of right readings of rendered clips.
SCORER_BAR = 0.99
RESULTS = "evaluation.json"


@dataclass(frozen=True)
class Case:
    """One prompt of the grid and the size at which it is sampled."""

    color: str
    shape: str
    motion: str
    held_out: bool  # never trained on, when the corpus was rendered with exclude_held_out=true
    height: int
    width: int
    num_frames: int
    seed: int

    @property
    def prompt(self) -> str:
        """The text given to the model."""
        return prompt(self.color, self.shape, self.motion)


def grid(num_prompts: int, num_frames: int, seed: int) -> list[Case]:
    """`num_prompts` prompts in which every triple comes equally often (to within one), sizes in turn."""
    order = np.random.default_rng(seed).permutation(len(TRIPLES))
    cases = []
    for index in range(num_prompts):
        color, shape, motion = triple = TRIPLES[order[index % len(TRIPLES)]]
        height, width = SIMPLE_SIZES[index % len(SIMPLE_SIZES)]
        cases.append(Case(color, shape, motion, triple in HELD_OUT, height, width, num_frames, seed + index))
    return cases


def is_right(case: Case, reading: Reading) -> dict[str, bool]:
    """For each attribute, whether the pixels show what the prompt says."""
    return {name: getattr(reading, name) == getattr(case, name) for name in ATTRIBUTES}


def shares(cases: Sequence[Case], readings: Sequence[Reading]) -> dict[str, float]:
    """Share of right readings of each attribute, and of samples in which all three are right."""
    rights = [is_right(case, reading) for case, reading in zip(cases, readings, strict=True)]
    values = {name: float(np.mean([right[name] for right in rights])) for name in ATTRIBUTES}
    return {**values, "all": float(np.mean([all(right.values()) for right in rights]))}


def shuffled_shares(cases: Sequence[Case], readings: Sequence[Reading]) -> dict[str, float]:
    """Shares when each sample is scored against every prompt of the grid but its own: the mean over all such
    shufflings. A model that ignores its prompt scores the same as above; one that follows it, about chance here."""
    count = len(cases)
    values = {}
    for name in ATTRIBUTES:
        asked = np.array([getattr(case, name) for case in cases])
        read = np.array([str(getattr(reading, name)) for reading in readings])
        match = asked[:, None] == read[None, :]
        values[name] = float((match.sum() - np.trace(match)) / (count * (count - 1)))
    return values


def scorer_on_truth(folder: Path, num_clips: int) -> dict[str, float]:
    """Shares of the scorer's readings that agree with the truth of a folder of `data_pipelines.world`, level simple.

    Raises:
        ConfigError: no truth in the folder.
    """
    paths = sorted((folder / "truth").glob("*.json"))[:num_clips]
    if not paths:
        raise ConfigError(f"{folder} holds no truth/*.json: give a folder of `python -m data_pipelines.world`")
    readings, expected = [], []
    for path in paths:
        (thing,) = json.loads(path.read_text())["objects"]
        expected.append(Reading(thing["color"], thing["shape"], thing["motion"]))
        readings.append(score_clip(read_video(folder / f"{path.stem}.mp4")))
    return {**share_correct(readings, expected), "clips": len(paths)}


def may_judge(on_truth: dict[str, float]) -> None:
    """Raises ConfigError when the scorer misreads rendered clips."""
    for name in ATTRIBUTES:
        if on_truth[name] < SCORER_BAR:
            raise ConfigError(
                f"the scorer reads {name} right in {on_truth[name]:.3f} of rendered clips, below {SCORER_BAR}: "
                "it may not judge samples; --truth must be a corpus of level=simple"
            )


def summary(cases: Sequence[Case], readings: Sequence[Reading]) -> dict[str, Any]:
    """All scores of a grid, as JSON values."""

    def of(held_out: bool) -> dict[str, float]:
        chosen = [(case, reading) for case, reading in zip(cases, readings, strict=True) if case.held_out is held_out]
        return {**shares(*zip(*chosen, strict=True)), "prompts": len(chosen)} if chosen else {"prompts": 0}

    return {
        "prompts": len(cases),
        **shares(cases, readings),
        "trained": of(held_out=False),
        "held_out": of(held_out=True),
        "shuffled": shuffled_shares(cases, readings),
        "chance": CHANCE,
        "samples": [
            {**asdict(case), "prompt": case.prompt, "reading": asdict(reading), "right": is_right(case, reading)}
            for case, reading in zip(cases, readings, strict=True)
        ],
    }


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="directory of a run, or one of its checkpoints")],
    output: Annotated[Path, typer.Option(help="folder for the samples and evaluation.json")],
    prompts: Annotated[int, typer.Option(help="prompts in the grid; each of the 60 triples in turn", min=2)] = 60,
    frames: Annotated[int, typer.Option(help="frames of a sample", min=2)] = 9,
    seed: Annotated[int, typer.Option(help="of order and noise")] = 0,
    truth: Annotated[Path | None, typer.Option(help="folder of rendered clips to check the scorer on first")] = None,
    truth_clips: Annotated[int, typer.Option(help="how many of them", min=1)] = 500,
) -> None:
    """Samples a grid of prompts from a run trained on the procedural world and scores what comes out."""
    try:
        cases = grid(prompts, frames, seed)
        run = open_run(run_dir, best_device())
        requests = [Request(case.prompt, case.height, case.width, case.num_frames, case.seed) for case in cases]
        run.check(requests)
        open_output(output)
        on_truth = None
        if truth is not None:
            on_truth = scorer_on_truth(truth, truth_clips)
            may_judge(on_truth)
    except ConfigError as error:
        fail(error)
    videos = run.generate(requests, run.config.sampling)
    readings = [score_clip(frames_THWC) for frames_THWC in videos]
    results = summary(cases, readings)
    for index, (sample, frames_THWC) in enumerate(zip(results["samples"], videos, strict=True)):
        sample["file"] = f"{index:04d}.mp4"
        save_video(frames_THWC, output / sample["file"], run.config.validation.fps)
    values = {"scorer_on_truth": on_truth, "step": run.step, "parameters": run.num_parameters, **results}
    (output / RESULTS).write_text(json.dumps(values, indent=1))
    for name, score in (("all prompts", results), ("held out", results["held_out"]), ("shuffled", results["shuffled"])):
        print(f"{name:12s}", *(f"{key} {score[key]:.3f}" for key in ATTRIBUTES if key in score), sep="  ")


if __name__ == "__main__":
    typer.run(evaluate)
