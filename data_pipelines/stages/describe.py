"""Words for what the pixel captioner saw: drawn objects by colour, shape and motion, real footage by its colours,
light and movement, and nothing that was not seen.

`describe` is the captioner. One drawn object gives the short form "a red circle moving left", "a red circle standing
still", and in a single frame "a red circle".
"""

from dataclasses import dataclass

import cv2
import numpy as np

from data_pipelines.record import Frames, View
from data_pipelines.stages.filter_quality import LUMA
from data_pipelines.stages.see_camera import STATIC, CameraMotion, find_camera
from data_pipelines.stages.see_objects import MIN_CHROMA, Track, chroma, find_tracks, hue_names, names

MODEL = "pixel-captioner-1"
STILL_SHARE = 0.045  # of the shorter side: a smaller displacement is no motion
RETURN_SHARE = 0.035  # of the shorter side: coming back by more than this is bouncing
_COUNTS = ("no", "one", "two", "three", "four", "five", "six")
_CAMERA = {
    "pan left": "panning left",
    "pan right": "panning right",
    "tilt up": "tilting up",
    "tilt down": "tilting down",
    "zoom in": "zooming in",
    "zoom out": "zooming out",
}


@dataclass(frozen=True)
class SeenObject:
    """One drawn object."""

    color: str
    shape: str
    motion: str | None  # left, right, up, down, "up and left", …, still, bouncing; None in a single frame
    place: str  # where it is at first: "left", "upper right", "middle", …
    size: str  # small, medium-sized, large
    event: str = ""  # "appears", "disappears", "passes out of sight and comes back"


@dataclass(frozen=True)
class Seen:
    """What the captioner saw in a drawn scene."""

    objects: tuple[SeenObject, ...]
    camera: str  # see CameraMotion.name
    ground: str  # "a plain dark gray background"


def describe(view: View) -> tuple[str, str]:
    """The short and the dense caption of a clip."""
    seen = see(view.frames)
    if seen is None:
        return describe_footage(view)
    return short_caption(seen), dense_caption(seen)


def see(frames: Frames) -> Seen | None:
    """Reads a drawn scene [T, h, w, 3]; None when it is not one."""
    tracks = find_tracks(frames)
    if tracks is None:
        return None
    coloured = frames.max(axis=3) - frames.min(axis=3) > MIN_CHROMA // 2
    kernel = np.ones((5, 5), np.uint8)
    ignore = np.stack([cv2.dilate(mask.astype(np.uint8), kernel) > 0 for mask in coloured])
    camera, _ = find_camera(frames, ignore)
    objects = tuple(_read(track, camera, frames.shape) for track in tracks)
    return Seen(objects, camera.name, _ground(frames, ignore))


def _read(track: Track, camera: CameraMotion, shape: tuple[int, ...]) -> SeenObject:
    num_frames, height, width = shape[:3]
    assert track.shape is not None
    first = track.blobs[0]
    motion = None if num_frames == 1 else _motion(track, camera, height, width)
    extent = float(np.sqrt(track.area)) / min(height, width)
    return SeenObject(
        color=track.color,
        shape=track.shape,
        motion=motion,
        place=_place(first.y / height, first.x / width),
        size="small" if extent < 0.2 else "medium-sized" if extent < 0.3 else "large",
        event=_event(track, num_frames),
    )


def _motion(track: Track, camera: CameraMotion, height: int, width: int) -> str:
    """The object's own motion: the camera's is taken out first."""
    path = np.array(
        [
            camera.undo(blob.y, blob.x, frame, height, width)
            for frame, blob in zip(track.frames, track.blobs, strict=True)
        ]
    )
    start, end = path[0], path[-1]
    side = min(height, width)
    beyond = np.maximum(path.max(axis=0) - np.maximum(start, end), np.minimum(start, end) - path.min(axis=0))
    if beyond.max() > max(1.5, RETURN_SHARE * side):
        return "bouncing"
    down, right = end - start
    if max(abs(down), abs(right)) <= max(1.0, STILL_SHARE * side):
        return "still"
    vertical = "down" if down > 0 else "up"
    horizontal = "right" if right > 0 else "left"
    if min(abs(down), abs(right)) > 0.5 * max(abs(down), abs(right)):
        return f"{vertical} and {horizontal}"
    return vertical if abs(down) > abs(right) else horizontal


def _event(track: Track, num_frames: int) -> str:
    if track.frames[0] > 0:
        return "appears"
    if track.frames[-1] < num_frames - 1:
        return "disappears"
    if len(track.frames) < num_frames:
        return "passes out of sight and comes back"
    return ""


def _place(y: float, x: float) -> str:
    row = "upper" if y < 0.38 else "lower" if y > 0.62 else ""
    column = "left" if x < 0.38 else "right" if x > 0.62 else ""
    if row and column:
        return f"{row} {column}"
    return {"upper": "top", "lower": "bottom"}.get(row, "") or column or "middle"


def _ground(frames: Frames, ignore: np.ndarray) -> str:
    pixels = frames[~ignore].astype(np.float32)
    if not len(pixels):
        return "the whole frame"
    spread = float((pixels @ LUMA).std())
    kind = "a plain" if spread < 6 else "a patterned"
    return f"{kind} {shade_name(pixels.mean(axis=0))} background"


