"""Third stage: a source becomes clips, each of one scene.

The first pass decodes every frame once, finds the cuts with PySceneDetect's detectors and gathers a small view. A
source of a single scene is handed on byte for byte, if all its frames are shown. Otherwise a second pass decodes again
and encodes clip by clip, so that memory holds one clip however long the source is; cuts are at exact frames, which
copying packets cannot do.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import cv2
import numpy as np
from av.video.frame import VideoFrame
from scenedetect import FrameTimecode
from scenedetect.detector import SceneDetector
from scenedetect.detectors import AdaptiveDetector, ContentDetector

from data_pipelines.media import MediaError, decode, displayed_size, encode_mp4, open_stream, rotation, small_rgb
from data_pipelines.record import Frames, Record, Reject, View
from data_pipelines.stages.stage import Stage
from sora_train.config.curation import SceneConfig, SceneDetectorKind

DETECTOR_SIDE = 256  # the detectors' thresholds are made for pictures of about this width
VIEW_SIDE = 128
VIEW_FRAMES = 33  # a view holds between this many and twice as many, or every frame of a shorter clip
JPEG_QUALITY = 95


class ViewBuilder:
    """Keeps evenly spaced small frames of a stream of unknown length in bounded memory."""

    def __init__(self) -> None:
        self.every = 1
        self.count = 0
        self.frames: list[Frames] = []
        self.seconds: list[float] = []

    def add(self, frame: VideoFrame, shown: float) -> None:
        """Takes the next frame, shown at `shown` seconds."""
        if self.count % self.every == 0:
            self.frames.append(small_rgb(frame, VIEW_SIDE))
            self.seconds.append(shown)
            if len(self.frames) >= 2 * VIEW_FRAMES:
                self.frames, self.seconds = self.frames[::2], self.seconds[::2]
                self.every *= 2
        self.count += 1

    def build(self) -> View:
        """The view of what was added; at least one frame."""
        first = self.seconds[0]
        return View(np.stack(self.frames), tuple(shown - first for shown in self.seconds))


@dataclass(frozen=True)
class Scan:
    """What the first pass found."""

    seconds: tuple[float, ...]  # when each frame is shown
    cuts: tuple[int, ...]  # first frame of each scene but the first
    height: int  # as displayed
    width: int
    is_upright: bool
    view: View


def build_detector(config: SceneConfig) -> SceneDetector:
    """PySceneDetect's detector of hard cuts."""
    if config.detector is SceneDetectorKind.adaptive:
        return AdaptiveDetector(min_scene_len=config.min_scene_frames, min_content_val=config.threshold)
    return ContentDetector(threshold=config.threshold, min_scene_len=config.min_scene_frames)


def scan(frames: Iterator[VideoFrame], fps: float, config: SceneConfig) -> Scan:
    """Decodes everything once.

    Raises:
        MediaError: no frame decodes, or the picture changes its size on the way.
    """
    detector = build_detector(config)
    view = ViewBuilder()
    seconds: list[float] = []
    cuts: list[int] = []
    size: tuple[int, int] | None = None
    upright = True
    for index, frame in enumerate(frames):
        if size is None:
            size, upright = displayed_size(frame), rotation(frame) == 0
        elif displayed_size(frame) != size:
            raise MediaError(f"the picture changes its size at frame {index}")
        shown = frame.time if frame.time is not None else index / fps
        # Broken clocks (missing, standing still, running backwards) are replaced by the nominal rate.
        seconds.append(shown if not seconds or shown > seconds[-1] else seconds[-1] + 1 / fps)
        view.add(frame, seconds[-1])
        picture = np.ascontiguousarray(small_rgb(frame, DETECTOR_SIDE)[:, :, ::-1])
        cuts += [cut.frame_num for cut in detector.process_frame(FrameTimecode(index, fps), picture)]
    if size is None:
        raise MediaError("no frame decodes")
    cuts += [cut.frame_num for cut in detector.post_process(FrameTimecode(len(seconds) - 1, fps))]
    inside = sorted({cut for cut in cuts if 0 < cut < len(seconds)})
    return Scan(tuple(seconds), tuple(inside), *size, upright, view.build())


