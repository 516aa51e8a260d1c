"""Raw video to recaptioned shards: `python -m data_pipelines.curate input=VIDEOS output=SHARDS workers=4`.

Sources are listed once and dealt to tasks of a fixed number of files. Each task is a chain of datatrove steps (ingest,
probe, split_scenes, filter_quality, caption) that writes one part; a closing task lays the parts out as shards of equal
size, which are then indexed. What is complete is never done again: the same command continues after a kill, says so
when nothing is left to do, and refuses a folder that other settings or other sources have filled.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipelines.ledger import StageCount, check_counts, counts_table, merge_rejects, read_counts
from data_pipelines.media import X264_PRESETS
from data_pipelines.stages.caption import CaptionPixels
from data_pipelines.stages.describe import MODEL
from data_pipelines.stages.filter_quality import FilterQuality
from data_pipelines.stages.ingest import IMAGE_NAMES, VIDEO_NAMES, Ingest, list_sources, source_keys
from data_pipelines.stages.probe import Probe
from data_pipelines.stages.split_scenes import SplitScenes
from data_pipelines.stages.write_shards import ReadParts, WritePart, WriteShards, balanced_bytes, part_files
from sora_train.config.command import hydra_app
from sora_train.config.curation import CurationConfig
from sora_train.config.root import ConfigError
from sora_train.data.index_writer import write_index
from sora_train.data.schema import REJECTS_NAME

STAGES = ("ingest", "probe", "split_scenes", "filter_quality", "caption", "write_shards")
SUMMARY = "curation.json"  # in the output, once it is complete
REJECTS = "rejects.jsonl"
SOURCES_PER_TASK = 16
# Part of what a folder of shards is made by: raise it when the same videos would give other clips or captions.
PIPELINE_VERSION = 2


@dataclass(frozen=True)
class Workspace:
    """Where a run keeps what is not finished: OUTPUT/.curation, removed at the end."""

    root: Path

    @property
    def plan(self) -> Path:
        """The identity of the run."""
        return self.root / "plan.json"

    @property
    def sources(self) -> Path:
        """One JSON line a source: its key and path."""
        return self.root / "sources.jsonl"

    @property
    def ledgers(self) -> Path:
        """Rejects, a file a task and stage."""
        return self.root / "rejects"

    @property
    def progress(self) -> Path:
        """A file a task, a byte a source that is done."""
        return self.root / "progress"

    @property
    def parts(self) -> Path:
        """Finished clips, a tar a task."""
        return self.root / "parts"

    @property
    def tasks(self) -> Path:
        """datatrove's logs, statistics and completion markers of the tasks."""
        return self.root / "tasks"


@hydra_app(CurationConfig, "curate")
def main(config: CurationConfig) -> None:
    """Curates and shows the closing table."""
    console = Console()
    counts = curate(config, console)
    console.print(counts_table(counts))
    *stages, index = counts
    for rejected, name in ((sum(count.num_rejected for count in stages), REJECTS), (index.num_rejected, REJECTS_NAME)):
        if rejected:
            place = Path(config.output) / name
            console.print(f"{rejected} rejected, reasons in {place}", highlight=False, soft_wrap=True)


