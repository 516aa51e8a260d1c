import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from corpus import encode, moving_square
from media import BT601, BT709, BT2020, Kind, clip, differences, drifting, encode_frames, image, row_of, whole

from sora_train.config.data import Decoder, SizeConfig
from sora_train.config.root import ConfigError
from sora_train.data.clip import DecodeError, decode_clip
from sora_train.data.schema import IndexRow
from sora_train.data.size import ClipSize, Stride, clip_size

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


# 16, 32, 48, 96 and 144 are widths at which another decoder took the padding of lines for channels.
@pytest.mark.parametrize("width", [16, 32, 33, 48, 64, 65, 80, 96, 112, 127, 128, 144, 160])
def test_every_width_decodes_to_what_was_drawn(width: int) -> None:
    data = clip(5, 37, width, Kind(pixels="yuv444p"))
    wanted = row_of(data)
    assert (wanted.height, wanted.width) == (37, width)
    assert differences(decode_clip(data, wanted, whole(wanted)), drifting(5, 37, width)) < 2


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


@pytest.mark.parametrize(("suffix", "levels"), [("png", 0.01), ("jpg", 2), ("webp", 4)])
def test_an_image_is_a_clip_of_one_frame(suffix: str, levels: float) -> None:
    data = image(64, 80, suffix)
    wanted = row_of(data, suffix)
    assert differences(decode_clip(data, wanted, whole(wanted)), drifting(1, 64, 80)) < levels


def test_a_second_picture_behind_the_first_is_left_alone() -> None:
    data = image(64, 80, "jpg") + image(64, 80, "jpg", seed=5)  # as phones write depth maps and moving photographs
    wanted = row_of(data, "jpg")
    assert differences(decode_clip(data, wanted, whole(wanted)), drifting(1, 64, 80)) < 2


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1"])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le"])
def test_codecs_and_depths_decode_to_what_was_drawn(codec: str, pixels: str) -> None:
    data = clip(12, 64, 80, Kind(codec, suffix="mkv", pixels=pixels))
    wanted = row_of(data, "mkv")
    assert differences(decode_clip(data, wanted, whole(wanted)), drifting(12, 64, 80)) < 4


