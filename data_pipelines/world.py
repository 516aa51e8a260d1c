"""Renders a corpus of the procedural world: `python -m data_pipelines.world output=DIR clips=N seed=S level=full`.

First station of the demo, before curation. Writes DIR/NAME.mp4 (H.264), DIR/NAME.txt (a weak original caption, such
as real footage comes with) and DIR/truth/NAME.json (world.scene.truth; curation and training never read it).
DIR/world.json remembers the settings: the same command again makes what is missing, other settings are refused.
"""

import functools
import io
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sora_train.config.command import hydra_app
from sora_train.config.root import ConfigError
from sora_train.config.world import WorldConfig
from sora_train.world.render import render
from sora_train.world.sampling import sample_scene
from sora_train.world.scene import truth

SETTINGS_FILE = "world.json"
# With the macroblock tree, x264 (core 165, with its assembly, even in one thread) gave one in five of these flat clips
# other bytes on each run, though never real footage; without the tree, 140 clips came out the same five times over.
_X264 = {"crf": "14", "preset": "fast", "x264-params": "mbtree=0"}
_CLIPS_PER_TASK = 16

# File names and tags say nothing of what is seen: the recaption has something to add.
_WEAK_CAPTIONS: tuple[Callable[[int], str], ...] = (
    lambda number: "shapes",
    lambda number: "motion graphics, stock footage",
    lambda number: f"animation {number % 50}",
    lambda number: f"untitled_render_v{number % 7}",
    lambda number: f"clip {number:04d} final export",
    lambda number: "abstract loop, geometry",
)


@hydra_app(WorldConfig, "world")
def main(config: WorldConfig) -> None:
    """Renders the clips that are not there yet and says how many."""
    rendered = render_corpus(config)
    print(f"{config.output}: {rendered} clips rendered, {config.clips - rendered} were there")


def render_corpus(config: WorldConfig) -> int:
    """Writes the clips that are not there yet; returns their number.

    Raises:
        ConfigError: see check_folder; also when the folder cannot be written.
    """
    folder = Path(config.output)
    check_folder(folder, config)
    missing = [index for index in range(config.clips) if not _is_complete(folder, clip_name(index))]
    try:
        (folder / "truth").mkdir(parents=True, exist_ok=True)
        _write(folder / SETTINGS_FILE, json.dumps(_settings(config), indent=1).encode())
    except OSError as error:
        raise ConfigError(f"output={config.output} cannot be written, {error.strerror}: give another") from error

    tasks = [missing[start : start + _CLIPS_PER_TASK] for start in range(0, len(missing), _CLIPS_PER_TASK)]
    write = functools.partial(write_clips, folder, config)
    workers = min(config.workers or os.cpu_count() or 1, len(tasks))
    columns = (TextColumn("rendering"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("clips", total=len(missing))
        if workers <= 1:
            for task in tasks:
                progress.advance(bar, write(task))
        else:
            # Not fork: the progress bar runs a thread.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                for count in pool.map(write, tasks):
                    progress.advance(bar, count)
    return len(missing)


def clip_name(index: int) -> str:
    """Name of clip `index`, without suffix."""
    return f"clip-{index:06d}"


def check_folder(folder: Path, config: WorldConfig) -> None:
    """Raises ConfigError unless the folder is new, empty, or holds a corpus that this one continues."""
    if config.clips < 1:
        raise ConfigError(f"clips={config.clips} renders nothing: give 1 or more")
    if config.seed < 0:
        raise ConfigError(f"seed={config.seed} is negative: give 0 or more")
    if config.workers < 0:
        raise ConfigError(f"workers={config.workers} is negative: give 0 for one a core, or a number")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={folder} is a file: give a folder")
    settings_path = folder / SETTINGS_FILE
    if not settings_path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"output={folder} holds files but no {SETTINGS_FILE}: give a new folder")
        return
    found, wanted = json.loads(settings_path.read_bytes()), _settings(config)
    differing = [key for key in wanted if key != "clips" and found.get(key) != wanted[key]]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"output={folder} holds clips made with {key}={found.get(key)}, not {wanted[key]}: give a new folder"
        )
    if found["clips"] > config.clips:
        raise ConfigError(
            f"output={folder} holds {found['clips']} clips, more than clips={config.clips}: give a new one"
        )


def write_clips(folder: Path, config: WorldConfig, indices: list[int]) -> int:
    """Renders and writes these clips; returns how many. A clip's mp4 comes last and whole: with it, all is there."""
    for index in indices:
        scene = sample_scene(config.seed, index, config.level, config.exclude_held_out)
        name = clip_name(index)
        _write(folder / "truth" / f"{name}.json", json.dumps(truth(scene)).encode())
        _write(folder / f"{name}.txt", weak_caption(config.seed, index).encode())
        _write(folder / f"{name}.mp4", encode_mp4(render(scene), scene.fps))
    return len(indices)


def weak_caption(seed: int, index: int) -> str:
    """What an uploader might have called the clip; never its color, shape or motion."""
    rng = np.random.default_rng([seed, index, 3])
    return _WEAK_CAPTIONS[int(rng.integers(len(_WEAK_CAPTIONS)))](int(rng.integers(10000)))


def encode_mp4(frames: NDArray[np.uint8], fps: int) -> bytes:
    """H.264 in mp4, yuv420p (BT.601), of frames [T, H, W, 3]. The same frames give the same bytes in every process."""
    _, height, width, _ = frames.shape
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps), options=_X264)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _settings(config: WorldConfig) -> dict[str, Any]:
    """What decides the clips; neither where they lie nor how many processes made them."""
    values = {**asdict(config), "level": config.level.value}
    return {key: values[key] for key in ("clips", "seed", "level", "exclude_held_out")}


def _is_complete(folder: Path, name: str) -> bool:
    return (folder / f"{name}.mp4").is_file()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; no one takes the temporary name for a clip."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


if __name__ == "__main__":
    main()
