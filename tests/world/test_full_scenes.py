"""Level `full`: everything that curation has to find its way in, with the truth about it checked against the pixels."""

from collections import defaultdict

import numpy as np
import pytest

from sora_train.config.world import Level
from sora_train.world.render import render
from sora_train.world.sampling import Event, event_of, sample_scene
from sora_train.world.scene import CameraMove, Texture, shot_seconds, truth
from sora_train.world.words import COLORS, HELD_OUT

SEED = 9


@pytest.fixture(scope="module")
def scenes():
    by_event = defaultdict(list)
    for index in range(240):
        by_event[event_of(SEED, index)].append(sample_scene(SEED, index, Level.full))
    return by_event


def is_color(frames, color):
    """Which pixels show the plain color of an object, [T, H, W]."""
    return np.abs(frames.astype(int) - COLORS[color]).max(-1) <= 2


def test_corpus_holds_everything_in_equal_parts(scenes):
    assert {event: len(found) for event, found in scenes.items()} == dict.fromkeys(Event, 40)
    every = [scene for found in scenes.values() for scene in found]
    assert len({(scene.height, scene.width) for scene in every}) >= 6
    assert len({scene.height / scene.width for scene in every}) >= 3
    assert {scene.fps for scene in every} == {8, 16}
    lengths = {scene.num_frames for scene in every}
    assert min(lengths) == 1
    assert max(lengths) == 33
    assert {shot.background.texture for scene in every for shot in scene.shots} == set(Texture)
    assert {shot.camera.move for scene in every for shot in scene.shots} == set(CameraMove)
    assert {truth(scene)["count"] for scene in every} >= {1, 2, 3, 4}


def test_pixels_are_reproducible():
    for index in range(12):
        first, again = (render(sample_scene(SEED, index, Level.full)) for _ in range(2))
        np.testing.assert_array_equal(first, again)


def test_objects_are_seen_in_the_frames_that_truth_names(scenes):
    for event in (Event.several, Event.count_change):
        for scene in scenes[event][:12]:
            frames, told = render(scene), truth(scene)
            for color in COLORS:
                seen = is_color(frames, color).any((1, 2))
                expected = np.zeros(scene.num_frames, bool)
                for item in told["objects"]:
                    if item["color"] == color:
                        visible = set(range(*item["frames"])) - set(item["hidden_frames"])
                        expected[list(visible)] = True
                np.testing.assert_array_equal(seen, expected)


def test_bouncing_object_turns_and_stays_inside(scenes):
    for scene in scenes[Event.bounce]:
        (item,) = truth(scene)["objects"]
        assert item["motion"] == "bouncing"
        assert item["bounces"] >= 1
        (shot,) = scene.shots
        (figure,) = shot.figures
        y, x = figure.centers(shot_seconds(shot, scene.fps), scene.height, scene.width)
        up, down, side = figure.reach
        assert y.min() >= up - 1e-9
        assert y.max() <= scene.height - down + 1e-9
        assert x.min() >= side - 1e-9
        assert x.max() <= scene.width - side + 1e-9
        # Turned back: it never gets as far as its whole path is long.
        assert np.ptp(x) < abs(figure.velocity_x) * (scene.num_frames - 1) / scene.fps or figure.velocity_y


def test_occluded_object_vanishes_and_comes_out_again(scenes):
    for scene in scenes[Event.occlusion]:
        (item,) = truth(scene)["objects"]
        hidden = item["hidden_frames"]
        assert hidden
        assert 0 < hidden[0] <= hidden[-1] < scene.num_frames - 1
        seen = is_color(render(scene), item["color"]).sum((1, 2))
        assert (seen[hidden] == 0).all()
        assert seen[0] > 20
        assert seen[-1] > 20


def test_count_changes_once(scenes):
    for scene in scenes[Event.count_change]:
        counts = np.array(truth(scene)["count_per_frame"])
        changes = np.flatnonzero(np.diff(counts))
        assert len(changes) == 1
        assert abs(counts[-1] - counts[0]) == 1
        assert counts.min() >= 1
        assert scene.num_frames / 4 < changes[0] + 1 <= scene.num_frames * 0.75


def test_cut_is_the_largest_change_of_the_clip(scenes):
    for scene in scenes[Event.cut]:
        (cut,) = truth(scene)["cuts"]
        change = np.abs(np.diff(render(scene).astype(int), axis=0)).mean((1, 2, 3))
        assert change.argmax() + 1 == cut
        assert change.max() > 60
        assert np.delete(change, cut - 1).max() < 15
        assert min(cut, scene.num_frames - cut) >= 15  # long enough for a detector's shortest scene


def test_camera_moves_the_ground_as_told(scenes):
    for scene in scenes[Event.camera]:
        frames = render(scene).astype(float).mean(-1)
        assert (np.abs(np.diff(frames, axis=0)).mean((1, 2)) > 0).all()
        move, rate = scene.shots[0].camera.move, scene.shots[0].camera.rate
        step = rate / scene.fps
        if move in (CameraMove.pan_left, CameraMove.pan_right):
            # Panning right brings in what was on the right: frame 1, moved right by the step, is frame 0.
            sign = 1 if move is CameraMove.pan_right else -1
            columns = np.arange(scene.width)
            error = {}
            for direction in (sign, -sign):
                moved = np.stack([np.interp(columns + direction * step, columns, row) for row in frames[0]])
                error[direction] = np.abs(moved - frames[1])[:, 8:-8].mean()
            assert error[sign] < error[-sign]
        elif len({figure.color for figure in scene.shots[0].figures}) == len(scene.shots[0].figures):
            # Zooming scales every object's area by the square of the camera's scale.
            growth = np.exp((1 if move is CameraMove.zoom_in else -1) * step * (scene.num_frames - 1))
            for figure in scene.shots[0].figures:
                area = is_color(render(scene), figure.color).sum((1, 2))
                assert (growth > 1) == (area[-1] > area[0])
                np.testing.assert_allclose(area[-1] / area[0], growth**2, rtol=0.25)


def test_held_out_triples_never_appear():
    for index in range(120):
        for shot in sample_scene(SEED, index, Level.full, exclude_held_out=True).shots:
            assert not {(item.color, item.shape, item.motion) for item in shot.figures} & HELD_OUT
