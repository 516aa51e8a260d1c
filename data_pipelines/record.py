"""The one record that flows through curation: first a source file, after split_scenes one clip of it, at the end a
sample of a shard. Stages return changed copies; a stage that drops a record says why with a Reject."""

import json
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sora_train.data.schema import Caption, ClipRecord, Source

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Reject:
    """Why a record left the pipeline."""

    key: str
    path: str
    stage: str
    reason: str

    def to_json(self) -> str:
        """A line of rejects.jsonl."""
        values = {"key": self.key, "path": self.path, "stage": self.stage, "reason": self.reason}
        return json.dumps(values, ensure_ascii=False)


@dataclass(frozen=True)
class SourceInfo:
    """What a file's header says, before anything is decoded."""

    sha256: str
    demuxer: str  # the container, always forced when the file is opened
    medium: str  # suffix under which its bytes may enter a shard; empty when they may not
    is_image: bool
    fps: float  # 0 for an image
    expected_frames: int  # 0 when the container does not say


@dataclass(frozen=True)
class View:
    """Small upright pictures of a clip, evenly spaced in time: what filters and captioner look at."""

    frames: Frames  # [T, h, w, 3] RGB
    seconds: tuple[float, ...]  # of each, from the start of the clip


@dataclass(frozen=True)
class Record:
    """A source, then a clip. Fields are filled from top to bottom, by the stage named beside them."""

    key: str  # ingest: unique, [A-Za-z0-9_/-]+
    path: str  # relative to the input folder
    original_caption: str
    info: SourceInfo | None = None  # probe
    start_seconds: float = 0.0  # split_scenes, down to view
    end_seconds: float = 0.0
    num_frames: int = 0
    fps: float = 0.0  # 0 for an image
    height: int = 0  # as displayed
    width: int = 0
    medium: str = ""
    data: bytes = field(default=b"", repr=False)
    view: View | None = field(default=None, repr=False)
    scores: dict[str, float] = field(default_factory=dict)  # filter_quality
    captions: tuple[Caption, ...] = ()  # caption

    def to_clip_record(self) -> ClipRecord:
        """KEY.json of a finished clip."""
        assert self.info is not None
        return ClipRecord(
            captions=self.captions,
            num_frames=self.num_frames,
            fps=self.fps,
            height=self.height,
            width=self.width,
            duration_seconds=round(self.end_seconds - self.start_seconds, 6),
            source=Source(self.info.sha256, round(self.start_seconds, 6), round(self.end_seconds, 6)),
            scores=self.scores,
        )