def curate(config: CurationConfig, console: Console) -> tuple[StageCount, ...]:
    """Fills config.output; returns what each stage did, and the index last.

    A clip that the index refuses is counted there and named in index_rejects.jsonl; the others are a data set.

    Raises:
        ConfigError: see `plan_run`; also when the output cannot be written, no source gives a clip, or the index
            refuses them all.
    """
    output = Path(config.output).absolute()
    work = Workspace(output / ".curation")
    sources, identity = plan_run(config)
    if is_finished(output):
        console.print(f"{output} is complete: nothing to do", highlight=False, soft_wrap=True)
        shutil.rmtree(work.root, ignore_errors=True)
        return read_summary(output)
    try:
        start_workspace(work, sources, identity)
    except OSError as error:
        raise ConfigError(f"output={config.output} cannot be written, {error.strerror}: give another") from error

    num_tasks = -(-len(sources) // SOURCES_PER_TASK)
    with quiet_logs(work.root / "log.txt") as terminal, progress_bar(work, len(sources), terminal):
        run_tasks(clip_pipeline(config, work), num_tasks, config.workers, work.tasks)

    counts = read_counts(work.tasks / "stats", STAGES)
    rejects = merge_rejects(work.ledgers, STAGES)
    check_counts(counts, len(sources), len(rejects))
    write_whole(output / REJECTS, "".join(line + "\n" for line in rejects))
    num_clips = counts[-1].num_out
    if num_clips == 0:
        raise ConfigError(f"input={config.input}: none of {len(sources)} sources gave a clip, see {output / REJECTS}")
    total_bytes = sum(part.stat().st_size for part in part_files(work.parts))
    shard_bytes = balanced_bytes(total_bytes, config.shard_mib << 20)
    shards: list[PipelineStep] = [ReadParts(work.parts), WriteShards(output, shard_bytes)]
    with quiet_logs(work.root / "log.txt"):
        run_tasks(shards, 1, 1, work.root / "shards")
    # The shards are written: a clip that the index refuses must not cost the others.
    manifest = write_index(output, allow_rejects=True)
    if manifest.num_samples + manifest.num_rejected != num_clips:
        found = f"{manifest.num_samples} and {manifest.num_rejected} rejected"
        raise RuntimeError(f"{num_clips} clips were made, {found} stand in the shards of {output}")
    counts = (*counts, StageCount("index", num_clips, 0, manifest.num_samples, manifest.num_rejected))
    summary = {**identity, "captioner": MODEL, "counts": [asdict(count) for count in counts]}
    write_whole(output / SUMMARY, json.dumps(summary, indent=1))
    shutil.rmtree(work.root)
    return counts


def clip_pipeline(config: CurationConfig, work: Workspace) -> list[PipelineStep]:
    """The steps of one task, from sources to a part."""
    folder = Path(config.input).absolute()
    return [
        Ingest(folder, work.sources, work.progress, SOURCES_PER_TASK),
        Probe(work.ledgers, folder, config.max_source_pixels),
        SplitScenes(work.ledgers, folder, config.scenes, config.max_source_pixels),
        FilterQuality(work.ledgers, config.filters),
        CaptionPixels(work.ledgers),
        WritePart(work.parts),
    ]


def run_tasks(steps: list[PipelineStep], tasks: int, workers: int, logs: Path) -> None:
    """Runs what is not complete yet, in this process or in `workers` others, which end with it on SIGTERM too."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        LocalPipelineExecutor(steps, tasks=tasks, workers=min(workers, tasks), logging_dir=str(logs)).run()
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(signal_number: int, frame: FrameType | None) -> None:
    # An exception, so that the pool ends its processes: left alone they would write on, into a run started again.
    raise SystemExit(128 + signal_number)


def plan_run(config: CurationConfig) -> tuple[list[str], dict[str, Any]]:
    """The sources, and what makes this run this run: settings and sources, not the number of workers.

    Raises:
        ConfigError: a setting out of bounds, no videos, or an output that holds something else.
    """
    folder, output = Path(config.input).absolute(), Path(config.output).absolute()
    if config.workers < 1:
        raise ConfigError(f"workers={config.workers}: give 1 or more")
    if config.limit < 0:
        raise ConfigError(f"limit={config.limit}: give a number of sources, or 0 for all")
    if config.shard_mib < 1:
        raise ConfigError(f"shard_mib={config.shard_mib}: give 1 or more")
    if config.scenes.min_scene_frames < 1:
        raise ConfigError(f"scenes.min_scene_frames={config.scenes.min_scene_frames}: give 1 or more")
    if config.scenes.max_clip_seconds <= 0:
        raise ConfigError(f"scenes.max_clip_seconds={config.scenes.max_clip_seconds}: give more than 0")
    if not 0 <= config.scenes.crf <= 51:
        raise ConfigError(f"scenes.crf={config.scenes.crf}: give 0 (lossless) to 51")
    if config.scenes.preset not in X264_PRESETS:
        raise ConfigError(f"scenes.preset={config.scenes.preset}: give one of {' '.join(X264_PRESETS)}")
    if not folder.is_dir():
        raise ConfigError(f"input={config.input} is not a folder: give a folder of videos or images")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"output={config.output} lies in input={config.input}: give a folder outside it")
    sources = list_sources(folder, config.limit)
    if not sources:
        suffixes = " ".join(VIDEO_NAMES + IMAGE_NAMES)
        raise ConfigError(f"input={config.input} holds no video or image ({suffixes}): give another folder")
    settings = {key: value for key, value in asdict(config).items() if key not in ("input", "output", "workers")}
    listing = "".join(f"{path}\0{(folder / path).lstat().st_size}\n" for path in sources)
    identity = {
        "pipeline_version": PIPELINE_VERSION,
        "settings": json.loads(json.dumps(settings, default=_enum_value)),
        "sources": len(sources),
        "sources_sha256": hashlib.sha256(os.fsencode(listing)).hexdigest(),
    }
    check_output(output, identity)
    return sources, identity


def _enum_value(value: object) -> object:
    assert isinstance(value, Enum)
    return value.value


def check_output(output: Path, identity: dict[str, Any]) -> None:
    """Raises ConfigError unless the folder is new, empty, or holds (the beginning of) this very run."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output} is a file: give a folder")
    found = read_identity(output)
    if found is None:
        if output.is_dir() and any(item.name != ".curation" for item in output.iterdir()):
            raise ConfigError(f"output={output} holds files that curation did not write: give a new folder")
        return
    differing = [key for key in identity if found.get(key) != identity[key]]
    if not differing:
        return
    before, now = found.get(differing[0]), identity[differing[0]]
    what = differing[0]
    if what == "settings" and isinstance(before, dict):
        what = next(key for key in now if before.get(key) != now[key])
        before, now = before.get(what), now[what]
    raise ConfigError(f"output={output} was made with {what}={before}, not {now}: give a new folder")


