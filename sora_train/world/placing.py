"""Draws what a scene is made of: backgrounds, and figures that keep clear of the borders and of each other.

The pieces that sampling (level `simple`) and events (level `full`) put together.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from sora_train.world.scene import (
    Background,
    Camera,
    Figure,
    Floats,
    Rgb,
    Texture,
    screen_centers,
)
from sora_train.world.words import Triple

Generator = np.random.Generator
Value = TypeVar("Value")

# Greys and tints with little chroma, so that every color stands out from each of them.
PLAIN_RGB: tuple[Rgb, ...] = (
    (22, 22, 24),
    (64, 64, 66),
    (116, 116, 116),
    (172, 172, 170),
    (232, 232, 232),
    (44, 52, 64),
    (66, 56, 50),
    (196, 204, 216),
    (222, 212, 198),
    (186, 198, 186),
)
DARK_RGB = tuple(rgb for rgb in PLAIN_RGB if sum(rgb) < 240)
LIGHT_RGB = tuple(rgb for rgb in PLAIN_RGB if sum(rgb) > 480)
STRUCTURED = (Texture.stripes, Texture.checker, Texture.noise)  # textures on which a camera's move is seen
STATIC = Camera()
_MARGIN = 2.0  # pixels between a figure and the border of the frame
_GAP = 1.15  # smallest distance of two centroids, in sums of their radii
_TRIES = 40
_DIRECTION = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}


def choice(rng: Generator, values: Sequence[Value]) -> Value:
    """One of the values, all equally likely."""
    return values[int(rng.integers(len(values)))]


def moving_figure(
    rng: Generator, triple: Triple, diameter: float, travel: float, seconds: float, height: int, width: int
) -> Figure:
    """A figure that moves steadily over `travel` (share of the frame's height or width, or as much as fits) in
    `seconds` and never touches the border. With seconds = 0 it is anywhere."""
    color, shape, motion = triple
    figure = Figure(color, shape, motion, diameter, 0.0, 0.0, 0.0, 0.0)
    up, down, side = figure.reach
    direction_y, direction_x = _DIRECTION[motion] if seconds > 0 else (0, 0)
    low_y, high_y = up + _MARGIN, height - down - _MARGIN
    low_x, high_x = side + _MARGIN, width - side - _MARGIN
    path_y = direction_y * min(travel * height, high_y - low_y)
    path_x = direction_x * min(travel * width, high_x - low_x)
    start_y = low_y - min(path_y, 0) + rng.random() * (high_y - low_y - abs(path_y))
    start_x = low_x - min(path_x, 0) + rng.random() * (high_x - low_x - abs(path_x))
    per_second = 1 / seconds if seconds > 0 else 0.0
    return Figure(color, shape, motion, diameter, start_y, start_x, path_y * per_second, path_x * per_second)


def place_figures(
    rng: Generator,
    count: int,
    triples: Sequence[Triple],
    diameters: tuple[float, float],
    seconds_T: Floats,
    height: int,
    width: int,
    camera: Camera = STATIC,
) -> tuple[Figure, ...]:
    """Up to `count` figures that stay in view and apart in every frame; at least one.

    diameters: range, in shares of the frame's shorter side. After 40 vain tries a figure is left out.
    """
    placed: list[Figure] = []
    tries = 0
    while not placed or (len(placed) < count and tries < _TRIES * count):
        tries += 1
        diameter = rng.uniform(*diameters) * min(height, width)
        figure = moving_figure(
            rng, choice(rng, triples), diameter, rng.uniform(0.25, 0.5), float(seconds_T[-1]), height, width
        )
        if stays_in_view(figure, camera, seconds_T, height, width) and all(
            _stay_apart(figure, other, seconds_T, height, width) for other in placed
        ):
            placed.append(figure)
    return tuple(placed)


def stays_in_view(figure: Figure, camera: Camera, seconds_T: Floats, height: int, width: int) -> bool:
    """Whether the whole figure is inside the frame at all times."""
    y, x, scale = screen_centers(figure, camera, seconds_T, height, width)
    up, down, side = figure.reach
    inside_y = (y - up * scale >= 0) & (y + down * scale <= height)
    inside_x = (x - side * scale >= 0) & (x + side * scale <= width)
    return bool((inside_y & inside_x).all())


def _stay_apart(figure: Figure, other: Figure, seconds_T: Floats, height: int, width: int) -> bool:
    y, x = figure.centers(seconds_T, height, width)
    other_y, other_x = other.centers(seconds_T, height, width)
    gap = _GAP * (max(figure.reach) + max(other.reach))
    return bool((np.hypot(y - other_y, x - other_x) >= gap).all())


def sample_background(
    rng: Generator, shades: Sequence[Rgb], textures: Sequence[Texture], height: int, width: int
) -> Background:
    """A background of one or two of the shades."""
    texture = choice(rng, textures)
    first = int(rng.integers(len(shades)))
    second = (first + 1 + int(rng.integers(len(shades) - 1))) % len(shades)
    period = float(height + width) if texture is Texture.gradient else rng.uniform(12.0, 24.0)
    return Background(texture, shades[first], shades[second], period, seed=int(rng.integers(1 << 31)))
