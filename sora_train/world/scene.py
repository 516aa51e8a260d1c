"""A scene of the procedural world: what is where at every moment, and the truth about it.

`sampling.sample_scene` draws scenes, `render.render` turns them into pixels, `truth` tells what a reader of those
pixels should find. Lengths are pixels at the scale of an unzoomed frame, y grows downwards, pixel (row, column) has
its centre at (row + 0.5, column + 0.5), times are seconds from the beginning of the shot.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rgb = tuple[int, int, int]

BOUNCING = "bouncing"  # a figure's motion beside MOTIONS, at level `full`

# How far each shape reaches from its centroid, as shares of its diameter: upwards, downwards, sideways. The three
# shapes look equally large; the triangle is equilateral and points up.
REACH: dict[str, tuple[float, float, float]] = {
    "circle": (0.5, 0.5, 0.5),
    "square": (0.44, 0.44, 0.44),
    "triangle": (0.62, 0.31, 0.62 * 3**0.5 / 2),
}


class Texture(Enum):
    """What a background looks like."""

    plain = "plain"
    gradient = "gradient"
    stripes = "stripes"
    checker = "checker"
    noise = "noise"


class CameraMove(Enum):
    """How the camera moves; panning right, everything drifts to the left."""

    static = "static"
    pan_left = "pan left"
    pan_right = "pan right"
    zoom_in = "zoom in"
    zoom_out = "zoom out"


@dataclass(frozen=True)
class Background:
    """What is behind everything, endless in all directions."""

    texture: Texture
    rgb: Rgb
    other_rgb: Rgb  # the texture's second color; unused by plain
    period: float  # of stripes, squares or noise; for gradient the length of the whole ramp
    seed: int = 0  # of noise


@dataclass(frozen=True)
class Camera:
    """A steady move of the camera during one shot."""

    move: CameraMove = CameraMove.static
    # pan: pixels a second; zoom: growth of the scale's natural logarithm a second.
    rate: float = 0.0

    def view(self, seconds_T: Floats) -> tuple[Floats, Floats]:
        """(scale [T], shift to the right in pixels [T]) of the camera. Zoom is about the middle of the frame."""
        sign = {CameraMove.pan_left: -1.0, CameraMove.zoom_out: -1.0, CameraMove.static: 0.0}.get(self.move, 1.0)
        if self.move in (CameraMove.zoom_in, CameraMove.zoom_out):
            return np.exp(sign * self.rate * seconds_T), np.zeros_like(seconds_T)
        return np.ones_like(seconds_T), sign * self.rate * seconds_T


@dataclass(frozen=True)
class Figure:
    """One moving object."""

    color: str
    shape: str
    motion: str  # one of MOTIONS, or BOUNCING
    diameter: float
    start_y: float  # its centroid at the beginning of the shot
    start_x: float
    velocity_y: float  # pixels a second
    velocity_x: float
    first_frame: int = 0  # it is there in frames first_frame <= frame < stop_frame of the shot
    stop_frame: int = 1 << 30

    @property
    def reach(self) -> tuple[float, float, float]:
        """Pixels from the centroid to the figure's upper, lower and side borders."""
        up, down, side = REACH[self.shape]
        return up * self.diameter, down * self.diameter, side * self.diameter

    def centers(self, seconds_T: Floats, height: int, width: int) -> tuple[Floats, Floats]:
        """(y [T], x [T]) of the centroid; a bouncing figure is reflected at the borders of the frame."""
        y = self.start_y + self.velocity_y * seconds_T
        x = self.start_x + self.velocity_x * seconds_T
        if self.motion != BOUNCING:
            return y, x
        up, down, side = self.reach
        return _fold(y, up, height - down)[0], _fold(x, side, width - side)[0]

    def num_bounces(self, seconds: float, height: int, width: int) -> int:
        """Hits of a border up to that moment."""
        if self.motion != BOUNCING:
            return 0
        up, down, side = self.reach
        times = np.array([0.0, seconds])
        y_hits = _fold(self.start_y + self.velocity_y * times, up, height - down)[1]
        x_hits = _fold(self.start_x + self.velocity_x * times, side, width - side)[1]
        return int(abs(y_hits[1] - y_hits[0]) + abs(x_hits[1] - x_hits[0]))


