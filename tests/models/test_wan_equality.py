"""The transformer against diffusers' WanTransformer3DModel: every member of the family, through a saved folder."""

import pytest
import torch
from wan_family import VARIANTS, Inputs, Variant, build_theirs

from sora_train.models.inputs import pack_inputs
from sora_train.models.video_dit import predict
from sora_train.models.wan_config import their_name
from sora_train.models.wan_weights import load_wan

pytest.importorskip("diffusers")


def pair(randomized, variant, folder, seed=0):
    theirs = randomized(build_theirs(variant, seed), seed)
    theirs.save_pretrained(folder)
    return theirs, load_wan(folder)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_outputs_equal_diffusers(randomized, variant, tmp_path, seed):
    theirs, ours = pair(randomized, variant, tmp_path / "wan", seed)
    inputs = Inputs.draw(variant, theirs, seed)
    for t, tolerance in ((0.004, 1e-5), (0.6, 5e-5), (1.0, 5e-5)):  # their phase of t is float32
        levels = torch.tensor([t, t / 2])
        with torch.no_grad():
            expected = inputs.theirs(theirs, levels)
            got = torch.stack(predict(ours, list(inputs.latents), levels, list(inputs.text), inputs.conditioning()))
        assert expected.std() > 0.1
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_gradients_equal_diffusers(randomized, variant, tmp_path):
    theirs, ours = pair(randomized, variant, tmp_path / "wan")
    inputs, levels = Inputs.draw(variant, theirs, 1), torch.tensor([0.001, 0.005])
    wanted = [tensor.requires_grad_() for tensor in inputs.tensors()]
    expected = inputs.theirs(theirs, levels)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    names = dict(theirs.named_parameters())
    gradients = torch.autograd.grad((expected * weights).sum(), [*names.values(), *wanted])
    by_name = dict(zip([*names, "latents", "condition", "text", "image"], gradients, strict=False))

    got = torch.stack(predict(ours, list(inputs.latents), levels, list(inputs.text), inputs.conditioning()))
    mine = {their_name(name): parameter for name, parameter in ours.named_parameters()}
    assert mine.keys() == names.keys()
    received = torch.autograd.grad((got * weights).sum(), [mine[name] for name in names] + wanted)
    for (name, gradient), other in zip(by_name.items(), received, strict=True):
        assert gradient.norm() > 0, name
        difference = (other.reshape(gradient.shape) - gradient).norm() / (gradient.norm() + 1e-3)
        assert difference < 1e-5, name


def test_a_timestep_a_token_equals_diffusers(randomized, tmp_path):
    """Any t for any token, as TI2V-5B's class takes them; clean frames are the case that is cheap."""
    variant = Variant("per token")
    theirs, ours = pair(randomized, variant, tmp_path / "wan")
    inputs = Inputs.draw(variant, theirs, 3)
    tokens = pack_inputs(list(inputs.latents), list(inputs.text), ours.config).layout.lengths[0]
    t = 0.005 * torch.rand(2, tokens, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = theirs(inputs.latents, t * 1000, inputs.text).sample
        got = torch.stack(predict(ours, list(inputs.latents), t.flatten(), list(inputs.text)))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_padded_text_is_attended_as_wan_does(randomized, tmp_path):
    """512 rows, zeros after the text's end and no mask: what is given is attended, and the padding counts."""
    variant = VARIANTS[0]
    theirs, ours = pair(randomized, variant, tmp_path / "wan")
    inputs = Inputs.draw(variant, theirs, 5)
    padded = torch.cat([inputs.text, torch.zeros(2, 505, inputs.text.shape[2])], dim=1)
    levels = torch.tensor([0.002, 0.004])
    with torch.no_grad():
        expected = theirs(inputs.latents, levels * 1000, padded).sample
        got = torch.stack(predict(ours, list(inputs.latents), levels, list(padded)))
        bare = torch.stack(predict(ours, list(inputs.latents), levels, list(inputs.text)))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert (bare - expected).abs().max() > 0.05
