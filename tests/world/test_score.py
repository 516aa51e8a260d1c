"""The scorer: right on coded and on spoilt clips, silent where nothing is to be read."""

import io

import av
import numpy as np
import pytest

from data_pipelines.world import encode_mp4
from sora_train.config.world import Level
from sora_train.world.render import render
from sora_train.world.sampling import sample_scene
from sora_train.world.scene import truth
from sora_train.world.score import Reading, score_clip, share_correct

NOTHING = Reading(None, None, None)


def simple_clip(index, seed=21):
    scene = sample_scene(seed, index, Level.simple)
    (item,) = truth(scene)["objects"]
    return render(scene), scene.fps, Reading(item["color"], item["shape"], item["motion"])


def coded(frames, fps):
    with av.open(io.BytesIO(encode_mp4(frames, fps))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def blurred(frames, radius):
    """Box blur, [T, H, W, 3] float."""
    soft = frames.astype(float)
    for axis in (1, 2):
        soft = np.mean([np.roll(soft, shift, axis) for shift in range(-radius, radius + 1)], axis=0)
    return soft


@pytest.fixture(scope="module")
def clip():
    """Nine frames of an object that moves to the left."""
    frames, _, reading = next(
        item for item in map(simple_clip, range(100)) if len(item[0]) == 9 and item[2].motion == "left"
    )
    return frames, reading


def test_reads_coded_clips():
    clips = [simple_clip(index) for index in range(100)]
    readings = [score_clip(coded(frames, fps)) for frames, fps, _ in clips]
    shares = share_correct(readings, [wanted for _, _, wanted in clips])
    assert min(shares.values()) >= 0.99, shares


def test_reads_soft_noisy_tinted_clips():
    rng = np.random.default_rng(0)
    readings, wanted = [], []
    for index in range(60):
        frames, _, reading = simple_clip(index, seed=22)
        spoilt = blurred(frames, 2) * rng.uniform(0.85, 1.15, 3) * 0.7 + 30 + rng.normal(0, 12, frames.shape)
        readings.append(score_clip(np.clip(spoilt, 0, 255).astype(np.uint8)))
        wanted.append(reading)
    shares = share_correct(readings, wanted)
    assert min(shares.values()) >= 0.98, shares


def test_follows_the_pixels_not_the_truth(clip):
    frames, reading = clip
    assert score_clip(frames) == reading
    assert score_clip(frames[:, :, ::-1]).motion == "right"
    assert score_clip(frames[::-1]).motion == "right"
    assert score_clip(frames.transpose(0, 2, 1, 3)).motion == "up"
    assert score_clip(np.repeat(frames[:1], 9, axis=0)).motion == "still"
    swapped = {"red": "blue", "blue": "red"}
    assert score_clip(frames[..., ::-1]).color == swapped.get(reading.color, score_clip(frames[..., ::-1]).color)


def test_image_has_color_and_shape_but_no_motion(clip):
    frames, reading = clip
    assert score_clip(frames[:1]) == Reading(reading.color, reading.shape, None)


def test_subpixel_track_adds_up_steps_far_below_a_pixel():
    # 0.4 pixels a frame: no two neighbours differ by a whole one, the clip as a whole moves by a fifth of its frame.
    frames = np.full((33, 64, 64, 3), 230.0)
    for number in range(33):
        left = 10 + 0.4 * number
        share = np.clip(np.minimum(np.arange(64) + 1, left + 24) - np.maximum(np.arange(64), left), 0, 1)
        frames[number, 20:44] += share[None, :, None] * (np.array([45, 80, 220]) - 230)
    frames = np.rint(frames).astype(np.uint8)
    assert score_clip(frames) == Reading("blue", "square", "right")
    assert score_clip(frames[:9]) == Reading("blue", "square", "still")  # a twentieth of its frame


@pytest.mark.parametrize(
    "nothing",
    [
        lambda rng: np.full((9, 64, 64, 3), 128.0),
        lambda rng: 128 + rng.normal(0, 20, (9, 64, 64, 3)),
        lambda rng: rng.uniform(0, 255, (9, 64, 80, 3)),
        lambda rng: np.linspace(0, 255, 64)[None, :, None, None] * np.ones((9, 1, 64, 3)),
        lambda rng: np.linspace(0, 255, 80)[None, None, :, None] * np.ones((9, 64, 1, 3)) * [1, 0.2, 0.2],
        lambda rng: np.full((1, 64, 64, 3), 30.0),
    ],
    ids=["grey", "noise", "loud noise", "grey ramp", "red ramp", "black image"],
)
def test_says_nothing_where_nothing_is(nothing):
    for seed in range(5):
        frames = np.clip(nothing(np.random.default_rng(seed)), 0, 255).astype(np.uint8)
        assert score_clip(frames) == NOTHING


def test_a_ghost_of_an_object_is_nothing(clip):
    frames, _ = clip
    ghost = np.full(frames.shape, 128.0) + 0.08 * (frames.astype(float) - frames[0, 0, 0])
    assert score_clip(np.clip(ghost, 0, 255).astype(np.uint8)) == NOTHING


def test_grey_object_has_no_color(clip):
    frames, reading = clip
    grey = np.repeat(frames.mean(-1, keepdims=True), 3, axis=-1)
    grey = np.clip((grey - grey[0, 0, 0]) * 3 + grey[0, 0, 0], 0, 255).astype(np.uint8)
    assert score_clip(grey) == Reading(None, reading.shape, "left")


def test_jumping_and_vanishing_objects_have_no_motion(clip):
    frames, _ = clip
    assert score_clip(frames[[0, 8, 0, 8, 0, 8, 0, 8, 0]]).motion is None
    vanishing = frames.copy()
    vanishing[3:] = frames[0, 0, 0]
    assert score_clip(vanishing).motion is None


def test_diagonal_movement_is_none_of_the_words():
    frames = np.full((9, 64, 64, 3), 230, np.uint8)
    for number in range(9):
        frames[number, 5 + 4 * number : 29 + 4 * number - 4, 5 + 4 * number : 29 + 4 * number - 4] = (215, 40, 40)
    assert score_clip(frames) == Reading("red", "square", None)


def test_share_correct_counts_motion_only_where_there_is_one():
    expected = [Reading("red", "circle", "left"), Reading("red", "circle", None)]
    readings = [Reading("red", "square", None), Reading(None, "circle", None)]
    assert share_correct(readings, expected) == {"color": 0.5, "shape": 0.5, "motion": 0.0}
