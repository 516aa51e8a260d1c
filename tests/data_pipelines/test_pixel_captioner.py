"""The pixel captioner against what was drawn: by hand, by the procedural world, and by nobody (real footage)."""

import io

import av
import cv2
import numpy as np
import pytest

from data_pipelines.record import Frames, View
from data_pipelines.stages.describe import describe, see, short_caption
from data_pipelines.world import encode_mp4
from sora_train.config.world import Level
from sora_train.world.render import render
from sora_train.world.sampling import sample_scene
from sora_train.world.scene import truth
from sora_train.world.words import prompt

CLIPS = 60


def coded(frames: Frames, fps: int = 8) -> Frames:
    with av.open(io.BytesIO(encode_mp4(frames, fps))) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_short_captions_of_simple_clips_are_the_worlds_prompts() -> None:
    right = 0
    for index in range(CLIPS):
        scene = sample_scene(1234, index, Level.simple)
        (item,) = truth(scene)["objects"]
        seen = see(coded(render(scene), scene.fps))
        right += seen is not None and short_caption(seen) == prompt(item["color"], item["shape"], item["motion"])
    assert right >= 0.98 * CLIPS


def disc(num_frames: int, rgb: tuple[int, int, int], step: tuple[int, int], ground: Frames | None = None) -> Frames:
    frames = np.full((num_frames, 96, 96, 3), 70, np.uint8) if ground is None else ground.copy()
    for index in range(num_frames):
        center = (48 + step[0] * index, 48 + step[1] * index)
        cv2.circle(frames[index], center, 14, rgb, -1)
    return frames


@pytest.mark.parametrize(
    ("rgb", "step", "text"),
    [
        ((230, 120, 20), (3, 0), "an orange circle moving right"),
        ((140, 40, 220), (0, -3), "a purple circle moving up"),
        ((30, 200, 220), (0, 0), "a cyan circle standing still"),
        ((215, 40, 40), (-2, 2), "a red circle moving down and left"),
    ],
)
def test_drawn_by_hand(rgb: tuple[int, int, int], step: tuple[int, int], text: str) -> None:
    short, dense = describe(View(coded(disc(9, rgb, step)), tuple(range(9))))
    assert short == text
    assert text.split()[1] in dense
    assert "dark gray" in dense


def test_one_frame_has_no_motion() -> None:
    short, dense = describe(View(disc(1, (45, 80, 220), (0, 0)), (0.0,)))
    assert short == "a blue circle"
    assert "mov" not in dense
    assert "camera" not in dense


def test_the_cameras_motion_is_not_the_objects() -> None:
    """A disc fixed to a moving ground stands still while the camera pans."""
    rng = np.random.default_rng(0)
    gray = cv2.GaussianBlur(rng.uniform(0, 255, (96, 160)).astype(np.float32), (0, 0), 4)
    gray = np.clip((gray - gray.mean()) * 6 + 110, 60, 160).astype(np.uint8)
    wide = np.repeat(gray[:, :, None], 3, axis=2)
    cv2.circle(wide, (70, 48), 14, (215, 40, 40), -1)
    frames = coded(np.stack([wide[:, 4 * index : 4 * index + 96] for index in range(9)]))
    seen = see(frames)
    assert seen is not None
    assert seen.camera == "pan right"
    assert seen.objects[0].motion == "still"


def test_real_texture_is_described_without_inventing_shapes() -> None:
    """Uneven colour is no figure, however round its outline."""
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (9, 24, 40, 3), dtype=np.uint8)
    frames = np.stack([cv2.resize(frame, (120, 72), interpolation=cv2.INTER_LINEAR) for frame in frames])
    assert see(frames) is None
    short, dense = describe(View(frames, tuple(range(9))))
    assert "much movement" in short
    for word in ("circle", "square", "triangle", "object"):
        assert word not in short + dense
