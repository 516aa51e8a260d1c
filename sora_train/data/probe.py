"""What a medium holds, told from its container: how the index learns it and how the decoder checks it again.

A medium is hostile until it has been decoded. Its container format is forced by its suffix, so that no playlist or
script is ever followed; no protocol is open; and no decoder may allocate a frame larger than the caller allows.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import av
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from sora_train.data.schema import IMAGE_SUFFIXES

CONTAINERS = {
    "mp4": "mp4",
    "mov": "mp4",
    "mkv": "matroska",
    "webm": "matroska",
    "jpg": "jpeg_pipe",
    "jpeg": "jpeg_pipe",
    "png": "png_pipe",
    "webp": "webp_pipe",
}
# One frame of 8192x8192: more than any camera films, and 200 MB as RGB.
MAX_PIXELS = 2**26
# Codecs of which a packet with a time of its own is one frame. Others may pack two (MPEG-4) or none into one.
FRAME_PER_PACKET = frozenset({"h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "mjpeg", "prores", "dnxhd", "ffv1"})
# What libav raises through PyAV, and what its properties raise on absurd headers (rates of 1/0, sizes over 2^31).
MEDIA_ERRORS = (FFmpegError, OSError, ValueError, ArithmeticError, MemoryError, EOFError)
# Seconds by which Matroska's duration may be off: its writers differ in whether the last frame's is part of it.
DURATION_TOLERANCE = 0.5


class DecodeError(Exception):
    """A medium that cannot be trained on. `reason` is one word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["DecodeError"], tuple[str, str]]:
        return DecodeError, (self.reason, self.detail)  # it is sent between processes


@dataclass(frozen=True)
class MediaFacts:
    """What an IndexRow says of a medium."""

    num_frames: int
    fps: float  # 0 for an image; the mean where the rate varies
    height: int  # as displayed: upright, and with square pixels
    width: int
    rotation: int  # clockwise degrees that turn coded frames into displayed ones
    duration_seconds: float  # 0 for an image
    is_variable_rate: bool


@dataclass(frozen=True)
class Timeline:
    """The packets of a stream in coded order, and when its frames are shown."""

    packets: list[Packet]
    # Of every frame that is shown, ascending, in the stream's time base. None where only decoding tells (hidden or
    # packed frames, times that are missing or repeat).
    times: list[int] | None
    end_seconds: float  # when the last packet of any stream, sound too, has been played


@contextmanager
def open_video(data: bytes, suffix: str, max_pixels: int) -> Iterator[VideoStream]:
    """The video stream of a medium, its decoder not yet opened; closed on leaving.

    libav's errors become DecodeErrors while it is open, too.

    Raises:
        DecodeError: `decode` (not readable as what its suffix says), `no_video`, `too_large` (a frame of more than
            max_pixels is declared).
    """
    options = {"protocol_whitelist": "none", "max_pixels": str(max_pixels)}
    try:
        with av.open(
            io.BytesIO(data), "r", format=CONTAINERS[suffix], options=options, metadata_errors="replace"
        ) as container:
            yield _video_stream(container, max_pixels)
    except ArgumentError as error:
        # How a decoder answers to a frame over max_pixels that the container's header does not tell of.
        raise DecodeError("too_large", f"a frame of more than {max_pixels} pixels is declared") from error
    except MEDIA_ERRORS as error:
        raise DecodeError("decode", _one_line(error)) from error


def _video_stream(container: InputContainer, max_pixels: int) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise DecodeError("no_video", f"{len(container.streams)} streams, none of them video")
    stream, codec = streams[0], streams[0].codec_context
    if codec is None:
        raise DecodeError("decode", "no decoder for its codec")
    if codec.width * codec.height > max_pixels:
        raise DecodeError("too_large", f"{codec.width}x{codec.height} is declared, at most {max_pixels} pixels fit")
    # Broken slices are errors instead of being patched over with the neighbours' pixels.
    codec.options = {"max_pixels": str(max_pixels), "err_detect": "explode"}
    codec.thread_count = 1
    return stream