def shade_name(rgb: np.ndarray) -> str:
    """A name for a colour of little chroma, by its lightness and tint."""
    light = float(rgb @ LUMA)
    shade = next(
        name
        for edge, name in ((35, "black"), (90, "dark gray"), (150, "gray"), (210, "light gray"), (256, "white"))
        if light < edge
    )
    red, green, blue = (float(value) for value in rgb)
    if blue - red > 8:
        return f"bluish {shade}"
    if red - blue > 8:
        return f"brownish {shade}"
    return f"greenish {shade}" if green - max(red, blue) > 8 else shade


def short_caption(seen: Seen) -> str:
    """One phrase an object, and the camera when it moves."""
    phrases = [_phrase(item) for item in seen.objects]
    text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return text if seen.camera == STATIC else f"{text}, the camera {_CAMERA[seen.camera]}"


def _phrase(item: SeenObject) -> str:
    article = "an" if item.color[0] in "aeiou" else "a"
    noun = f"{article} {item.color} {item.shape}"
    if item.motion is None:
        return noun
    if item.motion == "still":
        return f"{noun} standing still"
    return f"{noun} bouncing" if item.motion == "bouncing" else f"{noun} moving {item.motion}"


def dense_caption(seen: Seen) -> str:
    """Sentences: every object with size, place, motion and what happens to it; the ground; count and camera."""
    sentences = []
    for item in seen.objects:
        verb = {None: "is", "still": "stands still", "bouncing": "bounces"}.get(item.motion, f"moves {item.motion}")
        where = f"in the {item.place} of the frame"
        start = where if item.motion in (None, "still") else f"starting {where}"
        event = f"; it {item.event}" if item.event else ""
        sentences.append(f"A {item.size} {item.color} {item.shape} {verb} {start}{event}.")
    count = len(seen.objects)
    things = f"{_COUNTS[count]} object{'s' if count > 1 else ''}".capitalize()
    sentences.append(f"{things} on {seen.ground}.")
    if any(item.motion is not None for item in seen.objects):
        camera = "still" if seen.camera == STATIC else _CAMERA[seen.camera]
        sentences.append(f"The camera is {camera}.")
    return " ".join(sentences)


def describe_footage(view: View) -> tuple[str, str]:
    """Short and dense caption of anything else: colours, light, amount and direction of movement."""
    frames = view.frames
    colors = dominant_colors(frames)
    luma = frames.astype(np.float32) @ LUMA
    light = "dark" if luma.mean() < 70 else "bright" if luma.mean() > 165 else "evenly lit"
    contrast = "low" if luma.std() < 30 else "high" if luma.std() > 65 else "medium"
    mostly = " and ".join(colors[:2])
    if len(frames) == 1:
        short = f"a {light} picture, mostly {mostly}"
        return short.replace("a evenly", "an evenly"), (
            f"A single picture, {light}, with {contrast} contrast. The main colors are {_list(colors)}."
        )
    camera, _ = find_camera(frames, np.zeros(frames.shape[:3], bool))
    change = float(np.abs(np.diff(luma, axis=0)).mean())
    amount = "hardly any" if change < 1.0 else "little" if change < 4.0 else "some" if change < 10.0 else "much"
    moving = "" if camera.name == STATIC else f", the camera {_CAMERA[camera.name]}"
    short = f"a {light} scene, mostly {mostly}, with {amount} movement{moving}".replace("a evenly", "an evenly")
    # A still picture proves a still camera; a moving one without a common direction proves nothing.
    of_camera = (
        f" The camera is {_CAMERA[camera.name]}."
        if camera.name != STATIC
        else " The camera is still."
        if change < 2.5
        else ""
    )
    dense = (
        f"A scene, {light}, with {contrast} contrast and {amount} movement. "
        f"The main colors are {_list(colors)}.{of_camera}"
    )
    return short, dense


def dominant_colors(frames: Frames, most: int = 3) -> list[str]:
    """Names of the colours that cover most of a clip, the largest share first; at least one."""
    few = frames[:: max(1, len(frames) // 4), ::2, ::2]
    pixels = few.reshape(1, -1, 3)
    strength = chroma(pixels)[0]
    light = pixels[0].astype(np.float32) @ LUMA
    hues = hue_names(pixels)[0]
    shares: dict[str, int] = {}
    grays = strength < 32
    for name, mask in (
        ("black", grays & (light < 45)),
        ("gray", grays & (light >= 45) & (light < 190)),
        ("white", grays & (light >= 190)),
        *((name, ~grays & (hues == place)) for place, name in enumerate(names())),
    ):
        shares[name] = shares.get(name, 0) + int(np.count_nonzero(mask))
    # Dark orange is what people call brown.
    brown = int(np.count_nonzero(~grays & (hues == names().index("orange")) & (light < 130)))
    shares["orange"] -= brown
    shares["brown"] = brown
    ranked = sorted(shares, key=lambda name: -shares[name])
    total = pixels.shape[1]
    return [ranked[0], *(name for name in ranked[1:most] if shares[name] > 0.08 * total)]


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