@pytest.mark.parametrize("is_full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [BT601, BT709, BT2020])
@pytest.mark.parametrize("pixels", ["yuv444p", "yuv420p10le"])
def test_matrix_and_range_of_colors_are_honored(matrix: int, is_full_range: bool, pixels: str) -> None:
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 50, 120]], np.uint8)
    drawn = np.broadcast_to(colors.repeat(32, axis=0), (2, 64, 192, 3))
    kind = Kind("libx265" if "10" in pixels else "libx264", pixels=pixels, matrix=matrix, is_full_range=is_full_range)
    data = encode_frames(drawn, kind)
    wanted = row_of(data)
    middles = decode_clip(data, wanted, whole(wanted))[:, 32, 16::32].astype(int)
    assert np.abs(middles - colors).max() <= 4


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_frames_are_turned_upright(rotation: int) -> None:
    data = clip(5, 64, 80, Kind(rotation=rotation))
    truth = np.rot90(drifting(5, 64, 80), -rotation // 90, axes=(1, 2))
    wanted = row_of(data)
    assert differences(decode_clip(data, wanted, whole(wanted)), truth) < 3
    # Scaled before they are turned: to the same.
    half = ClipSize(5, truth.shape[1] // 2, truth.shape[2] // 2, truth.shape[1] // 2, truth.shape[2] // 2, 0, 1.0)
    averaged = truth.reshape(5, half.height, 2, half.width, 2, 3).mean((2, 4))
    assert differences(decode_clip(data, wanted, half), averaged) < 3


def test_pixels_that_are_not_square_become_square() -> None:
    data = clip(3, 64, 80, Kind(pixel_aspect="3/2"))
    wanted = row_of(data)
    frames = decode_clip(data, wanted, whole(wanted))
    assert frames.shape == (3, 64, 120, 3)
    assert differences(frames[:, :, ::3], drifting(3, 64, 80)[:, :, ::2]) < 4


LONG = {
    "h264": Kind(),
    "h264, open groups": Kind(options=(("x264-params", "open-gop=1:keyint=8:bframes=3:b-adapt=0"),)),
    "h264, no keyframes but the first": Kind(options=(("x264-params", "intra-refresh=1:keyint=10"),)),
    "hevc, open groups": Kind(
        "libx265", options=(("x265-params", "open-gop=1:keyint=8:bframes=3:b-adapt=0:log-level=none:pools=none"),)
    ),
    "av1": Kind("libsvtav1"),
    "vp9": Kind("libvpx-vp9", "webm"),
    "vp8": Kind("libvpx", "webm"),
    "mpeg4, has to be counted": Kind("mpeg4"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_clip_inside_a_long_source_is_exact(name: str) -> None:
    kind = LONG[name]
    data = clip(48, 64, 80, kind)
    wanted = row_of(data, kind.suffix)
    forward = decode_clip(data, wanted, whole(wanted))
    assert len(np.unique(forward.reshape(48, -1), axis=0)) == 48
    for first in (1, 12, 29, 45):
        assert np.array_equal(decode_clip(data, wanted, whole(wanted, first, 3)), forward[first : first + 3])
    every_third = replace(whole(wanted, 20, 5), frame_step=3.0)
    assert np.array_equal(decode_clip(data, wanted, every_third), forward[20:33:3])


def test_only_what_leads_to_the_clip_is_decoded_and_each_frame_is_told() -> None:
    data = clip(48, 64, 80)
    wanted = row_of(data)
    told: list[int] = []
    decode_clip(data, wanted, whole(wanted, 30, 4), progress=lambda: told.append(1))
    # From the keyframe at 24 to frame 33, and not much of what the decoder holds back.
    assert 10 <= len(told) <= 16
    told.clear()
    decode_clip(data, wanted, whole(wanted), progress=lambda: told.append(1))
    assert len(told) == 48


def test_a_variable_rate_is_sampled_by_its_times() -> None:
    shown = np.cumsum([0, 40, 40, 120, 40, 200, 40, 40, 80, 400, 40, 40])
    data = clip(12, 64, 80, Kind(milliseconds=tuple(int(t) for t in shown)))
    wanted = row_of(data)
    assert wanted.is_variable_rate
    forward = decode_clip(data, replace(wanted, is_variable_rate=False), whole(wanted))
    size = clip_size(wanted, replace(LARGE, sampling_fps=wanted.fps), STRIDE)
    frames = decode_clip(data, wanted, size)
    times = (size.first_frame + np.arange(size.num_frames) * size.frame_step) * 1000 / wanted.fps
    nearest = [int(np.abs(shown - time).argmin()) for time in times]
    assert len(set(nearest)) < len(nearest)  # a frame that is shown long is taken twice
    assert np.array_equal(frames, forward[nearest])


def test_frames_may_go_where_the_caller_says() -> None:
    data = clip(5, 64, 80)
    wanted = row_of(data)
    out = np.zeros((5, 64, 80, 3), np.uint8)
    assert decode_clip(data, wanted, whole(wanted), out=out) is out
    assert np.array_equal(out, decode_clip(data, wanted, whole(wanted)))


def test_a_child_that_scales_nothing_starts_without_torch() -> None:
    code = "import sys, sora_train.data.clip; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_errors_pass_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DecodeError("frame_count", "5 frames, the index says 9")))
    assert (error.reason, str(error)) == ("frame_count", "frame_count: 5 frames, the index says 9")


@pytest.mark.parametrize(("height", "width"), [(64, 80), (37, 127), (64, 96)])  # decord cannot show the last width
@pytest.mark.parametrize("num_frames", [12, 1])
def test_decord_gives_the_same_frames_where_it_is_asked_for(height: int, width: int, num_frames: int) -> None:
    data = clip(num_frames, height, width, Kind(pixels="yuv444p" if width % 2 else "yuv420p"))
    wanted = row_of(data)
    size = ClipSize(-(-num_frames // 3), height, width, height, width, 0, 3.0)
    seen: list[int] = []
    frames = decode_clip(data, wanted, size, lambda: seen.append(1), decoder=Decoder.decord)
    assert np.abs(frames.astype(int) - decode_clip(data, wanted, size)).max() <= 2
    assert len(seen) >= size.num_frames


def test_decord_is_not_asked_for_what_it_does_not_know(tmp_path: Path) -> None:
    for kind in (Kind(rotation=90), Kind(milliseconds=tuple(100 * i + 40 * (i % 3) for i in range(12)))):
        data = clip(12, 64, 80, kind)
        wanted = row_of(data)
        by_decord = decode_clip(data, wanted, whole(wanted), decoder=Decoder.decord)
        assert np.array_equal(by_decord, decode_clip(data, wanted, whole(wanted)))


def test_decord_refuses_a_file_that_ends_early() -> None:
    data = clip(12, 64, 80, Kind())
    wanted = replace(row_of(data), num_frames=13)
    with pytest.raises(DecodeError, match="frame_count"):
        decode_clip(data, wanted, whole(wanted), decoder=Decoder.decord)