def clip_ranges(scan: Scan, fps: float, max_clip_seconds: float) -> list[tuple[int, int]]:
    """First and one-past-last frame of every clip: the scenes, long ones in equal parts."""
    ranges = []
    for start, end in pairwise((0, *scan.cuts, len(scan.seconds))):
        duration = scan.seconds[end - 1] - scan.seconds[start] + 1 / fps
        parts = min(end - start, max(1, math.ceil(duration / max_clip_seconds - 1e-6)))
        edges = [start + (end - start) * part // parts for part in range(parts + 1)]
        ranges += list(pairwise(edges))
    return ranges


class SplitScenes(Stage):
    """One source in, its clips out."""

    name = "split_scenes"

    def __init__(self, ledgers: Path, folder: Path, config: SceneConfig, max_pixels: int) -> None:
        super().__init__(ledgers)
        self.folder = folder
        self.config = config
        self.max_pixels = max_pixels

    def apply(self, record: Record) -> Iterator[Record | Reject]:
        """See Stage."""
        assert record.info is not None
        path, info = self.folder / record.path, record.info
        if info.is_image:
            yield self._image(record)
            return
        with open_stream(path, info.demuxer, self.max_pixels) as stream:
            found = scan(decode(stream), info.fps, self.config)
            stored_frames = stream.frames  # 0 when the container does not say
        # Edit lists and open ends cost a few frames; a truncated file loses its tail.
        if len(found.seconds) < info.expected_frames - max(2, info.expected_frames // 20):
            raise MediaError(f"truncated: {len(found.seconds)} of {info.expected_frames} frames decode")
        ranges = clip_ranges(found, info.fps, self.config.max_clip_seconds)
        # Frames that an edit list hides (a cut made by copying packets) are hidden by some decoders only.
        hides_frames = stored_frames not in (0, len(found.seconds))
        if len(ranges) == 1 and found.is_upright and info.medium and not hides_frames:
            clip = self._clip(record, found, 0, len(found.seconds))
            yield replace(clip, medium=info.medium, data=path.read_bytes(), view=found.view)
            return
        yield from self._encode(record, path, found, ranges)

    def _image(self, record: Record) -> Record:
        assert record.info is not None
        path, info = self.folder / record.path, record.info
        with open_stream(path, info.demuxer, self.max_pixels) as stream:
            frame = next(decode(stream), None)
            if frame is None:
                raise MediaError("no frame decodes")
            height, width = displayed_size(frame)
            view = View(small_rgb(frame, VIEW_SIDE)[None], (0.0,))
            medium, data = info.medium, path.read_bytes()
            if rotation(frame):
                # Decoders disagree on a picture's orientation tag: turn the pixels and drop the tag.
                upright = np.rot90(frame.to_ndarray(format="bgr24"), rotation(frame))
                medium, data = "jpg", encode_jpeg(np.ascontiguousarray(upright))
        return replace(record, num_frames=1, height=height, width=width, medium=medium, data=data, view=view)

    def _clip(self, record: Record, found: Scan, start: int, end: int) -> Record:
        assert record.info is not None
        first, last = found.seconds[start], found.seconds[end - 1]
        return replace(
            record,
            start_seconds=first,
            end_seconds=last + 1 / record.info.fps,
            num_frames=end - start,
            fps=record.info.fps,
            height=found.height,
            width=found.width,
        )

    def _encode(self, record: Record, path: Path, found: Scan, ranges: list[tuple[int, int]]) -> Iterator[Record]:
        assert record.info is not None
        fps = record.info.fps
        with open_stream(path, record.info.demuxer, self.max_pixels) as stream:
            frames = decode(stream)
            for number, (start, end) in enumerate(ranges):
                view = ViewBuilder()
                seconds = found.seconds[start:end]
                seen = _watch(islice(frames, end - start), seconds, view)
                data = encode_mp4(seen, seconds, fps, self.config.crf, self.config.preset)
                if view.count != end - start:
                    raise MediaError(f"the second decoding gave {view.count} of {end - start} frames")
                clip = self._clip(record, found, start, end)
                yield replace(
                    clip,
                    key=f"{record.key}/{number:04d}" if len(ranges) > 1 else record.key,
                    height=found.height // 2 * 2,
                    width=found.width // 2 * 2,
                    medium="mp4",
                    data=data,
                    view=view.build(),
                )


def _watch(frames: Iterator[VideoFrame], seconds: tuple[float, ...], view: ViewBuilder) -> Iterator[VideoFrame]:
    for frame, shown in zip(frames, seconds, strict=False):
        view.add(frame, shown)
        yield frame


def encode_jpeg(picture_bgr: Frames) -> bytes:
    """A JPEG of uint8 [h, w, 3]."""
    is_written, data = cv2.imencode(".jpg", picture_bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert is_written
    return data.tobytes()
