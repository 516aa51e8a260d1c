"""Reads color, shape and motion back from the pixels of a clip of one object: the judge of generated samples.

Shares no code with the captioner that wrote the training captions (or one error would hide the other) and knows
nothing of how scenes are rendered beyond what the words mean. benchmarks/scorer.py holds it to the truth of H.264-coded
clips before it may judge. It says None where nothing can be told, so that a grey mist is never "a red circle".

How: the background is the median color of the border. The color is that of whatever differs from it, in one piece or
in several, if most of it agrees. For shape and motion there must be an object: the connected part around the strongest
difference, whose soft mask gives the centroid to a fraction of a pixel.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Hue in degrees of the colors that can be told apart.
_HUES = {"red": 0.0, "yellow": 50.0, "green": 130.0, "blue": 230.0}
_MAX_HUE_ERROR = 42.0
_MIN_SATURATION = 0.28
_MIN_AGREEMENT = 0.6  # of what stands out must be of one color
_MAX_GROUND_CHROMA = 0.5  # of the background (largest less smallest of R, G, B), as a share of what stands out
_MIN_CONTRAST = 36.0  # Euclidean distance of object and background in 8-bit RGB
_AREA_RANGE = (0.01, 0.45)  # of the frame
_MAX_BORDER_SHARE = 0.15  # of the frame's border pixels: what touches more is ground, not object
_MIN_OBJECT_OVERLAP = 0.5  # intersection over union with the best ideal shape: an object at all,
_MIN_OVERLAP = 0.75  # and one whose shape can be told
_STEEPNESS = 3.0
_MIN_SEEN_SHARE = 0.75  # of the frames in which the object must be found for its motion to be told
_MOVING, _STILL = 0.15, 0.1  # path over the clip, in shares of the shorter side: at least, at most
_MIN_STRAIGHTNESS = 2.0  # movement along the main axis over movement across it
_MAX_WOBBLE = 0.06  # root mean square distance from steady movement, in shares of the shorter side


@dataclass(frozen=True)
class Reading:
    """What a clip shows; None where it cannot be told."""

    color: str | None
    shape: str | None
    motion: str | None  # also None for a clip of one frame


@dataclass(frozen=True)
class _Track:
    """The object in the frames in which it was found."""

    frames: NDArray[np.int64]  # their numbers [F]
    masks: Floats  # soft, 0..1 [F, H, W]
    centers: Floats  # (y, x) [F, 2]


def score_clip(frames: NDArray[np.uint8]) -> Reading:
    """Reads a clip [T, H, W, 3] of sRGB pixels, at best 5 to 33 frames with one object before a plain background."""
    pixels = frames.astype(np.float32)
    color = _read_color(pixels)
    track = _find_object(pixels)
    if track is None:
        return Reading(color, None, None)
    return Reading(color, _read_shape(track), _read_motion(track, pixels.shape[:3]))


def share_correct(readings: Iterable[Reading], expected: Iterable[Reading]) -> dict[str, float]:
    """Share of readings that name the expected color, shape and motion, each over the clips that have one
    (an image has no motion to get right). NaN for an attribute that no clip has."""
    pairs = list(zip(readings, expected, strict=True))
    shares = {}
    for name in ("color", "shape", "motion"):
        hits = [getattr(found, name) == getattr(wanted, name) for found, wanted in pairs if getattr(wanted, name)]
        shares[name] = float(np.mean(hits)) if hits else float("nan")
    return shares


def _find_object(pixels: Floats) -> _Track | None:
    smooth = _box_blur(pixels, 1)
    background = np.median(smooth[:, _border(pixels.shape[1:3], 2)], axis=1)[:, None, None, :]
    difference = np.sqrt(np.square(smooth - background).sum(-1))
    height, width = difference.shape[1:]

    # The object is where a window of about half its size differs most; its own level of difference is found there.
    window = max(2, min(height, width) // 12)
    peaks = _box_blur(difference[..., None], window)[..., 0].reshape(len(pixels), -1)
    seeds = peaks.argmax(1)
    levels = peaks.max(1)
    usual = np.median(levels)
    if usual < _MIN_CONTRAST:
        return None

    seed_mask = np.zeros_like(peaks, dtype=bool)
    seed_mask[np.arange(len(pixels)), seeds] = True
    solid = difference > 0.5 * levels[:, None, None]
    whole = _connected(solid, seed_mask.reshape(solid.shape))
    area = whole.mean((1, 2))
    at_border = whole[:, _border(pixels.shape[1:3], 1)].mean(1)
    found = (levels > 0.5 * usual) & (area > _AREA_RANGE[0]) & (area < _AREA_RANGE[1]) & (at_border < _MAX_BORDER_SHARE)
    numbers = np.flatnonzero(found)
    if len(numbers) < _MIN_SEEN_SHARE * len(pixels):
        return None

    # Soft inside a margin of two pixels around the object, nothing beyond: that is where its antialiased edge is.
    near = _dilate(_dilate(whole[numbers]))
    masks = np.where(near, np.clip(difference[numbers] / levels[numbers, None, None], 0, 1), 0).astype(np.float32)
    track = _Track(numbers, masks, _centroids(masks))
    return track if max(_overlaps(track).values()) >= _MIN_OBJECT_OVERLAP else None


def _read_color(pixels: Floats) -> str | None:
    """The color of what stands out from the background, wherever it is: the name that most of it has, pixel by pixel,
    each counting by how far it stands out."""
    smooth = _box_blur(pixels, 1)
    background = np.median(smooth[:, _border(pixels.shape[1:3], 2)], axis=1)[:, None, None, :]
    difference = np.sqrt(np.square(smooth - background).sum(-1))
    # Edges that coding and blur have mixed stand out less than what they belong to.
    level = np.percentile(difference, 99)
    weight = np.where(difference > np.maximum(_MIN_CONTRAST, 0.7 * level), difference, 0)
    share = (weight > 0).mean()
    if not _AREA_RANGE[0] / 4 <= share <= _AREA_RANGE[1]:
        return None
    standing_out = pixels[weight > 0]
    votes = np.bincount(_nearest_hue(standing_out), weight[weight > 0], minlength=len(_HUES) + 1) / weight.sum()
    best = int(votes[:-1].argmax())
    # A colored ground, lighter here and darker there, is no colored object.
    has_plain_ground = np.ptp(background, axis=-1).mean() < _MAX_GROUND_CHROMA * np.ptp(standing_out, axis=-1).mean()
    return list(_HUES)[best] if votes[best] >= _MIN_AGREEMENT and has_plain_ground else None


def _nearest_hue(rgb_P3: Floats) -> NDArray[np.int64]:
    """For each of P pixels the number of its color in _HUES, or len(_HUES) for gray and for hues between them."""
    hue, saturation = _hue_and_saturation(rgb_P3)
    errors = np.stack([np.abs((hue - center + 180) % 360 - 180) for center in _HUES.values()])
    return np.where((saturation >= _MIN_SATURATION) & (errors.min(0) <= _MAX_HUE_ERROR), errors.argmin(0), len(_HUES))


def _hue_and_saturation(rgb_P3: Floats) -> tuple[Floats, Floats]:
    """Hue in degrees and saturation (0 to 1) of each of P pixels, as in HSV."""
    high, low = rgb_P3.max(1), rgb_P3.min(1)
    spread = np.maximum(high - low, 1e-6)
    red, green, blue = rgb_P3.T
    sector = np.select(
        [high == red, high == green],
        [(green - blue) / spread % 6, (blue - red) / spread + 2],
        (red - green) / spread + 4,
    )
    return sector * 60, (high - low) / np.maximum(high, 1e-6)


def _read_shape(track: _Track) -> str | None:
    overlaps = _overlaps(track)
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= _MIN_OVERLAP else None


def _overlaps(track: _Track) -> dict[str, float]:
    """For each shape: intersection over union of the object and the ideal shape of its area and place, the median
    over the frames."""
    # A blurred edge crosses one half where the sharp one was: made steep there, softness costs no shape its overlap.
    masks = np.clip((track.masks - 0.5) * _STEEPNESS + 0.5, 0, 1)
    centers = _centroids(masks)
    overlaps: dict[str, float] = {}
    for name in ("circle", "square", "triangle"):
        ideal = _ideal_masks(name, masks, centers)
        shared, united = np.minimum(ideal, masks).sum((1, 2)), np.maximum(ideal, masks).sum((1, 2))
        overlaps[name] = float(np.median(shared / united))
    return overlaps


def _ideal_masks(shape: str, masks: Floats, centers: Floats) -> Floats:
    """Masks [F, H, W] of the shape with these masks' areas and centroids, its edge as soft as one pixel."""
    area = masks.sum((1, 2))[:, None, None]
    height, width = masks.shape[1:]
    y = np.arange(height)[None, :, None] - centers[:, 0, None, None]
    x = np.arange(width)[None, None, :] - centers[:, 1, None, None]
    if shape == "circle":
        outside = np.hypot(y, x) - np.sqrt(area / np.pi)
    elif shape == "square":
        outside = np.maximum(np.abs(y), np.abs(x)) - np.sqrt(area) / 2
    else:  # equilateral, point up: inner radius r, area 3 sqrt(3) r^2
        radius = np.sqrt(area / (3 * np.sqrt(3)))
        outside = np.maximum(y, (np.sqrt(3) * np.abs(x) - y) / 2) - radius
    return np.clip(0.5 - outside, 0, 1).astype(np.float32)