@dataclass(frozen=True)
class Occluder:
    """An upright bar over the whole height, in front of every figure."""

    left: float
    right: float
    rgb: Rgb


@dataclass(frozen=True)
class Shot:
    """What one uninterrupted view shows; `figures` are drawn in order, later ones in front."""

    start_frame: int
    num_frames: int
    background: Background
    figures: tuple[Figure, ...]
    camera: Camera = Camera()
    occluder: Occluder | None = None


@dataclass(frozen=True)
class Scene:
    """Everything there is to know of one clip."""

    height: int
    width: int
    num_frames: int
    fps: int
    shots: tuple[Shot, ...]

    @property
    def cuts(self) -> tuple[int, ...]:
        """First frames of all shots but the first."""
        return tuple(shot.start_frame for shot in self.shots[1:])


def shot_seconds(shot: Shot, fps: int) -> Floats:
    """Times of the shot's frames from its beginning, [T]."""
    return np.arange(shot.num_frames) / fps


def screen_centers(
    figure: Figure, camera: Camera, seconds_T: Floats, height: int, width: int
) -> tuple[Floats, Floats, Floats]:
    """(y [T], x [T], scale [T]) of a figure as the camera sees it, in pixels of the frame."""
    y, x = figure.centers(seconds_T, height, width)
    scale, shift = camera.view(seconds_T)
    return height / 2 + (y - height / 2) * scale, width / 2 + (x - shift - width / 2) * scale, scale


def truth(scene: Scene) -> dict[str, Any]:
    """What a perfect reader of the pixels would report, as JSON values.

    `objects` (all shots'): color, shape, motion (None in a shot of one frame), shot, frames [first, stop) of the clip,
    fully hidden frames, bounces. `count`: objects in the first frame; `count_per_frame` counts hidden ones too.
    """
    objects: list[dict[str, Any]] = []
    count_per_frame = [0] * scene.num_frames
    for place, shot in enumerate(scene.shots):
        for figure in shot.figures:
            first, stop = figure.first_frame, min(figure.stop_frame, shot.num_frames)
            for frame in range(shot.start_frame + first, shot.start_frame + stop):
                count_per_frame[frame] += 1
            objects.append(
                {
                    "color": figure.color,
                    "shape": figure.shape,
                    "motion": figure.motion if stop - first > 1 else None,
                    "shot": place,
                    "frames": [shot.start_frame + first, shot.start_frame + stop],
                    "hidden_frames": _hidden_frames(figure, shot, scene),
                    "bounces": figure.num_bounces((stop - 1) / scene.fps, scene.height, scene.width),
                }
            )
    return {
        "height": scene.height,
        "width": scene.width,
        "num_frames": scene.num_frames,
        "fps": scene.fps,
        "objects": objects,
        "count": count_per_frame[0],
        "count_per_frame": count_per_frame,
        "camera": [shot.camera.move.value for shot in scene.shots],
        "backgrounds": [
            {
                "texture": shot.background.texture.value,
                "rgb": list(shot.background.rgb),
                "other_rgb": list(shot.background.other_rgb),
            }
            for shot in scene.shots
        ],
        "cuts": list(scene.cuts),
    }


def _hidden_frames(figure: Figure, shot: Shot, scene: Scene) -> list[int]:
    if shot.occluder is None:
        return []
    _, x = figure.centers(shot_seconds(shot, scene.fps), scene.height, scene.width)
    side = figure.reach[2]
    hidden = (x - side >= shot.occluder.left) & (x + side <= shot.occluder.right)
    return [shot.start_frame + int(frame) for frame in np.flatnonzero(hidden)]


def _fold(position: Floats, low: float, high: float) -> tuple[Floats, Floats]:
    """Reflects an unlimited straight path into [low, high]; also the signed number of reflections so far."""
    laps = np.floor((position - low) / (high - low))
    rest = position - low - laps * (high - low)
    return np.where(laps % 2 == 0, low + rest, high - rest), laps
