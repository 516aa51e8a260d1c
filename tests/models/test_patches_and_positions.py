import pytest
import torch

from sora_train.models.patchify import grid, num_tokens, patchify, positions, unpatchify
from sora_train.models.rope import axis_widths, rotate, rotation


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 4), (1, 1, 1)])
def test_patchify_is_the_conv3d_of_wan(patch):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 4, 8, generator=generator)
    conv = torch.nn.Conv3d(3, 5, kernel_size=patch, stride=patch, bias=False)
    expected = conv(latents[None])[0].flatten(1).T
    tokens = patchify(latents, patch)
    assert tokens.shape[0] == num_tokens((3, 4, 4, 8), patch)
    torch.testing.assert_close(tokens @ conv.weight.flatten(1).T, expected, atol=1e-5, rtol=0)


def test_unpatchify_puts_every_number_at_its_place():
    shape, patch = (2, 2, 4, 6), (1, 2, 2)
    latents = torch.arange(2 * 2 * 4 * 6.0).reshape(shape)
    channels_first = patchify(latents, patch)
    channels_last = channels_first.unflatten(1, (2, 4)).transpose(1, 2).flatten(1)
    assert torch.equal(unpatchify(channels_last, shape, patch), latents)


def test_positions_follow_the_tokens():
    shape, patch = (1, 2, 4, 6), (1, 2, 2)
    where = positions(shape, patch)
    assert where.dtype == torch.int64
    assert where.shape == (12, 3)
    # A video whose every pixel holds its own place, read through the patches.
    places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), torch.arange(3), indexing="ij"))
    spread = places.repeat_interleave(2, 2).repeat_interleave(2, 3).float()
    for axis in range(3):
        assert torch.equal(patchify(spread[axis : axis + 1], patch)[:, 0].long(), where[:, axis])


def test_one_token_has_one_position():
    assert positions((4, 1, 2, 2), (1, 2, 2)).tolist() == [[0, 0, 0]]


def test_patch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="do not divide"):
        grid((4, 1, 3, 2), (1, 2, 2))


def test_axes_share_the_head_as_wan_does():
    assert axis_widths(128) == (44, 42, 42)
    assert axis_widths(32) == (12, 10, 10)
    assert axis_widths(4) == (4, 0, 0)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 24, generator=generator)

    def score(at, to):
        turn = rotation(torch.tensor([at, to]), 24, 10000.0)
        return (rotate(query, turn[:1]) * rotate(key, turn[1:])).sum()

    near = score([0, 0, 0], [1, 2, 3])
    torch.testing.assert_close(near, score([40, 50, 60], [41, 52, 63]), atol=1e-5, rtol=0)
    assert (near - score([0, 0, 0], [1, 3, 2])).abs() > 1e-2
    turned = rotate(query, rotation(torch.tensor([[9, 8, 7]]), 24, 10000.0))
    torch.testing.assert_close(turned.norm(), query.norm())


def test_phases_stay_exact_far_out():
    turn = rotation(torch.tensor([[100_000, 0, 0]]), 4, 10000.0)
    expected = torch.polar(torch.ones(2, dtype=torch.float64), 100_000 * torch.tensor([1.0, 0.01], dtype=torch.float64))
    torch.testing.assert_close(turn[0, 0].to(torch.complex128), expected, atol=1e-7, rtol=0)
