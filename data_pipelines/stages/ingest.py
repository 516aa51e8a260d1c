"""First stage: which files are sources, what they are called, and the caption that came with them."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import cv2
from datatrove.pipeline.base import PipelineStep

from data_pipelines.record import Record

VIDEO_NAMES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".flv", ".mpg", ".mpeg", ".ts", ".m2ts", ".3gp")
IMAGE_NAMES = (".jpg", ".jpeg", ".png", ".webp")
MAX_KEY = 80  # a tar name holds 100 characters; clip number and suffix need some
MAX_CAPTION_BYTES = 4096


def list_sources(folder: Path, limit: int = 0) -> list[str]:
    """Paths relative to `folder` of every video and image in it, in order; hidden files are left out."""
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(VIDEO_NAMES + IMAGE_NAMES) and not name.startswith("."):
                found.append((Path(parent) / name).relative_to(folder).as_posix())
    found.sort(key=os.fsencode)
    return found[:limit] if limit else found


def source_keys(paths: list[str]) -> list[str]:
    """A unique key for each path: readable, and with a hash of the path where two would be the same or too long."""
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(path)[0]).strip("_") for path in paths]
    # Compared without case: keys may become file names on a disk that ignores it.
    times = Counter(key.lower() for key in plain)
    return [
        key if times[key.lower()] == 1 and 0 < len(key) <= MAX_KEY else _hashed(key, path)
        for key, path in zip(plain, paths, strict=True)
    ]


def _hashed(key: str, path: str) -> str:
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:10]
    return f"{key[: MAX_KEY - 11]}-{digest}"


def original_caption(path: Path) -> str:
    """The text of NAME.txt beside the file, else the file's name with separators turned to spaces."""
    beside = path.with_suffix(".txt")
    text = ""
    if beside.is_file():
        with beside.open("rb") as file:
            text = file.read(MAX_CAPTION_BYTES).decode("utf-8", errors="replace")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text or " ".join(re.split(r"[\s._-]+", path.stem)).strip()


class Ingest(PipelineStep):
    """Yields the sources of one task. Each task takes the next `sources_per_task` lines of the plan."""

    name = "ingest"
    type = "curation"

    def __init__(self, folder: Path, plan: Path, progress: Path, sources_per_task: int) -> None:
        """
        Args:
            folder: the input.
            plan: JSON lines of {"key", "path"}, one a source.
            progress: folder where each task leaves one byte for each source it is done with.
            sources_per_task: fixed, so that what a task does never depends on the number of workers.
        """
        super().__init__()
        self.folder = folder
        self.plan = plan
        self.progress = progress
        self.sources_per_task = sources_per_task

    def run(self, data: Iterable[Record] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Record]:
        """The generator that datatrove starts from."""
        cv2.setNumThreads(1)  # a worker is one core
        first = rank * self.sources_per_task
        with self.plan.open(encoding="utf-8") as plan, (self.progress / f"{rank:06d}").open("wb", 0) as done:
            for line in islice(plan, first, first + self.sources_per_task):
                source = json.loads(line)
                self.stat_update("in", "out")
                yield Record(source["key"], source["path"], original_caption(self.folder / source["path"]))
                done.write(b".")
