"""Pixels of a scene: every frame is evaluated analytically on its pixel grid, so edges are antialiased at any subpixel
position, under any camera, and the same scene gives the same bytes in every process.

Follows sampling.sample_scene; data_pipelines.world encodes the frames.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sora_train.world.scene import REACH, Background, Figure, Scene, Shot, Texture, screen_centers, shot_seconds
from sora_train.world.words import COLORS

Floats = NDArray[np.float32]
_LATTICE = 64  # points a side of the noise texture before it repeats


def render(scene: Scene) -> NDArray[np.uint8]:
    """Frames [T, H, W, 3], sRGB."""
    return np.concatenate([_render_shot(shot, scene) for shot in scene.shots])


def _render_shot(shot: Shot, scene: Scene) -> NDArray[np.uint8]:
    seconds_T = shot_seconds(shot, scene.fps)
    scale_T, shift_T = shot.camera.view(seconds_T)
    rows_H = np.arange(scene.height, dtype=np.float32) + np.float32(0.5)
    columns_W = np.arange(scene.width, dtype=np.float32) + np.float32(0.5)
    # Where each row and column of each frame lies in the world: the inverse of scene.screen_centers.
    world_y_TH = (rows_H - scene.height / 2) / _column(scale_T) + scene.height / 2
    world_x_TW = (columns_W - scene.width / 2) / _column(scale_T) + scene.width / 2 + _column(shift_T)
    canvas = _paint_background(shot.background, world_y_TH, world_x_TW)

    for figure in shot.figures:
        y_T, x_T, figure_scale_T = screen_centers(figure, shot.camera, seconds_T, scene.height, scene.width)
        coverage = _coverage(
            figure, rows_H[None, :, None] - _cube(y_T), columns_W[None, None, :] - _cube(x_T), _cube(figure_scale_T)
        )
        coverage[: figure.first_frame] = 0
        coverage[figure.stop_frame :] = 0
        _blend(canvas, coverage, COLORS[figure.color])

    if shot.occluder is not None:
        left, right = shot.occluder.left, shot.occluder.right
        middle, half = (left + right) / 2, (right - left) / 2
        bar_W = np.clip(0.5 + half - np.abs(columns_W - middle), 0, 1).astype(np.float32)
        _blend(canvas, np.broadcast_to(bar_W, canvas.shape[:3]), shot.occluder.rgb)
    return (canvas + np.float32(0.5)).astype(np.uint8)


def _paint_background(background: Background, y_TH: Floats, x_TW: Floats) -> Floats:
    """Float canvas [T, H, W, 3] in 0..255."""
    y, x = y_TH[:, :, None], x_TW[:, None, :]
    shape = (y_TH.shape[0], y_TH.shape[1], x_TW.shape[1])
    first, second = np.array(background.rgb, np.float32), np.array(background.other_rgb, np.float32)
    if background.texture is Texture.plain:
        return np.broadcast_to(first, (*shape, 3)).copy()
    mix = np.broadcast_to(_texture_mix(background, y, x), shape)[..., None]
    return first + (second - first) * mix.astype(np.float32)


def _texture_mix(background: Background, y: Any, x: Any) -> Any:
    """Share of the second color at world positions, 0..1."""
    if background.texture is Texture.gradient:
        return np.clip((x + y) / background.period, 0, 1)
    if background.texture is Texture.stripes:
        return _square_wave((x + y) / background.period, background.period) * 0.5 + 0.5
    if background.texture is Texture.checker:
        waves = _square_wave(x / background.period, background.period) * _square_wave(
            y / background.period, background.period
        )
        return waves * 0.5 + 0.5
    return _noise(y / background.period, x / background.period, background.seed)


def _square_wave(phase: Any, period: float) -> Any:
    """+1 and -1 in turns, with a ramp of about one pixel between them."""
    from_edge = np.abs((phase % 1.0) - 0.5) - 0.25  # in periods; negative in the middle half
    return np.clip(-2 * from_edge * period, -1, 1)


def _noise(y: Any, x: Any, seed: int) -> Any:
    """Smooth value noise in 0..1: random lattice values, interpolated."""
    lattice = np.random.default_rng(seed).random((_LATTICE, _LATTICE), dtype=np.float32)
    row, column = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    fade_y, fade_x = _smoothstep(y - row), _smoothstep(x - column)
    row_a, row_b = row % _LATTICE, (row + 1) % _LATTICE
    column_a, column_b = column % _LATTICE, (column + 1) % _LATTICE
    upper = lattice[row_a, column_a] * (1 - fade_x) + lattice[row_a, column_b] * fade_x
    lower = lattice[row_b, column_a] * (1 - fade_x) + lattice[row_b, column_b] * fade_x
    return upper * (1 - fade_y) + lower * fade_y


def _smoothstep(value: Any) -> Any:
    return value * value * (3 - 2 * value)


def _coverage(figure: Figure, dy: Floats, dx: Floats, scale: Floats) -> Floats:
    """Share of each pixel that the figure covers, [T, H, W], from the signed distance to its outline in pixels.

    dy [T, H, 1], dx [T, 1, W]: pixels from the figure's centroid; scale [T, 1, 1]: the camera's.
    """
    _, down, side = (np.float32(share * figure.diameter) * scale for share in REACH[figure.shape])
    if figure.shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - side
    elif figure.shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - side
    else:  # the slanted sides of an equilateral triangle lie `down` from its centroid, as its base does
        slanted = np.abs(dx) * np.float32(np.sqrt(3) / 2) - dy * np.float32(0.5)
        distance = np.maximum(slanted, dy) - down
    return np.clip(np.float32(0.5) - distance, 0, 1)


def _blend(canvas: Floats, coverage: Floats, rgb: tuple[int, int, int]) -> None:
    canvas += coverage[..., None] * (np.array(rgb, np.float32) - canvas)


def _column(values_T: Any) -> Floats:
    return values_T.astype(np.float32)[:, None]


def _cube(values_T: Any) -> Floats:
    return values_T.astype(np.float32)[:, None, None]
