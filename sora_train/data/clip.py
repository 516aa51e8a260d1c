"""From the bytes of a medium to the frames that are trained on. Called in the loader's workers."""

import importlib.metadata
import io
from collections.abc import Iterator
from itertools import chain

import av
import decord
import numpy as np
import torch
import torch.nn.functional as F
from av.error import FFmpegError
from numpy.typing import NDArray

from sora_train.config.root import ConfigError
from sora_train.data.schema import IMAGE_SUFFIXES, IndexRow
from sora_train.data.size import ClipSize

Frames = NDArray[np.uint8]

# Containers are forced: a prober could be talked into playlists and protocols.
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

# decord raises RuntimeError for what it cannot open and StopIteration where frames end early.
DECODER_ERRORS = (FFmpegError, decord.DECORDError, RuntimeError, StopIteration)


class DecodeError(Exception):
    """A clip that cannot be trained on. `reason` is one word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def check_decoder() -> None:
    """Raises ConfigError when decord and decord2, which overwrite each other's files, are both installed."""
    installed = {name for item in importlib.metadata.distributions() if (name := item.metadata["Name"])}
    if {"decord", "decord2"} <= installed:
        raise ConfigError("decord and decord2 share a folder: `pip uninstall decord decord2`, then install decord2")


def decode_clip(data: bytes, row: IndexRow, size: ClipSize) -> Frames:
    """The frames of a clip under the size rule: uint8 [T, H, W, 3].

    Raises:
        DecodeError: `decode` (not readable), `frame_count` (fewer or more than the index says, as in a truncated
            file) or `frame_size` (other than the index says).
    """
    try:
        frames = _take(_read(data, row), size.frame_indices, row)
    except DECODER_ERRORS as error:
        raise DecodeError("decode", str(error).splitlines()[0] if str(error) else repr(error)) from error
    return _fit(frames, size)


def _read(data: bytes, row: IndexRow) -> Iterator[Frames]:
    if row.medium in IMAGE_SUFFIXES:
        return _read_av(data, row.medium)
    reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
    # A truncated file is shorter than it was when it was indexed; nothing else tells.
    if len(reader) != row.num_frames:
        raise DecodeError("frame_count", f"{len(reader)} frames, the index says {row.num_frames}")
    first = reader.next().asnumpy()
    # Where its padded lines divide by the width (8, 16, 32, 48, 96, 144, …) decord takes padding for channels.
    if first.shape[-1] != 3:
        return _read_av(data, row.medium)
    return chain([first], (reader.next().asnumpy() for _ in range(1, len(reader))))


def _read_av(data: bytes, medium: str) -> Iterator[Frames]:
    with av.open(io.BytesIO(data), "r", format=CONTAINERS[medium]) as container:
        if not container.streams.video:
            raise DecodeError("decode", "no video stream")
        for frame in container.decode(video=0):
            yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def _take(source: Iterator[Frames], wanted: list[int], row: IndexRow) -> Frames:
    # Reading forward is cheaper than seeking, and ends with the last frame that is wanted.
    taken: list[Frames] = []
    for index, frame in enumerate(source):
        if index == wanted[len(taken)]:
            if frame.shape != (row.height, row.width, 3):
                raise DecodeError("frame_size", f"{frame.shape}, the index says {row.height}x{row.width}")
            taken.append(frame)
            if len(taken) == len(wanted):
                return np.stack(taken)
    raise DecodeError("frame_count", f"ends before frame {wanted[len(taken)]} of {row.num_frames}")


def _fit(frames: Frames, size: ClipSize) -> Frames:
    """Scales with antialiasing and crops the middle."""
    if frames.shape[1:3] != (size.scaled_height, size.scaled_width):
        planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
        target = (size.scaled_height, size.scaled_width)
        scaled = F.interpolate(planes, target, mode="bicubic", antialias=True, align_corners=False)
        frames = scaled.permute(0, 2, 3, 1).numpy()
    top, left = (size.scaled_height - size.height) // 2, (size.scaled_width - size.width) // 2
    return np.ascontiguousarray(frames[:, top : top + size.height, left : left + size.width])