def read_timeline(stream: VideoStream) -> Timeline:
    """Reads all packets of a stream; decodes nothing.

    Raises:
        DecodeError: `zero_frames`.
    """
    assert isinstance(stream.container, InputContainer)
    packets: list[Packet] = []
    end_seconds = 0.0
    for packet in stream.container.demux():
        if packet.pts is not None:
            end_seconds = max(end_seconds, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        # A cut file ends in half a packet; an empty one would tell the decoder that the stream ends.
        if packet.stream_index == stream.index and packet.size and not packet.is_corrupt:
            packets.append(packet)
    if not packets:
        raise DecodeError("zero_frames", "a video stream without frames")
    times = [p.pts for p in packets if p.pts is not None]
    first_key = next((p.pts for p in packets if p.is_keyframe), None)
    if (
        stream.codec_context.name not in FRAME_PER_PACKET
        or first_key is None
        or len(times) < len(packets)
        or len(set(times)) < len(times)
    ):
        return Timeline(packets, None, end_seconds)
    # Edit lists hide the start of many cut files. What precedes the first keyframe refers to frames that were cut off.
    hides = stream.codec_context.name == "vp8"
    shown = sorted(
        p.pts
        for p in packets
        if p.pts is not None and p.pts >= first_key and not p.is_discard and not (hides and is_hidden(p))
    )
    return Timeline(packets, shown, end_seconds)


def decode_from(
    stream: VideoStream, packets: Sequence[Packet], progress: Callable[[], None] = lambda: None
) -> Iterator[VideoFrame]:
    """The frames of some packets, in the order they are shown; `progress` is called after each.

    Raises:
        DecodeError: `decode`, at the first frame that is damaged.
    """
    for packet in (*packets, None):
        for frame in stream.codec_context.decode(packet):
            progress()
            if frame.is_corrupt:
                raise DecodeError("decode", f"the frame at {frame.pts} is damaged")
            yield frame


def is_hidden(packet: Packet) -> bool:
    """Whether a VP8 frame is only referred to: its show_frame bit (RFC 6386, 9.1) is 0."""
    return not bytes(packet)[0] & 0x10


def rotation(frame: VideoFrame) -> int:
    """Clockwise degrees that bring a frame upright: 0, 90, 180 or 270. Mirroring is not looked at."""
    return round(-frame.rotation / 90) % 4 * 90


def displayed_size(stream: VideoStream, height: int, width: int, rotation: int) -> tuple[int, int]:
    """Height and width of frames of a stream once they are upright and their pixels square.

    Pixels that are not square keep their height: the width is what changes, as in players.
    """
    width = max(1, round(width * (stream.sample_aspect_ratio or 1)))
    return (width, height) if rotation % 180 else (height, width)


def probe_media(data: bytes, suffix: str) -> MediaFacts:
    """Facts of a medium, from its packets and its first frame.

    Codecs that hide frames (see FRAME_PER_PACKET) and files whose times are unusable are decoded to be counted.

    Raises:
        DecodeError: `decode`, `no_video`, `zero_frames`, `too_large`, or `frame_count` (the file is shorter than its
            header says: truncated).
    """
    with open_video(data, suffix, MAX_PIXELS) as stream:
        timeline = read_timeline(stream)
        if suffix in IMAGE_SUFFIXES:
            return _facts(stream, next(decode_from(stream, timeline.packets), None), [0], is_image=True)
        _check_complete(stream, timeline, suffix)
        if timeline.times is None:
            return _count(stream, timeline)
        frames = decode_from(stream, timeline.packets)
        first = next((frame for frame in frames if frame.pts in timeline.times[:1]), None)
        return _facts(stream, first, timeline.times)


def _count(stream: VideoStream, timeline: Timeline) -> MediaFacts:
    first, times = None, []
    for index, frame in enumerate(decode_from(stream, timeline.packets)):
        first = first or frame
        times.append(frame.pts if frame.pts is not None else index)
    return _facts(stream, first, times)


def _facts(stream: VideoStream, first: VideoFrame | None, times: list[int], is_image: bool = False) -> MediaFacts:
    if first is None:
        raise DecodeError("decode", "its first frame does not decode")
    turn = rotation(first)
    height, width = displayed_size(stream, first.height, first.width, turn)
    if is_image:
        return MediaFacts(1, 0.0, height, width, turn, 0.0, False)
    fps, is_variable = _rate(stream, times)
    return MediaFacts(len(times), fps, height, width, turn, len(times) / fps if fps else 0.0, is_variable)


def _rate(stream: VideoStream, times: list[int]) -> tuple[float, bool]:
    """Frames per second, and whether they are uneven: some frame is off by a quarter of a frame."""
    declared = float(stream.average_rate or stream.guessed_rate or 0)
    spans, tick = len(times) - 1, float(stream.time_base or 0)
    seconds = (times[-1] - times[0]) * tick
    if spans < 1 or seconds <= 0:
        return declared, False
    # Times are rounded to ticks (milliseconds in Matroska): the declared rate is the better number where it fits.
    fits = declared > 0 and abs(spans / declared - seconds) <= tick
    interval = (1 / declared if fits else seconds / spans) / tick
    late = max(abs(time - times[0] - i * interval) for i, time in enumerate(times))
    return (declared if fits else spans / seconds), late > 1 + interval / 4


def _check_complete(stream: VideoStream, timeline: Timeline, suffix: str) -> None:
    # A truncated file reads as a shorter one: nothing fails, and only its own table of contents tells.
    assert isinstance(stream.container, InputContainer)
    if CONTAINERS[suffix] == "mp4":
        declared, found = sum(entry.size > 0 for entry in stream.index_entries), len(timeline.packets)
        if found < declared:
            raise DecodeError("frame_count", f"{found} of {declared} frames are in the file: truncated")
    else:
        seconds = (stream.container.duration or 0) / av.time_base
        if seconds - timeline.end_seconds > DURATION_TOLERANCE:
            raise DecodeError("frame_count", f"ends after {timeline.end_seconds:.2f} of {seconds:.2f} s: truncated")


def _one_line(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__).splitlines()[0]