def _read_motion(track: _Track, size: tuple[int, ...]) -> str | None:
    """The direction of the straight, steady movement through the centroids, fitted by least squares."""
    num_frames, height, width = size
    if num_frames < 2:
        return None
    short_side = min(height, width)
    times = (track.frames - track.frames.mean())[:, None]
    slope = (times * track.centers).sum(0) / np.square(times).sum()
    rest = track.centers - track.centers.mean(0) - times * slope
    if np.sqrt(np.square(rest).sum(1).mean()) > _MAX_WOBBLE * short_side:
        return None
    path_y, path_x = (float(value) * (num_frames - 1) / short_side for value in slope)
    along, across = max(abs(path_y), abs(path_x)), min(abs(path_y), abs(path_x))
    if along <= _STILL:
        return "still"
    if along < _MOVING or along < _MIN_STRAIGHTNESS * across:
        return None
    if abs(path_y) > abs(path_x):
        return "down" if path_y > 0 else "up"
    return "right" if path_x > 0 else "left"


def _border(size: tuple[int, ...], thickness: int) -> NDArray[np.bool_]:
    """Which pixels of a frame [H, W] lie within `thickness` of its border."""
    border = np.ones(size, dtype=bool)
    border[thickness:-thickness, thickness:-thickness] = False
    return border


