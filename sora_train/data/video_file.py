"""Whole videos to and from files: what samples are written as, and how small rendered ones are read back.

Training does not come through here: it reads clips out of shards (data/clip.py).
"""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


def save_video(frames: Frames, path: Path, fps: float, crf: int = 16) -> None:
    """Writes an H.264 mp4 that plays everywhere; a reader never sees half of it.

    Args:
        frames: [T, H, W, 3], H and W even.
        crf: quality; lower is better, 18 is hard to tell from the original.
    """
    _, height, width, _ = frames.shape
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "medium"}
        stream.thread_count = 1  # tiny frames: threads cost more than they give
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    temporary.replace(path)


def read_video(path: Path) -> Frames:
    """All frames of a video file, [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
