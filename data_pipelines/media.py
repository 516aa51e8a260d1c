"""Every contact of curation with libav: files are opened, decoded and encoded here and nowhere else.

A media file is hostile until it has been decoded. The container is told from the first bytes and then forced, so that
a playlist or a concat script never runs, and only the `file` protocol is open, so that nothing in a file can reach the
network. One thread decodes and encodes: clips are small, workers are many, and x264 is then reproducible. Frames leave
here with square pixels, as the index (sora_train.data.probe) counts them: no stage needs to know of other shapes.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.container
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation
from av.video.stream import VideoStream

from data_pipelines.record import Frames
from sora_train.data import probe

# What libav, through PyAV, raises on damaged files. Anything else is an error of ours and stops the run.
DECODE_ERRORS = (av.FFmpegError, OSError, ValueError, OverflowError, MemoryError, EOFError)
X264_PRESETS = (
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo",
)  # fmt: skip
# Of a container's clock; divides every usual frame rate.
_TIME_BASE = Fraction(1, 90000)
# Pixels narrower or wider than this are no camera's; the loader refuses narrower ones too.
MAX_PIXEL_ASPECT = 4
_RGB_SPACE, _UNSPECIFIED_SPACE = 0, 2  # of libav's AVColorSpace


class MediaError(ValueError):
    """A file that cannot be used; the message is the reason written to the ledger."""


@dataclass(frozen=True)
class Container:
    """A container format: libav's demuxer, and the suffix of its bytes in a shard ("" when shards do not hold it)."""

    demuxer: str
    medium: str
    is_image: bool = False