def read_identity(output: Path) -> dict[str, Any] | None:
    """Of the run that filled or is filling a folder."""
    for path in (output / SUMMARY, Workspace(output / ".curation").plan):
        if path.is_file():
            values: dict[str, Any] = json.loads(path.read_bytes())
            return values
    return None


def is_finished(output: Path) -> bool:
    """Whether the folder holds a complete run; `check_output` has ruled out any but this one."""
    return (output / SUMMARY).is_file()


def read_summary(output: Path) -> tuple[StageCount, ...]:
    """The counts of a finished run."""
    return tuple(StageCount(**count) for count in json.loads((output / SUMMARY).read_bytes())["counts"])


def start_workspace(work: Workspace, sources: list[str], identity: dict[str, Any]) -> None:
    """Makes the workspace, or leaves the one of an interrupted run; its identity comes last."""
    for folder in (work.ledgers, work.progress, work.parts, work.tasks):
        folder.mkdir(parents=True, exist_ok=True)
    if work.plan.is_file():
        return
    pairs = zip(source_keys(sources), sources, strict=True)
    write_whole(work.sources, "".join(json.dumps({"key": key, "path": path}) + "\n" for key, path in pairs))
    write_whole(work.plan, json.dumps(identity, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextmanager
def quiet_logs(log: Path) -> Iterator[Console]:
    """Sends standard error, also that of worker processes, to a file; gives a console on what it was before.

    datatrove's task loggers write to standard error and have no setting for it, and the codec libraries below Python
    write there too; the file keeps it all for whoever looks for a reason.
    """
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with log.open("ab") as file, os.fdopen(os.dup(before), "w") as terminal:
            os.dup2(file.fileno(), 2)
            yield Console(file=terminal)
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


@contextmanager
def progress_bar(work: Workspace, total: int, console: Console) -> Iterator[None]:
    """Shows how many sources are done, whichever process does them."""
    columns = (TextColumn("curating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    stop = threading.Event()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("sources", total=total)

        def watch() -> None:
            while not stop.wait(0.25):
                progress.update(bar, completed=num_done(work))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
            progress.update(bar, completed=num_done(work))


def num_done(work: Workspace) -> int:
    """Sources that are done, by the bytes their tasks left."""
    return sum(path.stat().st_size for path in work.progress.iterdir())


if __name__ == "__main__":
    main()
