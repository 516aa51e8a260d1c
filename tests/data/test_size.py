"""The size rule is one rule, whether a shard is sized or a clip."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.config.data import SizeConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.data.schema import LATENT_SUFFIX, IndexRow
from sora_train.data.selection import are_held_out, is_held_out
from sora_train.data.shard_table import ShardTable
from sora_train.data.size import ClipSize, check_size, clip_size, clip_sizes, token_stride
from sora_train.encoders.codec_shape import CodecShape

CODEC = CodecShape(channels=16, temporal_ratio=4, spatial_ratio=8)
STRIDE = token_stride(ModelConfig(in_channels=16, out_channels=16), CODEC)
RATES = (0.0, 8.0, 15.999999, 16.0, 23.976, 24000 / 1001, 25.0, 29.97, 30000 / 1001, 59.94, 60.0, 119.88)
SIDES = (2, 15, 16, 17, 31, 32, 48, 96, 144, 240, 360, 480, 608, 720, 854, 1080, 1280, 1920, 4320, 16384)


def row(num_frames: int = 33, fps: float = 16.0, height: int = 480, width: int = 854, **changes: object) -> IndexRow:
    plain = IndexRow("clip", "mp4", 0, 0, num_frames, fps, height, width, 1.0, "0" * 64)
    return replace(plain, **changes)  # type: ignore[arg-type]


def latents(channels: int, frames: int, height: int, width: int) -> IndexRow:
    return row(999, 24.0, 1080, 1920, medium=LATENT_SUFFIX, latent_shape=(channels, frames, height, width))


rows = st.one_of(
    st.builds(
        row,
        st.one_of(st.integers(1, 5), st.integers(1, 5000)),
        st.one_of(st.sampled_from(RATES), st.floats(0.1, 240)),
        st.one_of(st.sampled_from(SIDES), st.integers(1, 5000)),
        st.one_of(st.sampled_from(SIDES), st.integers(1, 5000)),
        is_variable_rate=st.booleans(),
    ),
    st.builds(latents, st.sampled_from((16, 48)), st.integers(0, 60), st.integers(0, 99), st.integers(0, 99)),
)
configs = st.builds(
    SizeConfig,
    st.integers(256, 10**6),
    st.sampled_from((1, 2, 5, 17, 33, 81)),
    st.sampled_from((8.0, 12.5, 16.0, 24.0)),
)


@given(st.lists(rows, min_size=1, max_size=8), configs, st.floats(0, 1, exclude_max=True))
@settings(max_examples=300, deadline=None)
def test_a_table_is_sized_as_its_rows_are(clips: list[IndexRow], config: SizeConfig, part: float) -> None:
    sizes = clip_sizes(ShardTable.from_rows(clips), config, STRIDE)
    for i, clip in enumerate(clips):
        if sizes.num_tokens[i] == 0:
            with pytest.raises(ConfigError, match="clip clip"):
                clip_size(clip, config, STRIDE)
            continue
        for where in (None, part, 0.0, math.nextafter(1, 0)):
            size = clip_size(clip, config, STRIDE, where)
            assert size == sizes.clip(i, where)
            check(size, clip, config)
        _, frames, height, width = CODEC.latent_shape(size.num_frames, size.height, size.width)
        assert sizes.num_tokens[i] == frames * (height // 2) * (width // 2)


def check(size: ClipSize, clip: IndexRow, config: SizeConfig) -> None:
    """What holds of every size."""
    assert size.num_frames <= config.max_frames
    assert (size.num_frames - 1) % 4 == size.height % 16 == size.width % 16 == 0
    if clip.latent_shape is not None:
        assert size == ClipSize(size.num_frames, size.height, size.width, size.height, size.width, 0, 1.0)
        return
    assert size.height * size.width <= config.max_pixels
    assert size.height <= size.scaled_height <= clip.height
    assert size.width <= size.scaled_width <= clip.width
    indices = size.frame_indices
    assert len(indices) == size.num_frames
    assert 0 <= indices[0] <= indices[-1] < clip.num_frames
    assert all(a < b for a, b in pairwise(indices))


def reference(clip: IndexRow, config: SizeConfig) -> tuple[int, int, int]:
    """Frames, height and width in plain Python, one clip at a time."""
    scale = min(1.0, math.sqrt(config.max_pixels / (clip.height * clip.width)))
    height = math.floor(clip.height * scale + 1e-6) // 16 * 16
    width = math.floor(clip.width * scale + 1e-6) // 16 * 16
    step = max(1.0, clip.fps / config.sampling_fps)
    sampled = min(math.floor((clip.num_frames - 1) / step + 1e-6) + 1, config.max_frames)
    return 1 + (sampled - 1) // 4 * 4, height, width


def test_sizes_are_those_of_plain_arithmetic() -> None:
    draw = np.random.default_rng(0)
    config = SizeConfig(480 * 854, 81, 16.0)
    clips = [
        row(int(draw.integers(1, 900)), float(draw.choice(RATES)), *(int(side) for side in draw.choice(SIDES[2:], 2)))
        for _ in range(2000)
    ]
    sizes = clip_sizes(ShardTable.from_rows(clips), config, STRIDE)
    found = list(zip(sizes.num_frames, sizes.height, sizes.width, strict=True))
    expected = [reference(clip, config) for clip in clips]
    assert [size for size, tokens in zip(found, sizes.num_tokens, strict=True) if tokens] == [
        size for size in expected if min(size) > 0
    ]


@pytest.mark.parametrize(
    ("fps", "frames", "step", "last"),
    [
        (8.0, 33, 1.0, 32),
        (16.0, 33, 1.0, 32),
        (23.976, 33, 1.4985, 48),
        (29.97, 33, 1.873125, 60),
        (59.94, 29, 3.74625, 105),
    ],
)
def test_rates_of_film_and_television(fps: float, frames: int, step: float, last: int) -> None:
    size = clip_size(row(num_frames=111, fps=fps), SizeConfig(480 * 854, 33, 16.0), STRIDE, 0.0)
    assert (size.num_frames, size.frame_step) == (frames, step)
    assert size.frame_indices[-1] == last


def test_a_rate_that_varies_counts_nominal_frames() -> None:
    config, constant = SizeConfig(480 * 854, 33, 16.0), row(111, 29.97)
    varying = replace(constant, is_variable_rate=True)
    assert clip_size(varying, config, STRIDE) == clip_size(constant, config, STRIDE)


def test_a_part_of_what_is_longer() -> None:
    config = SizeConfig(480 * 854, 17, 16.0)
    starts = [clip_size(row(27), config, STRIDE, part).first_frame for part in (0.0, 0.0999, 0.5, 0.9999)]
    assert starts == [0, 1, 5, 10]
    assert clip_size(row(27), config, STRIDE).first_frame == 5
    assert clip_size(row(17), config, STRIDE, 0.9999).first_frame == 0


def test_latents_keep_their_size() -> None:
    config = SizeConfig(64 * 64, 17, 16.0)
    size = clip_size(latents(16, 9, 60, 106), config, STRIDE)
    assert size == ClipSize(17, 480, 848, 480, 848, 0, 1.0), "17 frames are the leading 5 latents of 9"
    assert clip_size(latents(16, 3, 60, 106), config, STRIDE).num_frames == 9
    for wrong in (latents(48, 5, 60, 106), latents(16, 5, 61, 106), latents(16, 5, 60, 107), latents(16, 0, 60, 106)):
        with pytest.raises(ConfigError, match=r"clip clip has latents of \d+x\d+x\d+x\d+ .* 16 channels, .* 2x2"):
            clip_size(wrong, config, STRIDE)


def test_budgets_that_fit_nothing_are_named() -> None:
    for name in ("max_pixels", "max_frames", "sampling_fps"):
        with pytest.raises(ConfigError, match=rf"data\.size\.{name}=0"):
            check_size(replace(SizeConfig(), **{name: 0}))
    with pytest.raises(ConfigError, match=r"sampling_fps=nan"):
        check_size(SizeConfig(sampling_fps=math.nan))


def test_sources_are_held_out_in_a_table_as_one_by_one() -> None:
    draw = np.random.default_rng(0)
    hashes = [draw.bytes(32).hex() for _ in range(3000)] + ["0" * 64, "f" * 64, "1" + "0" * 63]
    table = ShardTable.from_rows([row(source_sha256=sha256) for sha256 in hashes])
    for fraction in (0.0, 1 / 16, 0.1, 0.5, 1.0, float(f"{0.1:.13f}")):
        assert are_held_out(table, fraction).tolist() == [is_held_out(sha256, fraction) for sha256 in hashes]
    assert not are_held_out(table, 0.0).any()
    assert are_held_out(table, 1.0).all()
