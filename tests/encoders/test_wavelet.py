import pytest
import torch

from sora_train.config.encoders import CodecConfig
from sora_train.config.root import ConfigError
from sora_train.encoders.video_codec import build_codec, codec_shape, to_pixels, to_unit_range
from sora_train.encoders.wavelet import PIXEL_RMS, haar_matrix


@pytest.mark.parametrize(("temporal", "spatial"), [(2, 4), (1, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_decode_inverts_encode(temporal, spatial, n):
    config = CodecConfig(temporal_ratio=temporal, spatial_ratio=spatial)
    codec = build_codec(config, "cpu")
    frames = torch.rand(3, 1 + n * temporal, 16, 24) * 2 - 1
    latents = codec.encode(frames)
    assert latents.shape == codec.shape.latent_shape(*frames.shape[1:])
    assert latents.shape == (3 * temporal * spatial**2, 1 + n, 16 // spatial, 24 // spatial)
    assert codec.shape == codec_shape(config)
    torch.testing.assert_close(codec.decode(latents), frames, atol=1e-5, rtol=0)


def test_squared_error_of_latents_is_that_of_pixels_up_to_one_constant():
    """After the first frame, which stands for a whole box."""
    codec = build_codec(CodecConfig(), "cpu")
    a, b = torch.rand(2, 3, 9, 16, 16) * 2 - 1
    b[:, 0] = a[:, 0]
    in_latents = (codec.encode(a) - codec.encode(b)).square().sum()
    pixels_in_a_box = 2 * 4 * 4
    torch.testing.assert_close(in_latents, (a - b).square().sum() / PIXEL_RMS**2 / pixels_in_a_box)


def test_first_frame_stands_alone():
    codec = build_codec(CodecConfig(), "cpu")
    frames = torch.rand(3, 5, 8, 8) * 2 - 1
    later = frames.clone()
    later[:, 1:] = 0
    assert torch.equal(codec.encode(frames)[:, 0], codec.encode(later)[:, 0])
    torch.testing.assert_close(codec.encode(frames)[:, :1], codec.encode(frames[:, :1]))


def test_of_the_first_box_only_the_mean_over_time_counts():
    """A model may put anything there; what it means is one frame."""
    codec = build_codec(CodecConfig(), "cpu")
    latents = torch.randn(96, 2, 2, 2) * 0.02
    changed = latents.clone()
    changed[48:, 0] += 0.2  # detail over time: the second half of the coefficients
    torch.testing.assert_close(codec.decode(changed), codec.decode(latents), atol=1e-6, rtol=0)
    changed[:48, 0] += 0.1
    assert (codec.decode(changed)[:, 0] - codec.decode(latents)[:, 0]).abs().max() > 0.01


def test_coarse_channels_are_the_mean_colour():
    codec = build_codec(CodecConfig(temporal_ratio=2, spatial_ratio=4), "cpu")
    frames = torch.tensor([0.5, -0.25, 1.0])[:, None, None, None].expand(3, 3, 8, 8)
    latents = codec.encode(frames)
    torch.testing.assert_close(latents[:3, 1, 0, 0], torch.tensor([0.5, -0.25, 1.0]) / PIXEL_RMS)
    assert latents[3:].abs().max() < 1e-5


def test_haar_is_orthonormal():
    for size in (1, 2, 4, 8):
        matrix = haar_matrix(size)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (3, 3, 6, 8), (3, 3, 8, 9)])
def test_sizes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="do not fit the codec"):
        build_codec(CodecConfig(), "cpu").encode(torch.zeros(shape))


def test_ratios_must_be_powers_of_two():
    with pytest.raises(ConfigError, match=r"codec\.temporal_ratio=3"):
        codec_shape(CodecConfig(temporal_ratio=3))
    with pytest.raises(ConfigError, match=r"codec\.spatial_ratio=0"):
        codec_shape(CodecConfig(spatial_ratio=0))


def test_identity_names_the_ratios():
    identities = {
        build_codec(CodecConfig(temporal_ratio=t, spatial_ratio=s), "cpu").identity for t in (1, 2) for s in (2, 4)
    }
    assert len(identities) == 4


def test_pixels_survive_the_way_to_frames_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(4, 8, 8, 1).expand(-1, -1, -1, 3)
    frames = to_unit_range(pixels)
    assert frames.shape == (3, 4, 8, 8)
    assert (frames.min(), frames.max()) == (-1, 1)
    assert torch.equal(to_pixels(frames), pixels)