def _centroids(masks: Floats) -> Floats:
    """(y, x) [F, 2] of soft masks [F, H, W], in pixel indices."""
    total = masks.sum((1, 2))
    y = (masks.sum(2) * np.arange(masks.shape[1])).sum(1) / total
    x = (masks.sum(1) * np.arange(masks.shape[2])).sum(1) / total
    return np.stack([y, x], axis=1)


def _box_blur(values: Floats, radius: int) -> Floats:
    """Mean over windows of 2 radius + 1 rows and columns of [T, H, W, C]; borders repeat."""
    side = 2 * radius + 1
    for axis in (1, 2):
        pad = [(0, 0)] * values.ndim
        pad[axis] = (radius + 1, radius)
        sums = np.cumsum(np.pad(values, pad, mode="edge"), axis=axis, dtype=np.float64)
        upper = np.take(sums, range(side, sums.shape[axis]), axis=axis)
        lower = np.take(sums, range(sums.shape[axis] - side), axis=axis)
        values = ((upper - lower) / side).astype(np.float32)
    return values


def _dilate(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[T, H, W], grown by one pixel to the four sides."""
    grown = mask.copy()
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    grown[:, :, 1:] |= mask[:, :, :-1]
    grown[:, :, :-1] |= mask[:, :, 1:]
    return grown


def _connected(solid: NDArray[np.bool_], seed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The part of `solid` [T, H, W] connected with `seed` within each frame."""
    reached = seed & solid
    while True:
        grown = _dilate(reached) & solid
        if (grown == reached).all():
            return reached
        reached = grown
