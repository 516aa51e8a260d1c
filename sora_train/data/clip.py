"""From the bytes of a medium to the frames that are trained on. Called in the loader's child processes.

libav, through PyAV, decodes everything: measured beside decord it is faster, never died, and says what is damaged.
Frames are known by their times, not by counting: a frame that is missing moves no other into its place.
decord decodes where it is asked for and can: upright videos of constant rate, whose frames it counts.
"""

import io
import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from sora_train.config.data import Decoder
from sora_train.data.probe import (
    MAX_PIXELS,
    DecodeError,
    decode_from,
    displayed_size,
    open_video,
    read_timeline,
    rotation,
)
from sora_train.data.schema import IMAGE_SUFFIXES, IndexRow
from sora_train.data.size import ClipSize

__all__ = ["DecodeError", "Frames", "decode_clip"]

Frames = NDArray[np.uint8]

# Decoders pad frames to whole blocks, of at most this many pixels.
BLOCK = 128
# Coded pixels may be narrower than they are shown by this factor.
MAX_PIXEL_ASPECT = 4


def decode_clip(
    data: bytes,
    row: IndexRow,
    size: ClipSize,
    progress: Callable[[], None] = lambda: None,
    out: Frames | None = None,
    decoder: Decoder = Decoder.libav,
) -> Frames:
    """The frames of a clip under the size rule: uint8 [T, H, W, 3], RGB of full range, upright.

    Range and matrix of the file's colors are honoured; colors without a matrix are read as BT.601, as all of libav
    does. High dynamic range is cut to 8 bits without tone mapping. Of 81 frames of 4k, one at a time is held in full.

    Args:
        data: the bytes of the medium.
        row: what the index says of it: the file must agree.
        size: which frames, at which size.
        progress: called after each decoded frame, so that a watcher can tell work from a hang.
        out: where the frames go, [T, H, W, 3]: memory shared with another process, say. A new array without it.
        decoder: what decodes, where it can.

    Raises:
        DecodeError: `decode` (not readable, or damaged where it is needed), `no_video`, `zero_frames`, `frame_count`
            (fewer or more than the index says, as in a truncated file), `frame_size` (other than the index says),
            `too_large` (a declared frame far larger than the index says: refused before memory is taken for it).
    """
    if row.height * row.width > MAX_PIXELS:
        raise DecodeError("too_large", f"{row.height}x{row.width}, at most {MAX_PIXELS} pixels fit")
    converter = VideoReformatter()
    clip = np.empty((size.num_frames, size.height, size.width, 3), dtype=np.uint8) if out is None else out
    filled = 0
    with open_video(data, row.medium, MAX_PIXEL_ASPECT * (row.height + BLOCK) * (row.width + BLOCK)) as stream:
        timeline = read_timeline(stream)
        if row.medium in IMAGE_SUFFIXES or timeline.times is None:
            taken = _by_order(stream, timeline.packets, row, size, progress)
        else:
            taken = _by_time(stream, timeline.packets, timeline.times, row, size, progress)
            if decoder is Decoder.decord and not row.is_variable_rate and row.rotation == 0:
                taken = _by_decord(data, row, size, progress, taken)
        for frame, repeats in taken:
            pixels = frame if isinstance(frame, np.ndarray) else _rgb(frame, converter, stream, row)
            clip[filled : filled + repeats] = _fit(pixels, row.rotation, size)
            filled += repeats
    if filled != size.num_frames:
        raise DecodeError("frame_count", f"{filled} of {size.num_frames} frames were found")
    return clip


def _by_order(
    stream: VideoStream,
    packets: list[Packet],
    row: IndexRow,
    size: ClipSize,
    progress: Callable[[], None],
) -> Iterator[tuple[VideoFrame | Frames, int]]:
    """The frames of the clip, once each, of a medium that has to be decoded to be counted."""
    wanted, count = set(size.frame_indices), 0
    for count, frame in enumerate(decode_from(stream, packets, progress), 1):
        if count - 1 in wanted:
            yield frame, 1
        if row.medium in IMAGE_SUFFIXES:
            break
    if count != row.num_frames:
        raise DecodeError("frame_count", f"{count} frames, the index says {row.num_frames}")


def _by_time(
    stream: VideoStream,
    packets: list[Packet],
    times: list[int],
    row: IndexRow,
    size: ClipSize,
    progress: Callable[[], None],
) -> Iterator[tuple[VideoFrame | Frames, int]]:
    """The frames of the clip, and how often each is in it."""
    if len(times) != row.num_frames:
        raise DecodeError("frame_count", f"{len(times)} frames, the index says {row.num_frames}")
    wanted = [times[i] for i in (_nearest(times, stream, row, size) if row.is_variable_rate else size.frame_indices)]
    missing = deque(Counter(wanted).items())
    before = -math.inf
    for frame in _from_time(stream, packets, wanted[0], progress):
        if frame.pts is None or frame.pts <= before or frame.pts > missing[0][0]:
            raise DecodeError("decode", f"the frame at {missing[0][0]} is missing: after {before} comes {frame.pts}")
        before = frame.pts
        if frame.pts == missing[0][0]:
            yield frame, missing.popleft()[1]
            if not missing:
                return


