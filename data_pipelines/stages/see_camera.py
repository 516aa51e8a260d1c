"""How the camera moves, from the pixels that belong to no object: shifts and zooms are tried on frames a little
apart, and the one that maps each onto its partner wins if it explains much more than standing still.

Part of the pixel captioner.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipelines.record import Frames
from data_pipelines.stages.filter_quality import LUMA

STATIC = "static"
# Two luma pictures and the pixels of both that belong to no object.
Pair = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]
PAIRS = 8  # over the clip: far enough apart for a slow move to show, near enough for a fast one to be found
STILL_ERROR = 0.5  # mean change of luma that coding noise alone causes
EXPLAINED = 0.6  # a move must bring the error of a still camera under this share of it
MAX_SHIFT_SHARE = 0.09  # of a side, between the two frames of a pair
SHIFT_STEP = 0.25  # pixels
ZOOMS = tuple(np.round(np.arange(-0.08, 0.0801, 0.004), 4))  # of the logarithm of the scale


@dataclass(frozen=True)
class CameraMotion:
    """A steady move, between two frames of the view."""

    name: str = STATIC  # static, pan left/right, tilt up/down, zoom in/out
    shift_x: float = 0.0  # pixels the camera moves to the right
    shift_y: float = 0.0  # and downwards
    log_scale: float = 0.0  # growth of the picture

    def undo(self, y: float, x: float, index: int, height: int, width: int) -> tuple[float, float]:
        """Where a point seen at (y, x) in frame `index` would be seen had the camera stayed."""
        scale = np.exp(self.log_scale * index)
        return (
            height / 2 + (y - height / 2) / scale + self.shift_y * index,
            width / 2 + (x - width / 2) / scale + self.shift_x * index,
        )


def find_camera(frames: Frames, ignore: NDArray[np.bool_]) -> tuple[CameraMotion, float]:
    """The camera's motion, and the mean luma change between frames that it leaves unexplained.

    Args:
        frames: [T, h, w, 3].
        ignore: [T, h, w], pixels of moving objects.
    """
    if len(frames) < 2:
        return CameraMotion(), 0.0
    luma = frames.astype(np.float32) @ LUMA
    gap = max(1, (len(frames) - 1) // PAIRS)
    firsts = range(0, len(frames) - gap, gap)
    pairs = [(luma[i], luma[i + gap], ~(ignore[i] | ignore[i + gap])) for i in firsts]
    still = _error(pairs, CameraMotion())
    if still < STILL_ERROR:
        return CameraMotion(), still
    height, width = luma.shape[1:]
    moves = [CameraMotion("pan", shift_x=step) for step in _steps(width)]
    moves += [CameraMotion("tilt", shift_y=step) for step in _steps(height)]
    moves += [CameraMotion("zoom", log_scale=zoom) for zoom in ZOOMS if zoom]
    # Of equal errors (a pattern shifted by a period) the smallest move comes first.
    moves.sort(key=lambda move: abs(move.shift_x) + abs(move.shift_y) + abs(move.log_scale) * max(height, width) / 4)
    errors = [_error(pairs, move) for move in moves]
    best = min(range(len(moves)), key=lambda place: (round(errors[place], 1), place))
    if errors[best] > EXPLAINED * still:
        return CameraMotion(), still
    move = moves[best]
    signed = move.shift_x + move.shift_y + move.log_scale
    sides = {"pan": ("left", "right"), "tilt": ("up", "down"), "zoom": ("out", "in")}[move.name]
    name = f"{move.name} {sides[int(signed > 0)]}"
    return CameraMotion(name, move.shift_x / gap, move.shift_y / gap, move.log_scale / gap), errors[best]


def _steps(side: int) -> list[float]:
    count = int(MAX_SHIFT_SHARE * side / SHIFT_STEP)
    return [SHIFT_STEP * step for step in range(-count, count + 1) if step]


def _error(pairs: list[Pair], move: CameraMotion) -> float:
    """Mean absolute difference between each second frame and its first frame as the move would show it."""
    height, width = pairs[0][0].shape
    scale = np.exp(-move.log_scale)
    matrix = np.array(
        [
            [scale, 0, (width - 1) / 2 * (1 - scale) + move.shift_x],
            [0, scale, (height - 1) / 2 * (1 - scale) + move.shift_y],
        ],
        np.float32,
    )
    total, count = 0.0, 0
    for first, second, valid in pairs:
        guess = cv2.warpAffine(
            first,
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=-1000.0,
        )
        seen = valid & (guess >= 0)
        total += float(np.abs(guess - second)[seen].sum())
        count += int(np.count_nonzero(seen))
    return total / max(count, 1)
