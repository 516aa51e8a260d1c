"""Finds drawn objects in a clip's pixels: strongly coloured, evenly filled figures before a ground of little colour.

First half of the pixel captioner. It answers only when the whole picture is of that kind: real footage, where colour
is uneven and outlines are nobody's geometry, gives None and is described by other words. Shares nothing with the
scorer in sora_train/world/score.py: one error must not hide the other.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipelines.record import Frames

Array = NDArray[np.float32]

# Upper ends of the ranges of hue, in degrees.
HUES = ((18, "red"), (42, "orange"), (72, "yellow"), (165, "green"), (200, "cyan"), (260, "blue"), (290, "purple"))
LAST_HUES = ((335, "pink"), (361, "red"))
MIN_CHROMA = 60  # max - min of RGB, of a pixel that may belong to an object
MIN_OBJECT_CHROMA = 90  # of an object's inside
GROUND_CHROMA = 45  # more than this between objects, and the ground is no plain ground
MIN_AREA_SHARE = 0.004  # of the frame
MAX_OBJECTS = 6
HUE_SHARE = 0.2  # of a region's inside: less is the rim of another hue
MAX_UNEVENNESS = 14.0  # median distance of RGB inside an object from its median
EVEN_SHARE = 0.6  # of the frames in which an object must be even
MIN_FIT = 0.8  # share of the best enclosing outline that an object fills
ENLARGE = 4  # outlines are traced between pixels


@dataclass(frozen=True)
class Blob:
    """One coloured region in one frame."""

    color: str
    y: float  # centroid, pixels
    x: float
    area: float  # pixels
    fits: tuple[float, float, float]  # share it fills of the smallest circle, rectangle and triangle around it
    is_even: bool
    touches_border: bool


@dataclass
class Track:
    """One object through time."""

    color: str
    frames: list[int] = field(default_factory=list)
    blobs: list[Blob] = field(default_factory=list)

    @property
    def area(self) -> float:
        """Its area where most of it is seen, pixels."""
        return float(np.percentile([blob.area for blob in self.blobs], 80))

    @property
    def shape(self) -> str | None:
        """Its outline, read where most of it is seen; None when it is none of the three."""
        whole = [blob for blob in self.blobs if blob.area >= 0.85 * self.area] or self.blobs
        fits = np.median([blob.fits for blob in whole], axis=0)
        best = int(np.argmax(fits))
        return ("circle", "square", "triangle")[best] if fits[best] >= MIN_FIT else None


def hue_names(frame: Frames) -> NDArray[np.uint8]:
    """For each pixel the place of its hue's name in `names()`, [h, w]."""
    degrees = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV_FULL)[..., 0].astype(np.float32) * (360 / 256)
    edges = [edge for edge, _ in HUES + LAST_HUES]
    places = np.array([names().index(name) for _, name in HUES + LAST_HUES], np.uint8)
    return places[np.searchsorted(edges, degrees, side="right")]


def names() -> list[str]:
    """Names of the hues, each once."""
    return [name for _, name in HUES + LAST_HUES[:1]]


def chroma(frame: Frames) -> NDArray[np.uint8]:
    """max - min of RGB, [h, w]."""
    return frame.max(axis=2) - frame.min(axis=2)


def find_blobs(frame: Frames) -> list[Blob] | None:
    """The coloured regions of a frame; None when the frame is not a drawn one."""
    strength = chroma(frame)
    hues = hue_names(frame)
    taken = np.zeros(strength.shape, np.uint8)
    blobs: list[Blob] = []
    count, labels, stats, _ = cv2.connectedComponentsWithStats((strength > MIN_CHROMA).astype(np.uint8), connectivity=8)
    for label in range(1, count):
        if stats[label, cv2.CC_STAT_AREA] < MIN_AREA_SHARE * strength.size:
            continue
        region = labels == label
        taken[region] = 1
        for color, part in _split_by_hue(region, hues):
            blob = _measure(frame, strength, part, color)
            if blob is not None:
                blobs.append(blob)
        if len(blobs) > MAX_OBJECTS:
            return None
    around = cv2.dilate(taken, np.ones((7, 7), np.uint8)) == 0
    coloured = np.count_nonzero(strength[around] > GROUND_CHROMA) if around.any() else strength.size
    if coloured > 0.01 * strength.size:
        return None
    return blobs


def _split_by_hue(region: NDArray[np.bool_], hues: NDArray[np.uint8]) -> list[tuple[str, NDArray[np.bool_]]]:
    """The region whole under the hue of its inside, or in parts where objects of different colours touch. At the rim
    coding blends hues (yellow into gray looks green), so only the inside votes."""
    inside = _inside(region)
    votes = np.bincount(hues[inside], minlength=len(names()))
    winners = np.flatnonzero(votes >= max(6, HUE_SHARE * votes.sum()))
    if len(winners) < 2:
        return [(names()[int(votes.argmax())], region)]
    return [(names()[winner], region & (hues == winner)) for winner in winners]


