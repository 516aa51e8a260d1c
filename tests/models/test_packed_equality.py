"""A pack gives each sample what it would get alone: values, gradients, isolation. And the check itself is checked:
each way of getting packing wrong must make it fail."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.parallel import AttentionKind
from sora_train.config.root import ConfigError
from sora_train.models import video_dit
from sora_train.models.attention import Attention
from sora_train.models.attention_choice import choose_core
from sora_train.models.attention_cores import cudnn_per_document, masked_sdpa, sdpa_per_document
from sora_train.models.inputs import Conditioning, pack_inputs
from sora_train.models.pack_layout import PackLayout
from sora_train.models.video_dit import VideoDiT, predict

TOLERANCE = 1e-5
CORES = [sdpa_per_document, masked_sdpa, cudnn_per_document]  # that run on a CPU, forward and backward


@pytest.fixture(params=CORES, ids=lambda core: core.__name__)
def core(request):
    return request.param


def give(model, core):
    """Every attention of a model, its text encoder's too, one core."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.core = core
    return model


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


def disagreement(model, latents, t, text, conditioning=None, floor=1e-3):
    """Largest difference between a pack and its samples alone: of values, and of gradients relative to their norm (plus
    `floor`).

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
        gradients = max(gradients, float((packed_gradient - total).norm() / (total.norm() + floor)))
    for packed_gradient, a in zip(packed_input, alone, strict=True):
        gradients = max(gradients, float((packed_gradient - a[2][0]).norm() / a[2][0].norm()))
    return float(values), gradients


def test_packed_equals_per_sample_with_bytes(core, byte_model, samples):
    values, gradients = disagreement(give(byte_model, core), *samples)
    assert values < TOLERANCE
    assert gradients < TOLERANCE


def test_packed_equals_per_sample_with_text_rows(core, rows_model, samples, text_rows):
    latents, t, _ = samples
    values, gradients = disagreement(give(rows_model, core), latents, t, text_rows)
    assert values < TOLERANCE
    assert gradients < TOLERANCE


def test_packed_equals_per_sample_with_images_and_clean_frames(core, image_model, samples, text_rows, conditioning):
    latents, t, _ = samples
    values, gradients = disagreement(give(image_model, core), latents, t, text_rows, conditioning)
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

    give(model, core)


def attend_across_texts(monkeypatch, model):
    def core(query, key, value, layout, is_cross):
        one = PackLayout.build([query.shape[0]], [key.shape[0]]) if is_cross else layout
        return sdpa_per_document(query, key, value, one, is_cross)

    give(model, core)


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


def test_other_images_change_nothing(core, image_model, samples, text_rows, conditioning):
    give(image_model, core)
    latents, t, _ = samples
    kept = 1
    clean = predict(image_model, latents, t, text_rows, conditioning)[kept]
    noise = torch.full((4,), 1e3 if core is masked_sdpa else torch.nan)

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


def poisoned(samples, text, kept, poison, others="x"):
    """The samples and texts of a pack, all but one replaced: captions by others of as many bytes."""
    latents, t, _ = samples
    latents = [x if i == kept else torch.full_like(x, poison) for i, x in enumerate(latents)]
    t = torch.where(torch.arange(len(t)) == kept, t, poison)
    if isinstance(text[0], str):
        return latents, t, [x if i == kept else others * len(x.encode()) for i, x in enumerate(text)]
    return latents, t, [x if i == kept else torch.full_like(x, poison) for i, x in enumerate(text)]


def kept_sample(model, latents, t, text, kept):
    """Prediction of one sample of a pack; gradients, of it alone, of its latents and text, and of the parameters."""
    model.zero_grad()
    latents, t = [x.clone().requires_grad_() for x in latents], t.clone().requires_grad_()
    if not isinstance(text[0], str):
        text = [x.clone().requires_grad_() for x in text]
    prediction = predict(model, latents, t, text)[kept]
    (prediction * torch.randn(prediction.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    own = [latents[kept].grad, t.grad[kept]] + ([] if isinstance(text[0], str) else [text[kept].grad])
    parameters = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return prediction.detach(), own, parameters


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("kind", ["bytes", "rows"])
def test_other_samples_change_nothing(core, kind, kept, byte_model, rows_model, samples, text_rows):
    """Bitwise: not the prediction, not what flows back to a sample, and, as long as the others are finite, not what
    flows to the parameters (there NaN times a gradient of zero is NaN, whatever attention does)."""
    model = give(byte_model if kind == "bytes" else rows_model, core)
    latents, t, captions = samples
    text = captions if kind == "bytes" else text_rows
    value, own, parameters = kept_sample(model, latents, t, text, kept)
    assert all(gradient.abs().max() > 1e-3 for gradient in own)
    # The reference multiplies what is masked by zero, which a NaN survives.
    for poison in (1e3, torch.nan)[: 1 if core is masked_sdpa else 2]:
        got_value, got_own, got_parameters = kept_sample(model, *poisoned(samples, text, kept, poison), kept)
        assert torch.equal(got_value, value)
        for a, b in zip(got_own, own, strict=True):
            assert torch.equal(a, b)
        if poison == 1e3:
            for name, gradient in parameters.items():
                torch.testing.assert_close(got_parameters[name], gradient, atol=1e-7, rtol=1e-6, msg=name)
    if core is not masked_sdpa:
        assert predict(model, *poisoned(samples, text, kept, torch.nan))[3].isnan().all()


def test_order_in_the_pack_does_not_matter(core, byte_model, samples):
    give(byte_model, core)
    latents, t, captions = samples
    straight = predict(byte_model, latents, t, captions)
    order = [2, 0, 3, 1]
    turned = predict(byte_model, [latents[i] for i in order], t[order], [captions[i] for i in order])
    for place, i in enumerate(order):
        torch.testing.assert_close(turned[place], straight[i], atol=TOLERANCE, rtol=0)


def random_samples(draw, generator):
    """One to six samples, all alike, of one token each, or of any size; text rows."""

    def size():
        return (4, draw.randint(1, 3), 2 * draw.randint(1, 5), 2 * draw.randint(1, 5))

    count, kind = draw.randint(1, 6), draw.choice(["any", "any", "tokens", "alike"])
    shapes, rows = [size() for _ in range(count)], [draw.randint(1, 9) for _ in range(count)]
    if kind == "alike":
        shapes, rows = shapes[:1] * count, rows[:1] * count
    if kind == "tokens":
        shapes = [(4, 1, 2, 2)] * count
    latents = [torch.randn(shape, generator=generator) for shape in shapes]
    return latents, torch.rand(count, generator=generator), [torch.randn(n, 16, generator=generator) for n in rows]


def test_packed_equals_per_sample_for_thirty_random_packs(core, rows_model):
    draw, generator = random.Random(11), torch.Generator().manual_seed(11)
    give(rows_model, core)
    for _ in range(30):
        pack = random_samples(draw, generator)
        # Attention to a single key has no gradient of queries and keys, while other gradients are tens.
        values, gradients = disagreement(rows_model, *pack, floor=10.0)
        assert values < TOLERANCE, [tuple(x.shape) for x in pack[0]]
        assert gradients < TOLERANCE, [tuple(x.shape) for x in pack[0]]


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


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in AttentionKind if kind is not AttentionKind.masked])
def test_on_cuda_packed_equals_float32_alone(kind, randomized):
    """In bf16, of a model whose heads are 64 wide: as far from float32 on the CPU as bf16 is."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    try:
        cuda_core, _ = choose_core(kind, "cuda", torch.bfloat16, [64])
    except ConfigError as error:
        pytest.skip(str(error))
    text = TextConfig(kind=TextKind.encoder, width=16)
    config = ModelConfig(width=128, depth=2, heads=2, mlp_width=256, in_channels=4, out_channels=4, text=text)
    generator = torch.Generator().manual_seed(0)
    model = randomized(VideoDiT(config))
    latents = [torch.randn(size, generator=generator) for size in ((4, 3, 16, 24), (4, 1, 2, 2), (4, 2, 18, 10))]
    rows = [torch.randn(n, 16, generator=generator) for n in (5, 1, 130)]
    t = torch.tensor([0.9, 0.2, 0.5])
    alone = [predict(model, [x], t[i : i + 1], [rows[i]])[0] for i, x in enumerate(latents)]
    on_cuda = give(model.to("cuda", torch.bfloat16), cuda_core)
    moved = [x.cuda() for x in latents]
    for a, b in zip(predict(on_cuda, moved, t.cuda(), [x.cuda() for x in rows]), alone, strict=True):
        assert F.mse_loss(a.cpu(), b) < 2e-3 * b.square().mean()
