"""Draws scenes: `sample_scene` is a pure function of (seed, index, level), so any clip of a corpus can be made alone.

What must be evenly spread (the triples of `simple`, the events of `full`) goes through shuffled blocks instead of
independent draws: each block of indices holds every value once. What happens in the events stands in world.events.
"""

from collections.abc import Sequence
from enum import Enum
from typing import TypeVar

import numpy as np

from sora_train.config.world import Level
from sora_train.world import events
from sora_train.world.placing import PLAIN_RGB, Generator, choice, moving_figure
from sora_train.world.scene import Background, Scene, Shot, Texture
from sora_train.world.words import HELD_OUT, TRIPLES, Triple

Value = TypeVar("Value")

# (height, width); every width is one that decord reads.
SIMPLE_SIZES = ((64, 64), (64, 80), (80, 64), (80, 80), (64, 112), (112, 64))
FULL_SIZES = (*SIMPLE_SIZES, (128, 128), (80, 128), (128, 80), (112, 160))
_FIRST_SIZE_SHARE = 0.4  # of `simple`: 64 x 64, the cheapest to train on; the others share the rest
_IMAGE_SHARE = 0.15
_LONG_SHARE = 0.15  # of the videos of `simple`: two seconds instead of one


class Event(Enum):
    """What happens in a clip of level `full`."""

    several = "several"  # one to four objects, each with a motion of its own; also images
    bounce = "bounce"
    occlusion = "occlusion"
    count_change = "count change"
    cut = "cut"
    camera = "camera"


def sample_scene(seed: int, index: int, level: Level, exclude_held_out: bool = False) -> Scene:
    """The scene of clip `index` of the corpus `seed`.

    exclude_held_out: no object has a (color, shape, motion) of words.HELD_OUT.
    """
    rng = np.random.default_rng([seed, index, 1])
    triples = tuple(triple for triple in TRIPLES if not (exclude_held_out and triple in HELD_OUT))
    if level is Level.simple:
        return _simple_scene(rng, _spread(seed, index, triples))
    height, width = choice(rng, FULL_SIZES)
    return _full_scene(_spread(seed, index, tuple(Event)), rng, height, width, triples)


def event_of(seed: int, index: int) -> Event:
    """What `sample_scene(seed, index, Level.full)` shows."""
    return _spread(seed, index, tuple(Event))


def _simple_scene(rng: Generator, triple: Triple) -> Scene:
    """One object on a plain background, clear of the borders; 1, 9, 17 or 33 frames, mostly one second."""
    height, width = SIMPLE_SIZES[0] if rng.random() < _FIRST_SIZE_SHARE else choice(rng, SIMPLE_SIZES[1:])
    fps = choice(rng, (8, 16))
    seconds = 2 if rng.random() < _LONG_SHARE else 1
    if rng.random() < _IMAGE_SHARE:
        seconds = 0
    # A training clip may be the middle second of two, so the longer path is also the faster than half.
    travel = rng.uniform(0.45, 0.55) if seconds == 2 else rng.uniform(0.3, 0.45)
    diameter = rng.uniform(0.36, 0.44) * min(height, width)
    figure = moving_figure(rng, triple, diameter, travel, float(seconds), height, width)
    rgb = choice(rng, PLAIN_RGB)
    num_frames = 1 + seconds * fps
    shot = Shot(0, num_frames, Background(Texture.plain, rgb, rgb, 1.0), (figure,))
    return Scene(height, width, num_frames, fps, (shot,))


def _full_scene(event: Event, rng: Generator, height: int, width: int, triples: Sequence[Triple]) -> Scene:
    if event is Event.several:
        return events.several(rng, height, width, triples)
    if event is Event.bounce:
        return events.bounce(rng, height, width, triples)
    if event is Event.occlusion:
        return events.occlusion(rng, height, width, triples)
    if event is Event.count_change:
        return events.count_change(rng, height, width, triples)
    if event is Event.cut:
        return events.cut(rng, height, width, triples)
    return events.camera_move(rng, height, width, triples)


def _spread(seed: int, index: int, values: Sequence[Value]) -> Value:
    """A value for `index`: each block of len(values) indices holds each once, in a random order of its own."""
    block, place = divmod(index, len(values))
    return values[int(np.random.default_rng([seed, block, 2]).permutation(len(values))[place])]
