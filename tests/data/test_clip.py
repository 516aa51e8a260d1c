from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from corpus import encode, moving_square

from sora_train.config.data import SizeConfig
from sora_train.config.root import ConfigError
from sora_train.data.clip import DecodeError, decode_clip
from sora_train.data.schema import IndexRow
from sora_train.data.size import Stride, clip_size

STRIDE = Stride(frames=2, height=8, width=8)
LARGE = SizeConfig(max_pixels=10**6, max_frames=81, sampling_fps=8.0)


def row(num_frames: int, height: int, width: int, fps: float = 8.0, medium: str = "mp4") -> IndexRow:
    return IndexRow("clip", medium, 0, 0, num_frames, fps, height, width, num_frames / 8, "0" * 64)


def test_native_sizes_stay_and_only_the_stride_is_cropped() -> None:
    size = clip_size(row(10, 70, 127), LARGE, STRIDE)
    assert (size.num_frames, size.height, size.width) == (9, 64, 120)
    assert (size.scaled_height, size.scaled_width) == (70, 127)


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (1280, 720), (1080, 1080), (480, 2048), (64, 64)])
def test_scaling_keeps_the_aspect_within_the_budget(height: int, width: int) -> None:
    budget = SizeConfig(max_pixels=256 * 256, max_frames=81, sampling_fps=8.0)
    size = clip_size(row(9, height, width), budget, STRIDE)
    assert size.height * size.width <= budget.max_pixels
    assert size.scaled_height / size.scaled_width == pytest.approx(height / width, rel=0.02)
    assert size.scaled_height - size.height < STRIDE.height
    assert size.scaled_width - size.width < STRIDE.width


def test_frames_are_resampled_and_the_middle_is_taken() -> None:
    assert clip_size(row(17, 64, 64, fps=16), LARGE, STRIDE).frame_indices == list(range(0, 17, 2))
    slow = clip_size(row(9, 64, 64, fps=4), LARGE, STRIDE)
    assert slow.frame_indices == list(range(9))
    short = SizeConfig(max_pixels=10**6, max_frames=5, sampling_fps=8.0)
    assert clip_size(row(21, 64, 64), short, STRIDE).frame_indices == [8, 9, 10, 11, 12]
    odd = clip_size(row(100, 64, 64, fps=29.97), LARGE, STRIDE).frame_indices
    assert len(odd) == 27
    assert max(odd) < 100
    assert {b - a for a, b in pairwise(odd)} == {3, 4}


def test_a_clip_below_one_token_is_named() -> None:
    with pytest.raises(ConfigError, match=r"clip clip .* smaller than one token"):
        clip_size(row(9, 6, 64), LARGE, STRIDE)


# decord takes the padding of lines for channels at 16, 32, 48, 96 and 144.
@pytest.mark.parametrize("width", [16, 32, 48, 64, 80, 96, 112, 128, 144, 160])
def test_every_width_decodes_to_what_pyav_sees(tmp_path: Path, width: int) -> None:
    data = encode(moving_square(5, 64, width), tmp_path)
    wanted = row(5, 64, width)
    frames = decode_clip(data, wanted, clip_size(wanted, LARGE, STRIDE))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        truth = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.array_equal(frames, truth)


def test_the_planned_frames_are_scaled_and_cropped(tmp_path: Path) -> None:
    original = moving_square(11, 128, 160, seed=1)
    # Stripes finer than the target's pixels: without antialiasing they vanish.
    original[:, 64:] = np.where(np.arange(160) % 4 == 0, 30, 220)[:, None]
    wanted = row(11, 128, 160)
    size = clip_size(wanted, SizeConfig(max_pixels=32 * 40, max_frames=5, sampling_fps=8.0), STRIDE)
    frames = decode_clip(encode(original, tmp_path), wanted, size)
    assert frames.shape == (5, 32, 40, 3)
    averaged = original[3:8].reshape(5, 32, 4, 40, 4, 3).mean((2, 4))
    assert np.abs(frames - averaged).mean() < 3


def test_an_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    picture = moving_square(1, 64, 80)[0]
    path = tmp_path / "image.png"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 64, 80, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    wanted = row(1, 64, 80, fps=0, medium="png")
    frames = decode_clip(path.read_bytes(), wanted, clip_size(wanted, LARGE, STRIDE))
    assert np.array_equal(frames[0], picture)


def test_truncated_and_mistaken_clips_are_refused_with_a_reason(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), dtype=np.uint8)
    data = encode(noise, tmp_path)
    right = row(60, 64, 64)
    size = clip_size(right, SizeConfig(max_pixels=10**6, max_frames=9, sampling_fps=8.0), STRIDE)
    assert decode_clip(data, right, size).shape == (9, 64, 64, 3)
    # Its table comes first (faststart) and is whole; what it points to is not. The middle frames are still there.
    cases = {
        "frame_count": (data[: len(data) * 7 // 10], right),
        "decode": (b"\0" * 4096, right),
        "frame_size": (data, row(60, 64, 80)),
    }
    for reason, (damaged, claimed) in cases.items():
        with pytest.raises(DecodeError) as caught:
            decode_clip(damaged, claimed, size)
        assert caught.value.reason == reason