def _by_decord(
    data: bytes,
    row: IndexRow,
    size: ClipSize,
    progress: Callable[[], None],
    otherwise: Iterator[tuple[VideoFrame | Frames, int]],
) -> Iterator[tuple[VideoFrame | Frames, int]]:
    """The frames of the clip, once each, counted from the start and read forward: cheaper than decord's `get_batch`.

    `otherwise` gives the frames of a clip that decord cannot show: it knows no pixel aspect, and at some widths (8, 16,
    32, 48, 96, 144, …) it takes the padding of lines for channels.
    """
    # Imported here: it opens a log of its own, and few ask for it.
    import decord

    try:
        reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != row.num_frames:
            raise DecodeError("frame_count", f"{len(reader)} frames, the index says {row.num_frames}")
        position = 0
        for index in size.frame_indices:
            if index > position:
                reader.skip_frames(index - position)
            pixels: Frames = reader.next().asnumpy()
            position = index + 1
            progress()
            if pixels.shape != (row.height, row.width, 3):
                yield from otherwise
                return
            yield pixels, 1
    # decord raises RuntimeError for what it cannot open, and StopIteration where frames end early.
    except (decord.DECORDError, RuntimeError, StopIteration) as error:
        raise DecodeError("decode", f"decord: {error}") from error


def _nearest(times: list[int], stream: VideoStream, row: IndexRow, size: ClipSize) -> list[int]:
    """The frames nearest to the times of a clip of variable rate, whose plan counts in mean frames."""
    tick = float(stream.time_base or 0)
    indices = []
    for i in range(size.num_frames):
        target = times[0] + (size.first_frame + i * size.frame_step) / row.fps / tick
        after = min(bisect_left(times, target), len(times) - 1)
        before = max(after - 1, 0)
        indices.append(after if times[after] - target < target - times[before] else before)
    return indices


def _from_time(
    stream: VideoStream, packets: list[Packet], first: int, progress: Callable[[], None]
) -> Iterator[VideoFrame]:
    """Frames from the one shown at `first` on, decoded from the keyframe before it.

    Where that keyframe does not lead there (it may need what precedes it, as with a gradual refresh), from the start.
    """
    keys = [i for i, p in enumerate(packets) if p.is_keyframe and p.pts is not None and p.pts <= first]
    for start in dict.fromkeys((keys[-1], 0)):
        try:
            frames = decode_from(stream, packets[start:], progress)
            reached = next((f for f in frames if f.pts is not None and f.pts >= first), None)
        except (DecodeError, FFmpegError):
            if start == 0:
                raise
            reached = None
        if reached is not None and (reached.pts == first or start == 0):
            return chain([reached], frames)
        stream.codec_context.flush_buffers()
    return iter(())


def _rgb(frame: VideoFrame, converter: VideoReformatter, stream: VideoStream, row: IndexRow) -> Frames:
    """A frame as it is coded, in RGB: [H, W, 3]."""
    turn = rotation(frame)
    height, width = displayed_size(stream, frame.height, frame.width, turn)
    if (height, width, turn) != (row.height, row.width, row.rotation):
        said = f"{row.height}x{row.width} turned by {row.rotation}"
        raise DecodeError("frame_size", f"{height}x{width} turned by {turn}, the index says {said}")
    # Matrix and range are the frame's. One thread: children are many. The plane is read in place, its lines padded.
    picture = converter.reformat(frame, format="rgb24", threads=1)
    plane: Any = picture.planes[0]  # a buffer, of which PyAV's annotations do not speak
    lines = np.frombuffer(plane, dtype=np.uint8).reshape(frame.height, -1)
    return lines[:, : frame.width * 3].reshape(frame.height, frame.width, 3)


def _fit(pixels: Frames, turn: int, size: ClipSize) -> Frames:
    """A frame scaled with antialiasing, upright, its middle: [H, W, 3]."""
    scaled = (size.scaled_height, size.scaled_width)
    coded = scaled[::-1] if turn % 180 else scaled
    if pixels.shape[:2] != coded:
        pixels = _resize(pixels, *coded)
    top, left = (size.scaled_height - size.height) // 2, (size.scaled_width - size.width) // 2
    return np.rot90(pixels, -turn // 90)[top : top + size.height, left : left + size.width]


def _resize(pixels: Frames, height: int, width: int) -> Frames:
    # Imported here: it takes seconds, and the many children that scale nothing start without it.
    import torch
    from torch.nn import functional as F

    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    # Lines first: the costlier of the two passes then runs along memory. Bytes, channels last: torch's vector code.
    for target in ((height, pixels.shape[1]), (height, width)):
        planes = F.interpolate(planes, target, mode="bicubic", antialias=True, align_corners=False)
    return planes[0].permute(1, 2, 0).numpy()
