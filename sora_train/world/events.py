"""The events of level `full`, one function each: several objects, a bounce, an occlusion, a count change, a cut, a
camera move. sampling chooses the event and the size; the rest is drawn here."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sora_train.world.placing import (
    DARK_RGB,
    LIGHT_RGB,
    STRUCTURED,
    Generator,
    choice,
    place_figures,
    sample_background,
)
from sora_train.world.scene import (
    BOUNCING,
    REACH,
    Background,
    Camera,
    CameraMove,
    Figure,
    Floats,
    Occluder,
    Scene,
    Shot,
    Texture,
)
from sora_train.world.words import Triple

_ANY_FRAMES = (1, 4, 9, 12, 17, 25, 33)
_SEEN_FRAMES = (9, 17, 25, 33)  # long enough to see something happen
_RATES = (8, 16)
_DIAMETERS = (0.2, 0.3)  # shares of the shorter side


def several(rng: Generator, height: int, width: int, triples: Sequence[Triple]) -> Scene:
    """One to four objects, each with its own motion."""
    num_frames, fps = choice(rng, _ANY_FRAMES), choice(rng, _RATES)
    figures = place_figures(rng, int(rng.integers(1, 5)), triples, _DIAMETERS, _seconds(num_frames, fps), height, width)
    return _one_shot(height, width, fps, Shot(0, num_frames, _background(rng, height, width), figures))


def bounce(rng: Generator, height: int, width: int, triples: Sequence[Triple]) -> Scene:
    """One object that hits at least one border and comes back."""
    num_frames, fps = choice(rng, _SEEN_FRAMES), choice(rng, _RATES)
    color, shape, _ = choice(rng, triples)
    diameter = rng.uniform(0.25, 0.35) * min(height, width)
    up, down, side = (share * diameter for share in REACH[shape])
    room_y, room_x = height - up - down, width - 2 * side
    seconds = (num_frames - 1) / fps
    # A path longer than the room it has must come back at least once.
    laps_y, laps_x = choice(rng, ((0.0, 1.0), (1.0, 0.0), (0.4, 1.0), (1.0, 0.4)))
    laps = rng.uniform(1.2, 1.9)
    figure = Figure(
        color,
        shape,
        BOUNCING,
        diameter,
        start_y=up + rng.uniform(0.1, 0.9) * room_y,
        start_x=side + rng.uniform(0.1, 0.9) * room_x,
        velocity_y=choice(rng, (-1, 1)) * laps_y * laps * room_y / seconds,
        velocity_x=choice(rng, (-1, 1)) * laps_x * laps * room_x / seconds,
    )
    return _one_shot(height, width, fps, Shot(0, num_frames, _background(rng, height, width), (figure,)))


def occlusion(rng: Generator, height: int, width: int, triples: Sequence[Triple]) -> Scene:
    """One object that crosses the frame sideways, is wholly hidden behind a bar for a while and comes out again."""
    num_frames, fps = choice(rng, _SEEN_FRAMES[1:]), choice(rng, _RATES)
    color, shape, motion = choice(rng, [triple for triple in triples if triple[2] in ("left", "right")])
    diameter = rng.uniform(0.18, 0.22) * min(height, width)
    up, down, side = (share * diameter for share in REACH[shape])
    bar = rng.uniform(1.5, 1.7) * 2 * side
    free = 2 * side + 2  # the object is wholly seen on either side of the bar
    left = rng.uniform(free, width - free - bar)
    ends = (side + 1, width - side - 1)
    start_x, end_x = ends if motion == "right" else ends[::-1]
    figure = Figure(
        color,
        shape,
        motion,
        diameter,
        start_y=rng.uniform(up + 1, height - down - 1),
        start_x=start_x,
        velocity_y=0.0,
        velocity_x=(end_x - start_x) * fps / (num_frames - 1),
    )
    # The bar's shade is of the other half of the scale than the background's.
    shades, bar_shades = _two_halves(rng)
    background = sample_background(rng, shades, tuple(Texture), height, width)
    occluder = Occluder(left, left + bar, choice(rng, bar_shades))
    return _one_shot(height, width, fps, Shot(0, num_frames, background, (figure,), occluder=occluder))


def count_change(rng: Generator, height: int, width: int, triples: Sequence[Triple]) -> Scene:
    """Two or three objects, of which the last appears, or the last disappears, in the middle third of the clip."""
    num_frames, fps = choice(rng, _SEEN_FRAMES), choice(rng, _RATES)
    figures: tuple[Figure, ...] = ()
    while len(figures) < 2:
        figures = place_figures(
            rng, int(rng.integers(2, 4)), triples, _DIAMETERS, _seconds(num_frames, fps), height, width
        )
    change = int(rng.integers(num_frames // 3, 2 * num_frames // 3 + 1))
    appears = rng.random() < 0.5
    changed = replace(figures[-1], first_frame=change) if appears else replace(figures[-1], stop_frame=change)
    shot = Shot(0, num_frames, _background(rng, height, width), (*figures[:-1], changed))
    return _one_shot(height, width, fps, shot)


def cut(rng: Generator, height: int, width: int, triples: Sequence[Triple]) -> Scene:
    """Two shots of fifteen frames or more, one on dark ground and one on light, with objects of their own."""
    num_frames, fps = 33, choice(rng, _RATES)
    change = int(rng.integers(15, 19))
    shots = []
    for shades, start, stop in zip(_two_halves(rng), (0, change), (change, num_frames), strict=True):
        seconds_T = _seconds(stop - start, fps)
        figures = place_figures(rng, int(rng.integers(1, 3)), triples, _DIAMETERS, seconds_T, height, width)
        background = sample_background(rng, shades, tuple(Texture), height, width)
        shots.append(Shot(start, stop - start, background, figures))
    return Scene(height, width, num_frames, fps, tuple(shots))


def camera_move(rng: Generator, height: int, width: int, triples: Sequence[Triple]) -> Scene:
    """One or two objects before a textured ground, over which the camera pans or zooms."""
    num_frames, fps = choice(rng, _SEEN_FRAMES), choice(rng, _RATES)
    seconds_T = _seconds(num_frames, fps)
    move = choice(rng, tuple(move for move in CameraMove if move is not CameraMove.static))
    pans = move in (CameraMove.pan_left, CameraMove.pan_right)
    amount = rng.uniform(0.15, 0.3) * width if pans else np.log(rng.uniform(1.25, 1.6))
    camera = Camera(move, float(amount / seconds_T[-1]))
    figures = place_figures(rng, int(rng.integers(1, 3)), triples, _DIAMETERS, seconds_T, height, width, camera)
    background = sample_background(rng, choice(rng, (DARK_RGB, LIGHT_RGB)), STRUCTURED, height, width)
    return _one_shot(height, width, fps, Shot(0, num_frames, background, figures, camera))


def _seconds(num_frames: int, fps: int) -> Floats:
    return np.arange(num_frames) / fps


def _background(rng: Generator, height: int, width: int) -> Background:
    """Both shades of a texture come from one half of the scale, so that the objects stay the strongest contrast."""
    return sample_background(rng, choice(rng, (DARK_RGB, LIGHT_RGB)), tuple(Texture), height, width)


def _two_halves(rng: Generator) -> tuple[Sequence[tuple[int, int, int]], Sequence[tuple[int, int, int]]]:
    return (DARK_RGB, LIGHT_RGB) if rng.random() < 0.5 else (LIGHT_RGB, DARK_RGB)


def _one_shot(height: int, width: int, fps: int, shot: Shot) -> Scene:
    return Scene(height, width, shot.num_frames, fps, (shot,))