def sniff(head: bytes) -> Container | None:
    """The container of a file that starts with `head` (at least 512 bytes of it), or None."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return Container("mov", "mov" if head[4:12] != b"ftyp" + head[8:12] or head[8:12] == b"qt  " else "mp4")
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return Container("matroska", "webm" if b"webm" in head[:64] else "mkv")
    if head.startswith(b"\xff\xd8\xff"):
        return Container("jpeg_pipe", "jpg", is_image=True)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return Container("png_pipe", "png", is_image=True)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Container("webp_pipe", "webp", is_image=True)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return Container("avi", "")
    if head.startswith((b"GIF87a", b"GIF89a")):
        return Container("gif", "")
    if head.startswith(b"FLV\x01"):
        return Container("flv", "")
    if head.startswith(b"\x00\x00\x01\xba"):
        return Container("mpeg", "")
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return Container("mpegts", "")
    return None


@contextmanager
def open_stream(path: Path, demuxer: str, max_pixels: int) -> Iterator[VideoStream]:
    """Opens the first video stream of a file; closed on leaving.

    Raises:
        MediaError: the file does not open as `demuxer`, has no video, claims more than `max_pixels` a frame (as coded
            or as displayed), or pixels of more than MAX_PIXEL_ASPECT.
    """
    options = {"protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{path.absolute()}", format=demuxer, options=options, metadata_errors="replace")
    except DECODE_ERRORS as error:
        raise MediaError(f"does not open as {demuxer}: {reason(error)}") from error
    with container:
        if not container.streams.video:
            raise MediaError("no video stream")
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None:
            raise MediaError("no decoder for its video stream")
        if codec.width * codec.height > max_pixels:
            raise MediaError(f"{codec.width}x{codec.height} is over max_source_pixels={max_pixels}")
        aspect = stream.sample_aspect_ratio or 1
        if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
            raise MediaError(f"pixels too far from square: their aspect is {aspect}, over {MAX_PIXEL_ASPECT} to 1")
        height, width = probe.displayed_size(stream, codec.height, codec.width, 0)
        if height * width > max_pixels:
            raise MediaError(f"{width}x{height} as displayed is over max_source_pixels={max_pixels}")
        codec.options = {"max_pixels": str(max_pixels)}
        codec.thread_count = 1
        yield stream


def decode(stream: VideoStream) -> Iterator[VideoFrame]:
    """Frames in display order, not yet upright, their pixels square: scaled in width where they are coded otherwise.

    Raises:
        MediaError: at the first packet that does not decode, or frame that libav patched over.
    """
    container = stream.container
    assert isinstance(container, av.container.InputContainer)
    frames = container.decode(stream)
    count = 0
    while True:
        try:
            frame = next(frames, None)
            squared = frame and _square(frame, stream)
        except DECODE_ERRORS as error:
            raise MediaError(f"does not decode after frame {count}: {reason(error)}") from error
        if frame is None or squared is None:
            return
        if frame.is_corrupt:
            raise MediaError(f"frame {count} is damaged")
        yield squared
        count += 1


def _square(frame: VideoFrame, stream: VideoStream) -> VideoFrame:
    _, width = probe.displayed_size(stream, frame.height, frame.width, 0)
    if width == frame.width:
        return frame
    return frame.reformat(
        width,
        format="rgb24" if frame.format.has_palette else None,  # libswscale reads palettes and writes none
        interpolation=Interpolation.BICUBIC,
        src_color_range=frame.color_range,
        dst_color_range=frame.color_range,
    )


def rotation(frame: VideoFrame) -> int:
    """Quarter turns counter-clockwise that bring the frame upright."""
    return round(frame.rotation / 90) % 4


def displayed_size(frame: VideoFrame) -> tuple[int, int]:
    """Height and width as displayed, of a frame whose pixels are square (see `decode`)."""
    return (frame.width, frame.height) if rotation(frame) % 2 else (frame.height, frame.width)


def small_rgb(frame: VideoFrame, max_side: int) -> Frames:
    """The frame upright, scaled down (area average) to at most `max_side`: uint8 [h, w, 3]."""
    scale = min(1.0, max_side / max(frame.height, frame.width))
    height, width = max(1, round(frame.height * scale)), max(1, round(frame.width * scale))
    picture = frame.reformat(width, height, "rgb24", interpolation=Interpolation.AREA).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, rotation(frame)))


def encode_mp4(frames: Iterable[VideoFrame], seconds: Iterable[float], fps: float, crf: int, preset: str) -> bytes:
    """H.264 of the frames as they are (timing and colors kept, turned upright, odd sizes cropped by one), in mp4.

    Args:
        frames: decoded frames, consumed one at a time.
        seconds: when each is shown; the first becomes 0.
        fps: nominal rate, written in the header.
    """
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as output:
        stream: VideoStream | None = None
        previous, first = -1, 0.0
        for frame, shown in zip(frames, seconds, strict=False):
            picture = _even_upright(frame)
            if stream is None:
                first = shown
                stream = output.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
                # With its macroblock tree, x264 gives other bytes from run to run on flat drawn clips.
                stream.options = {"crf": str(crf), "preset": preset, "x264-params": "mbtree=0"}
                stream.codec_context.time_base = _TIME_BASE
                stream.codec_context.thread_count = 1
                stream.codec_context.colorspace = _yuv_space(frame)
                stream.codec_context.color_range = ColorRange.MPEG
                stream.codec_context.color_primaries = frame.color_primaries
                stream.codec_context.color_trc = frame.color_trc
            # A clock that stands still or runs backwards is not encodable: push the frame behind its predecessor.
            previous = max(previous + 1, round((shown - first) / _TIME_BASE))
            picture.pts, picture.time_base = previous, _TIME_BASE
            output.mux(stream.encode(picture))
        if stream is not None:
            output.mux(stream.encode(None))
    return sink.getvalue()


def _even_upright(frame: VideoFrame) -> VideoFrame:
    # libswscale is told matrix and range: left alone it writes full range as if it were limited, and any matrix as 601.
    space = _yuv_space(frame)
    height, width = displayed_size(frame)
    if rotation(frame) == 0 and height % 2 == 0 and width % 2 == 0:
        return frame.reformat(
            format="yuv420p",
            dst_colorspace=space,
            src_color_range=frame.color_range,
            dst_color_range=ColorRange.MPEG,
        )
    picture: Frames = np.rot90(frame.to_ndarray(format="rgb24"), rotation(frame))
    even: Frames = np.ascontiguousarray(picture[: height // 2 * 2, : width // 2 * 2])
    return VideoFrame.from_ndarray(even, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=space, dst_color_range=ColorRange.MPEG
    )


def _yuv_space(frame: VideoFrame) -> int:
    """The matrix by which the clip becomes YUV: the frame's own; RGB has none, and then it is left unspecified."""
    return _UNSPECIFIED_SPACE if frame.colorspace == _RGB_SPACE else int(frame.colorspace)


def reason(error: BaseException) -> str:
    """One line for a libav error, without the path it ends with."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__).splitlines()[0]