def _inside(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The region without its rim, as deep as its size allows."""
    for size in (5, 3):
        inside = cv2.erode(region.astype(np.uint8), np.ones((size, size), np.uint8)) > 0
        if np.count_nonzero(inside) >= 9:
            return inside
    return region


def _measure(frame: Frames, strength: NDArray[np.uint8], region: NDArray[np.bool_], color: str) -> Blob | None:
    inside = _inside(region)
    if inside is region:
        return None  # a sliver: something that comes out from behind something else
    level = float(np.median(strength[inside]))
    if level < MIN_OBJECT_CHROMA:
        return None
    rows, columns = np.nonzero(region)
    top, bottom = max(0, rows.min() - 2), min(region.shape[0], rows.max() + 3)
    left, right = max(0, columns.min() - 2), min(region.shape[1], columns.max() + 3)
    # The outline is where colour has fallen to half; neighbours of another region are left out.
    near = cv2.dilate(region.astype(np.uint8), np.ones((3, 3), np.uint8))[top:bottom, left:right]
    soft = np.where(near > 0, strength[top:bottom, left:right], 0).astype(np.float32)
    large = cv2.resize(soft, None, fx=ENLARGE, fy=ENLARGE, interpolation=cv2.INTER_CUBIC)
    outlines, _ = cv2.findContours((large > level / 2).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(outlines, key=cv2.contourArea, default=None)
    if outline is None or len(outline) < 4:
        return None
    moments = cv2.moments(outline)
    if moments["m00"] <= 0:
        return None
    area = moments["m00"]
    _, radius = cv2.minEnclosingCircle(outline)
    _, (side_a, side_b), _ = cv2.minAreaRect(outline)
    triangle_area, _ = cv2.minEnclosingTriangle(outline)
    fits = (area / (np.pi * radius**2), area / max(side_a * side_b, 1.0), area / max(triangle_area, 1.0))
    height, width = region.shape
    return Blob(
        color=color,
        y=top + moments["m01"] / area / ENLARGE,
        x=left + moments["m10"] / area / ENLARGE,
        area=area / ENLARGE**2,
        fits=fits,
        is_even=_unevenness(frame[inside]) <= MAX_UNEVENNESS,
        touches_border=bool(top == 0 or left == 0 or bottom == height or right == width),
    )


def _unevenness(pixels: Frames) -> float:
    values = pixels.astype(np.float32)
    return float(np.median(np.abs(values - np.median(values, axis=0)), axis=0).max())


def find_tracks(frames: Frames) -> list[Track] | None:
    """The objects of a clip [T, h, w, 3], in order of size; None when it is no drawn scene, or an empty one."""
    height, width = frames.shape[1:3]
    tracks: list[Track] = []
    for index, frame in enumerate(frames):
        blobs = find_blobs(frame)
        if blobs is None:
            return None
        _extend(tracks, blobs, index, reach=0.4 * max(height, width))
    if not tracks:
        return None
    # What is seen in a frame or two of many, or never wholly, is a fragment of something else.
    enough = min(len(frames), max(2, len(frames) // 8))
    largest = max(track.area for track in tracks)
    tracks = [track for track in tracks if len(track.frames) >= enough and track.area > 0.1 * largest]
    # A figure half hidden blends with what hides it, for a few frames; an uneven thing is uneven all the time.
    if not tracks or any(np.mean([blob.is_even for blob in track.blobs]) < EVEN_SHARE for track in tracks):
        return None
    if any(track.shape is None for track in tracks):
        return None
    return sorted(tracks, key=lambda track: -track.area)


def _extend(tracks: list[Track], blobs: list[Blob], index: int, reach: float) -> None:
    """Gives each blob to the nearest track of its colour, nearest pairs first; what is left begins a track."""
    pairs = sorted(
        (np.hypot(track.blobs[-1].y - blob.y, track.blobs[-1].x - blob.x), place, number)
        for place, track in enumerate(tracks)
        for number, blob in enumerate(blobs)
        if track.color == blob.color
    )
    used_tracks: set[int] = set()
    used_blobs: set[int] = set()
    for distance, place, number in pairs:
        if place in used_tracks or number in used_blobs or distance > reach:
            continue
        used_tracks.add(place)
        used_blobs.add(number)
        tracks[place].frames.append(index)
        tracks[place].blobs.append(blobs[number])
    tracks += [Track(blob.color, [index], [blob]) for number, blob in enumerate(blobs) if number not in used_blobs]
