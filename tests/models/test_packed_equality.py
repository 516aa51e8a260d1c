"""A pack gives each sample what it would get alone: values, gradients, isolation. And the check itself is checked:
each way of getting packing wrong must make it fail."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from sora_train.models import video_dit
from sora_train.models.attention import Attention
from sora_train.models.attention_cores import masked_sdpa, sdpa_per_document
from sora_train.models.inputs import Conditioning, pack_inputs
from sora_train.models.pack_layout import PackLayout
from sora_train.models.video_dit import predict

TOLERANCE = 1e-5


def part(conditioning, i):
    """The conditioning of one sample."""
    if conditioning is None:
        return None
    parts = (conditioning.latents, conditioning.image, conditioning.clean_frames)
    return Conditioning(*(values[i : i + 1] for values in parts))


def run(model, latents, t, text, weights, conditioning=None):
    """Predictions, gradients of the parameters and of the latents, of a weighted sum of all outputs."""
    model.zero_grad()
    latents = [sample.clone().requires_grad_() for sample in latents]
    predictions = predict(model, latents, t, text, conditioning)
    sum((p * w).sum() for p, w in zip(predictions, weights, strict=True)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [p.detach() for p in predictions], gradients, [sample.grad for sample in latents]


def disagreement(model, latents, t, text, conditioning=None):
    """Largest difference between a pack and its samples alone: of values, and of gradients relative to their norm.

    `t` is one a sample, or a list of one a token for each sample.
    """
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(sample.shape, generator=generator) for sample in latents]
    times = t if isinstance(t, list) else list(t[:, None])
    packed, packed_gradients, packed_input = run(model, latents, torch.cat(times), text, weights, conditioning)
    alone = [
        run(model, latents[i : i + 1], times[i], text[i : i + 1], weights[i : i + 1], part(conditioning, i))
        for i in range(len(latents))
    ]
    values = max((p - a[0][0]).abs().max() for p, a in zip(packed, alone, strict=True))
    gradients = 0.0
    for name, packed_gradient in packed_gradients.items():
        total = sum(a[1][name] for a in alone)
        gradients = max(gradients, float((packed_gradient - total).norm() / (total.norm() + 1e-3)))
    for packed_gradient, a in zip(packed_input, alone, strict=True):
        gradients = max(gradients, float((packed_gradient - a[2][0]).norm() / a[2][0].norm()))
    return float(values), gradients


def test_packed_equals_per_sample_with_bytes(byte_model, samples):
    values, gradients = disagreement(byte_model, *samples)
    assert values < TOLERANCE
    assert gradients < TOLERANCE


def test_packed_equals_per_sample_with_text_rows(rows_model, samples, text_rows):
    latents, t, _ = samples
    values, gradients = disagreement(rows_model, latents, t, text_rows)
    assert values < TOLERANCE
    assert gradients < TOLERANCE


def test_packed_equals_per_sample_with_images_and_clean_frames(image_model, samples, text_rows, conditioning):
    latents, t, _ = samples
    values, gradients = disagreement(image_model, latents, t, text_rows, conditioning)
    assert values < TOLERANCE
    assert gradients < TOLERANCE


@pytest.mark.parametrize("kind", ["bytes", "rows"])
def test_packed_equals_per_sample_with_a_timestep_a_token(kind, byte_model, rows_model, samples, text_rows):
    latents, _, captions = samples
    generator = torch.Generator().manual_seed(6)
    times = [torch.rand(x[0].numel() // 4, generator=generator) for x in latents]
    model, text = (byte_model, captions) if kind == "bytes" else (rows_model, text_rows)
    values, gradients = disagreement(model, latents, times, text)
    assert values < TOLERANCE
    assert gradients < TOLERANCE


def mutate_inputs(monkeypatch, change):
    """Lets `predict` see packs changed by `change(inputs)`; a pack of one sample is left as it is."""

    def changed(latents, text, config, conditioning=None):
        inputs = pack_inputs(latents, text, config, conditioning)
        return inputs if len(latents) == 1 else change(inputs)

    monkeypatch.setattr(video_dit, "pack_inputs", changed)


def attend_across_documents(monkeypatch, model):
    def core(query, key, value, layout, is_cross):
        one = PackLayout.build([query.shape[0]], [key.shape[0]])
        return sdpa_per_document(query, key, value, one, is_cross)

    for module in model.modules():
        if isinstance(module, Attention):
            module.core = core


def attend_across_texts(monkeypatch, model):
    def core(query, key, value, layout, is_cross):
        one = PackLayout.build([query.shape[0]], [key.shape[0]]) if is_cross else layout
        return sdpa_per_document(query, key, value, one, is_cross)

    for module in model.modules():
        if isinstance(module, Attention):
            module.core = core


def keep_counting_positions(monkeypatch, model):
    def change(inputs):
        _, _, h, w = inputs.shapes[0]
        count, h, w = torch.arange(inputs.tokens_LP.shape[0]), h // 2, w // 2
        running = torch.stack([count // (h * w), count // w % h, count % w], dim=1)
        return dataclasses.replace(inputs, positions_L3=running)

    mutate_inputs(monkeypatch, change)


def first_timestep_for_all(monkeypatch, model):
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, positions, t, *rest: forward(
        tokens, positions, t[:1].expand_as(t), *rest
    ))  # fmt: skip


def offsets_off_by_one(monkeypatch, model):
    def core(query, key, value, layout, is_cross):
        if len(layout.lengths) > 1 and not is_cross:
            first, second, *others = layout.lengths
            layout = PackLayout.build([first - 1, second + 1, *others], layout.text_lengths)
        return sdpa_per_document(query, key, value, layout, is_cross)

    for block in model.blocks:
        block.attn1.core = core


@pytest.mark.parametrize(
    "mutation",
    [attend_across_documents, attend_across_texts, keep_counting_positions, first_timestep_for_all, offsets_off_by_one],
)
def test_the_check_catches(mutation, monkeypatch, byte_model, samples):
    mutation(monkeypatch, byte_model)
    values, gradients = disagreement(byte_model, *samples)
    assert values > 100 * TOLERANCE
    assert gradients > 100 * TOLERANCE


def roll_condition(monkeypatch, model):
    def change(inputs):
        rolled = inputs.conditioning.tokens_LP.roll(1, 0)
        return dataclasses.replace(inputs, conditioning=dataclasses.replace(inputs.conditioning, tokens_LP=rolled))

    mutate_inputs(monkeypatch, change)


def one_image_row_too_far(monkeypatch, model):
    def change(inputs):
        first, second, *others = inputs.layout.image_lengths
        lengths = inputs.layout.lengths, inputs.layout.text_lengths
        layout = PackLayout.build(*lengths, image_lengths=[first + 1, second - 1, *others])
        return dataclasses.replace(inputs, layout=layout)

    mutate_inputs(monkeypatch, change)


def first_sample_decides_what_is_clean(monkeypatch, model):
    def change(inputs):
        is_clean = inputs.positions_L3[:, 0] < 1
        return dataclasses.replace(inputs, conditioning=dataclasses.replace(inputs.conditioning, is_clean_L=is_clean))

    mutate_inputs(monkeypatch, change)


@pytest.mark.parametrize("mutation", [roll_condition, one_image_row_too_far, first_sample_decides_what_is_clean])
def test_the_check_of_images_catches(mutation, monkeypatch, image_model, samples, text_rows, conditioning):
    mutation(monkeypatch, image_model)
    latents, t, _ = samples
    values, gradients = disagreement(image_model, latents, t, text_rows, conditioning)
    assert values > 100 * TOLERANCE
    assert gradients > 100 * TOLERANCE


@pytest.mark.parametrize("core", [sdpa_per_document, masked_sdpa])
def test_other_images_change_nothing(core, image_model, samples, text_rows, conditioning):
    for block in image_model.blocks:
        block.attn2.core = core
    latents, t, _ = samples
    kept = 1
    clean = predict(image_model, latents, t, text_rows, conditioning)[kept]
    noise = torch.full((4,), torch.nan) if core is sdpa_per_document else torch.full((4,), 1e3)

    def others(values):
        return [x if i == kept else torch.full_like(x, noise[i]) for i, x in enumerate(values)]

    poisoned = dataclasses.replace(conditioning, latents=others(conditioning.latents), image=others(conditioning.image))
    predictions = predict(image_model, latents, t, text_rows, poisoned)
    assert torch.equal(predictions[kept], clean)
    assert not torch.equal(predictions[0], predict(image_model, latents, t, text_rows, conditioning)[0])


def test_clean_frames_are_a_timestep_of_zero(byte_model, samples):
    latents, t, captions = samples
    clean_frames = [1, 0, 1, 1]
    got = predict(byte_model, latents, t, captions, Conditioning(clean_frames=clean_frames))
    inputs = pack_inputs(latents, captions, byte_model.config)
    t_L = t[inputs.layout.sample_L]
    t_L[inputs.positions_L3[:, 0] < torch.tensor(clean_frames)[inputs.layout.sample_L]] = 0
    for a, b in zip(got, predict(byte_model, latents, t_L, captions), strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)
    plain = predict(byte_model, latents, t, captions)
    assert (got[0] - plain[0]).abs().max() > 1e-3
    assert torch.equal(got[1], plain[1])


@pytest.mark.parametrize("kind", ["bytes", "rows"])
def test_other_samples_can_be_nan(kind, byte_model, rows_model, samples, text_rows):
    model = byte_model if kind == "bytes" else rows_model
    latents, t, captions = samples
    text = captions if kind == "bytes" else text_rows
    kept = 2
    clean = predict(model, latents, t, text)[kept]
    poisoned = [sample if i == kept else torch.full_like(sample, torch.nan) for i, sample in enumerate(latents)]
    bad_t = torch.where(torch.arange(4) == kept, t, torch.nan)
    if kind == "rows":
        text = [rows if i == kept else torch.full_like(rows, torch.nan) for i, rows in enumerate(text_rows)]
    poisoned[kept] = poisoned[kept].clone().requires_grad_()
    predictions = predict(model, poisoned, bad_t, text)
    assert torch.equal(predictions[kept], clean)
    assert predictions[0].isnan().all()
    predictions[kept].sum().backward()
    assert poisoned[kept].grad.isfinite().all()


def test_order_in_the_pack_does_not_matter(byte_model, samples):
    latents, t, captions = samples
    straight = predict(byte_model, latents, t, captions)
    order = [2, 0, 3, 1]
    turned = predict(byte_model, [latents[i] for i in order], t[order], [captions[i] for i in order])
    for place, i in enumerate(order):
        torch.testing.assert_close(turned[place], straight[i], atol=TOLERANCE, rtol=0)


def test_timestep_per_token_equals_per_sample(byte_model, samples):
    latents, t, captions = samples
    inputs = pack_inputs(latents, captions, byte_model.config)
    per_sample = byte_model(inputs.tokens_LP, inputs.positions_L3, t, inputs.text, inputs.layout)
    per_token = byte_model(inputs.tokens_LP, inputs.positions_L3, t[inputs.layout.sample_L], inputs.text, inputs.layout)
    torch.testing.assert_close(per_token, per_sample, atol=TOLERANCE, rtol=0)


def test_bf16_weights_stay_close_to_float32(byte_model, samples):
    full = predict(byte_model, *samples)
    half = predict(byte_model.to(torch.bfloat16), *samples)
    for a, b in zip(full, half, strict=True):
        assert b.dtype == torch.float32
        assert F.mse_loss(b, a) < 2e-3 * a.square().mean()
