import dataclasses

import pytest
import torch

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.root import ConfigError
from sora_train.models.inputs import Conditioning, pack_inputs
from sora_train.models.text import BEGIN, byte_ids, pack_bytes
from sora_train.models.video_dit import VideoDiT, predict

CONFIG = ModelConfig(
    width=24, depth=2, heads=2, mlp_width=40, in_channels=4, out_channels=4,
    text=TextConfig(width=16, layers=1, heads=2, max_bytes=8),
)  # fmt: skip


def test_captions_become_bytes_and_are_never_empty():
    assert byte_ids("", 8) == [BEGIN]
    assert byte_ids("aé", 8) == [BEGIN, 97, 0xC3, 0xA9]
    assert byte_ids("0123456789", 8) == [BEGIN, *b"01234567"]
    ids, lengths = pack_bytes(["ab", "", "\ud800"], 8)  # a lone surrogate has no UTF-8
    assert lengths == (3, 1, 2)
    assert ids.tolist() == [BEGIN, 97, 98, BEGIN, BEGIN, 63]


def test_an_untrained_model_predicts_zero_and_still_learns():
    model = VideoDiT(CONFIG)
    latents, t, captions = [torch.randn(4, 1, 4, 4)], torch.tensor([0.5]), ["a"]
    assert predict(model, latents, t, captions)[0].abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (predict(model, latents, t, captions)[0] - latents[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.blocks.parameters())


@pytest.mark.parametrize("changed", ["caption", "t"])
def test_prediction_depends_on(byte_model, samples, changed):
    latents, t, captions = samples
    before = predict(byte_model, latents, t, captions)
    if changed == "caption":
        captions = ["a red circlE", *captions[1:]]
    else:
        t = t.clone()
        t[0] += 0.01
    after = predict(byte_model, latents, t, captions)
    assert (after[0] - before[0]).abs().max() > 1e-4
    assert torch.equal(after[1], before[1])


def test_blocks_can_be_recomputed(byte_model, samples):
    def gradients():
        byte_model.zero_grad()
        sum(p.square().sum() for p in predict(byte_model, *samples)).backward()
        return {name: p.grad.clone() for name, p in byte_model.named_parameters()}

    straight = gradients()
    calls = []

    def run_block(block, *inputs):
        calls.append(block)
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)

    byte_model.run_block = run_block
    recomputed = gradients()
    assert len(calls) == byte_model.config.depth
    for name, gradient in straight.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(CONFIG, width=25), "model.width=25"),
        (dataclasses.replace(CONFIG, heads=8), "even head width"),
        (dataclasses.replace(CONFIG, frequency_width=7), "model.frequency_width=7"),
        (dataclasses.replace(CONFIG, text=TextConfig(width=15)), "model.text.width=15"),
        (dataclasses.replace(CONFIG, condition_channels=-1), "model.condition_channels=-1 is negative"),
        (dataclasses.replace(CONFIG, image_positions=3), "model.image_positions=3 needs images"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        VideoDiT(config)


def test_text_of_the_wrong_kind_is_refused():
    latents = [torch.zeros(4, 1, 2, 2)]
    with pytest.raises(ValueError, match="takes captions"):
        pack_inputs(latents, [torch.zeros(3, 16)], CONFIG)
    rows = dataclasses.replace(CONFIG, text=TextConfig(kind=TextKind.encoder, width=16))
    with pytest.raises(ValueError, match="takes rows"):
        pack_inputs(latents, ["a"], rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": ()}, "model.condition_channels=3 takes 4 conditioning.latents for 4 samples, got 0"),
        (
            {"latents": [torch.zeros(3, 1, 2, 2)] * 4},
            r"of \(3, 1, 2, 2\) for latents of \(4, 3, 4, 6\)",
        ),
        ({"image": [torch.zeros(1, 10)]}, "model.image_width=10 takes 4 conditioning.image"),
        ({"image": [torch.zeros(1, 9)] * 4}, "rows of 10"),
        ({"clean_frames": [1]}, "has 1 numbers for 4 samples"),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(image_model, samples, text_rows, conditioning, change, message):
    latents, t, _ = samples
    with pytest.raises(ValueError, match=message):
        predict(image_model, latents, t, text_rows, dataclasses.replace(conditioning, **change))


def test_conditioning_for_a_model_without_is_refused(rows_model, image_model, samples, text_rows, conditioning):
    latents, t, _ = samples
    with pytest.raises(ValueError, match=r"model\.condition_channels=0 takes 0"):
        predict(rows_model, latents, t, text_rows, conditioning)
    inputs = pack_inputs(latents, text_rows, rows_model.config)
    with pytest.raises(ValueError, match=r"needs conditioning\.image"):  # one that packs for itself
        image_model(inputs.tokens_LP, inputs.positions_L3, t, inputs.text, inputs.layout)
    coarse = dataclasses.replace(rows_model.config, patch_frames=2)
    with pytest.raises(ValueError, match="does not divide into patches of 2 frames"):
        pack_inputs([torch.zeros(4, 2, 2, 2)], text_rows[:1], coarse, Conditioning(clean_frames=[1]))


def test_t_of_another_length_is_refused(rows_model, samples, text_rows):
    latents, t, _ = samples
    with pytest.raises(ValueError, match="t has 3 numbers for 4 samples and 44 tokens"):
        predict(rows_model, latents, t[:3], text_rows)
    with pytest.raises(ValueError, match="no clean frames"):
        predict(rows_model, latents, torch.zeros(44), text_rows, Conditioning(clean_frames=[1] * 4))
