"""Level `simple`: what the demo trains on. Properties are read from pixels where pixels can tell."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from sora_train.config.world import Level
from sora_train.world.render import render
from sora_train.world.sampling import SIMPLE_SIZES, sample_scene
from sora_train.world.scene import screen_centers, shot_seconds, truth
from sora_train.world.words import COLORS, HELD_OUT, TRIPLES

SEED = 5


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(SEED, index, Level.simple) for index in range(600)]


def object_of(scene):
    (figure,) = scene.shots[0].figures
    return figure


def coverage(scene, frames):
    """Share of each pixel covered by the object, from its color's distance to the background's: [T, H, W]."""
    background = np.array(scene.shots[0].background.rgb, float)
    direction = np.array(COLORS[object_of(scene).color], float) - background
    return ((frames - background) @ direction) / (direction @ direction)


def digest(frames):
    return hashlib.sha256(frames.tobytes()).hexdigest()


def test_same_seed_same_pixels_and_another_seed_others():
    first = [digest(render(sample_scene(SEED, index, Level.simple))) for index in range(20)]
    # Out of order: a clip depends on its own index alone.
    again = [digest(render(sample_scene(SEED, index, Level.simple))) for index in reversed(range(20))]
    assert first == again[::-1]
    assert len(set(first)) == 20
    assert digest(render(sample_scene(SEED + 1, 0, Level.simple))) != first[0]


def test_every_triple_is_equally_frequent(scenes):
    triples = Counter((item.color, item.shape, item.motion) for item in map(object_of, scenes))
    assert triples == dict.fromkeys(TRIPLES, 10)


def test_held_out_triples_never_appear_and_the_rest_stays_even():
    scenes = [sample_scene(SEED, index, Level.simple, exclude_held_out=True) for index in range(500)]
    triples = Counter((item.color, item.shape, item.motion) for item in map(object_of, scenes))
    assert triples == dict.fromkeys(set(TRIPLES) - HELD_OUT, 10)


def test_sizes_lengths_and_rates(scenes):
    sizes = Counter((scene.height, scene.width) for scene in scenes)
    assert set(sizes) == set(SIMPLE_SIZES)
    assert len({height / width for height, width in sizes}) >= 3
    assert all(side % 8 == 0 for size in sizes for side in size)
    assert {scene.fps for scene in scenes} == {8, 16}
    assert {scene.num_frames for scene in scenes} == {1, 9, 17, 33}
    images = [scene for scene in scenes if scene.num_frames == 1]
    assert 0.11 < len(images) / len(scenes) < 0.19
    one_second = [scene for scene in scenes if scene.num_frames == 1 + scene.fps]
    assert len(one_second) > 0.6 * len(scenes)  # nine frames at eight frames a second
    assert all(truth(scene)["objects"][0]["motion"] is None for scene in images)


def test_object_moves_as_told_at_least_a_quarter_of_the_frame_in_any_second(scenes):
    for scene in scenes:
        figure, seconds = object_of(scene), (scene.num_frames - 1) / scene.fps
        if seconds == 0:
            continue
        seconds_T = shot_seconds(scene.shots[0], scene.fps)
        y, x, _ = screen_centers(figure, scene.shots[0].camera, seconds_T, scene.height, scene.width)
        path = np.array([(y[-1] - y[0]) / scene.height, (x[-1] - x[0]) / scene.width])
        sign = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}[figure.motion]
        np.testing.assert_array_equal(np.sign(path), sign)
        if figure.motion != "still":
            assert np.abs(path).max() >= (0.3 if seconds == 1 else 0.43)
            assert np.abs(path).max() / seconds >= 0.21


def test_pixels_show_the_object_where_the_scene_puts_it(scenes):
    for scene in scenes[:60]:
        figure, frames = object_of(scene), render(scene)
        assert frames.shape == (scene.num_frames, scene.height, scene.width, 3)
        assert frames.dtype == np.uint8
        seen = coverage(scene, frames)
        # Off the border, in every frame.
        inner = np.zeros(seen.shape[1:], bool)
        inner[1:-1, 1:-1] = True
        assert np.abs(seen[:, ~inner]).max() < 0.02
        # Centroid to a twentieth of a pixel (pixel centres lie at + 0.5), area to two per cent.
        rows, columns = np.arange(scene.height) + 0.5, np.arange(scene.width) + 0.5
        total = seen.sum((1, 2))
        y, x = figure.centers(shot_seconds(scene.shots[0], scene.fps), scene.height, scene.width)
        np.testing.assert_allclose((seen.sum(2) @ rows) / total, y, atol=0.05)
        np.testing.assert_allclose((seen.sum(1) @ columns) / total, x, atol=0.05)
        diameter = figure.diameter
        area = {
            "circle": np.pi / 4 * diameter**2,
            "square": (0.88 * diameter) ** 2,
            "triangle": 3 * np.sqrt(3) / 4 * (0.62 * diameter) ** 2,
        }[figure.shape]
        np.testing.assert_allclose(total, area, rtol=0.02)
        assert 0.33 * min(seen.shape[1:]) < diameter < 0.47 * min(seen.shape[1:])
