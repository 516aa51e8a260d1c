"""Second stage: is it a media file at all, of which container, and what does its header claim? Decodes nothing."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

from av.video.stream import VideoStream

from data_pipelines.media import MediaError, open_stream, reason, sniff
from data_pipelines.record import Record, SourceInfo
from data_pipelines.stages.stage import Filter

MAX_FPS = 1000.0


class Probe(Filter):
    """Fills `info`, or rejects what is no picture or video."""

    name = "probe"

    def __init__(self, ledgers: Path, folder: Path, max_pixels: int) -> None:
        super().__init__(ledgers)
        self.folder = folder
        self.max_pixels = max_pixels

    def judge(self, record: Record) -> tuple[Record | None, str]:
        """See Filter."""
        path = self.folder / record.path
        if path.exists() and not path.is_file():
            return None, "not a regular file"  # a pipe would be waited on for ever
        try:
            sha256, head = hash_file(path)
        except OSError as error:
            return None, f"cannot be read: {reason(error)}"
        if not head:
            return None, "empty file"
        container = sniff(head)
        if container is None:
            return None, "not a known video or image container"
        with open_stream(path, container.demuxer, self.max_pixels) as stream:
            fps = 0.0 if container.is_image else frame_rate(stream)
            expected = 1 if container.is_image else expected_frames(stream, fps)
        info = SourceInfo(sha256, container.demuxer, container.medium, container.is_image, fps, expected)
        return replace(record, info=info), ""


def hash_file(path: Path) -> tuple[str, bytes]:
    """SHA-256 of a file and its first bytes."""
    digest = hashlib.sha256()
    head = b""
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            head = head or piece[:512]
            digest.update(piece)
    return digest.hexdigest(), head


def frame_rate(stream: VideoStream) -> float:
    """Mean frames a second.

    Raises:
        MediaError: the container gives none that is usable.
    """
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate and math.isfinite(rate) and 0 < rate <= MAX_FPS:
            return float(rate)
    raise MediaError("no usable frame rate")


def expected_frames(stream: VideoStream, fps: float) -> int:
    """How many frames the header promises, the least of what it says; 0 when it says nothing."""
    promised = []
    if stream.frames > 0:
        promised.append(stream.frames)
    if stream.duration and stream.time_base:
        promised.append(round(float(stream.duration * stream.time_base) * fps))
    return max(0, min(promised, default=0))
