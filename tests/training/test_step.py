"""The loss of a step is one sum over its tokens: whatever the packs, and whatever of it could not be read."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sora_train.config.diffusion import CountedBy, DiffusionConfig, Target
from sora_train.config.encoders import CodecConfig
from sora_train.config.model import ModelConfig, TextConfig
from sora_train.config.parallel import ParallelConfig
from sora_train.data.order import PlannedSample
from sora_train.data.pack import Failure, Pack
from sora_train.data.packing import PackPlan, Piece
from sora_train.data.schema import IndexRow
from sora_train.data.size import ClipSize
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.encoders.video_codec import build_codec
from sora_train.models.video_dit import VideoDiT, predict
from sora_train.training.metrics import COUNTED, Metrics
from sora_train.training.step import Encoders, diffusion_loss

MODEL = ModelConfig(
    width=32,
    depth=2,
    heads=2,
    mlp_width=64,
    in_channels=96,
    out_channels=96,
    text=TextConfig(width=16, layers=1, heads=2),
)
ALONE = SequenceGroups({})
ENCODERS = Encoders(build_codec(CodecConfig(), "cpu"), None)
TEXT = ["a cat", "", "two dogs", "x"]
ALL = [0, 1, 2, 3]
SIZES = [(1, 16, 16), (3, 16, 24), (5, 24, 16), (3, 32, 32)]


def pack_of(numbers: list[int], planned: list[int]) -> Pack:
    """A pack of some of the four clips; `planned` are all clips of the step."""
    tokens = [(1 + (t - 1) // 2) * (h // 8) * (w // 8) for t, h, w in SIZES]
    samples, frames, noise = [], [], []
    for number in numbers:
        t, h, w = SIZES[number]
        generator = torch.Generator().manual_seed(number)
        row = IndexRow(f"clip-{number}", "mp4", 0, 0, t, 8.0, h, w, 1.0, "ab")
        shape = ENCODERS.codec.shape.latent_shape(t, h, w)
        size = ClipSize(t, h, w, h, w, 0, 1.0)
        samples.append(PlannedSample(0, number, 0, 0, row, size, shape, tokens[number], None))
        frames.append(torch.randint(0, 256, (t, h, w, 3), dtype=torch.uint8, generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    tokens_of_step = sum(tokens[number] for number in planned)
    return Pack(
        plan=PackPlan(0, 0, True, tuple(samples), tokens_of_step, len(planned)),
        pieces=tuple(Piece(sample, range(sample.num_tokens), True) for sample in samples),
        frames=frames,
        latents=[None] * len(frames),
        noise=noise,
        t_S=torch.tensor([0.2 + 0.2 * number for number in numbers]),
        first_frame_draws=tuple(0.25 * number for number in numbers),
        text=[TEXT[number] for number in numbers],
        weight=torch.ones(len(numbers)),
        is_tried=(True,) * len(numbers),
        failures=(),
    )


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    torch.manual_seed(0)
    built = VideoDiT(MODEL)
    with torch.no_grad():  # away from the zeros of its initialisation
        for parameter in built.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return built


def gradient(model: VideoDiT, packs: list[Pack], config: DiffusionConfig) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    total = 0.0
    for pack in packs:
        result = diffusion_loss(model, pack, ENCODERS, MODEL, config, ALONE)
        result.loss.backward()
        total += result.loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("counted_by", list(CountedBy))
@pytest.mark.parametrize("prediction", list(Target))
def test_gradient_does_not_depend_on_the_packs(model: VideoDiT, counted_by: CountedBy, prediction: Target) -> None:
    config = DiffusionConfig(prediction=prediction, counted_by=counted_by)
    loss, whole = gradient(model, [pack_of(ALL, ALL)], config)
    for split in ([[0], [1], [2], [3]], [[3, 0, 1], [2]], [[1, 2], [0, 3]]):
        other_loss, other = gradient(model, [pack_of(numbers, ALL) for numbers in split], config)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-6)


def test_a_mean_of_pack_means_would_be_wrong(model: VideoDiT) -> None:
    """What the count in `planned_tokens` is for: packs of unequal size divided by their own counts weigh clips
    unequally."""
    config = DiffusionConfig()
    _, whole = gradient(model, [pack_of(ALL, ALL)], config)
    own = [pack_of(numbers, numbers) for numbers in ([0], [1, 2, 3])]
    _, wrong = gradient(model, own, config)
    assert (wrong / 2 - whole).abs().max() > 1e-3 * whole.abs().max()


def test_a_masked_clip_leaves_the_gradient_of_the_others_as_it_was(model: VideoDiT) -> None:
    config = DiffusionConfig()
    _, without = gradient(model, [pack_of([0, 1, 3], ALL)], config)
    masked = pack_of(ALL, ALL)
    masked = replace(
        masked,
        frames=[torch.zeros_like(f) if i == 2 else f for i, f in enumerate(masked.frames)],
        weight=torch.tensor([1.0, 1.0, 0.0, 1.0]),
        failures=(Failure("clip-2", "shard-000000.tar", "cut short"),),
    )
    _, with_mask = gradient(model, [masked], config)
    torch.testing.assert_close(with_mask, without, rtol=1e-4, atol=1e-6)
    result = diffusion_loss(model, masked, ENCODERS, MODEL, config, ALONE)
    trained = [sample for i, sample in enumerate(masked.samples) if i != 2]
    counts = dict(zip(COUNTED, result.counts.tolist(), strict=True))
    assert counts["clips"] == 3, "what was not trained on is not counted"
    assert counts["tokens"] == sum(sample.num_tokens for sample in trained)
    assert counts["frames"] == sum(sample.size.num_frames for sample in trained)
    assert result.tried - counts["clips"] == 1


def test_loss_is_the_mean_squared_error_written_out(model: VideoDiT) -> None:
    """Against the formula, one clip, velocity."""
    pack = pack_of([1], [1])
    latents = ENCODERS.codec.encode(pack.frames[0].permute(3, 0, 1, 2).float() / 127.5 - 1)
    t = float(pack.t_S[0])
    noisy = (1 - t) * latents + t * pack.noise[0]
    prediction = predict(model, [noisy], pack.t_S, pack.text)[0]
    expected = (prediction - (pack.noise[0] - latents)).square().mean()
    result = diffusion_loss(model, pack, ENCODERS, MODEL, DiffusionConfig(), ALONE)
    torch.testing.assert_close(result.loss, expected)


def test_what_was_encoded_in_advance_is_not_encoded_again(model: VideoDiT) -> None:
    """Latents beside frames give the loss of frames alone; rows stand among encoded captions, in their places."""
    pack = pack_of(ALL, ALL)
    made = ENCODERS.latents(pack)
    before = replace(
        pack,
        frames=[None if i % 2 else frames for i, frames in enumerate(pack.frames)],
        latents=[latents if i % 2 else None for i, latents in enumerate(made)],
    )
    losses = [diffusion_loss(model, one, ENCODERS, MODEL, DiffusionConfig(), ALONE).loss for one in (pack, before)]
    assert torch.equal(*losses)

    encode = SimpleNamespace(encode=lambda captions: [torch.full((1, 4), float(len(text))) for text in captions])
    encoders = replace(ENCODERS, text=cast(Any, encode))
    mixed = replace(pack, text=["abc", torch.full((2, 4), 7.0), "", torch.full((1, 4), 8.0)])
    assert [float(rows[0, 0]) for rows in encoders.text_of(mixed)] == [3.0, 7.0, 0.0, 8.0]
    assert encoders.text_of(replace(pack, text=[torch.zeros(1, 4)] * 4))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{}, {"first_frame_probability": 0.6}, {"condition_channels": 98}])
def test_nothing_is_asked_of_the_device(settings: dict[str, Any]) -> None:
    """From the pack to the metrics. The device is none: tensors without numbers, that cannot be read back."""
    is_conditioned = "condition_channels" in settings
    model_config = replace(MODEL, **settings) if is_conditioned else MODEL
    config = DiffusionConfig() if is_conditioned else DiffusionConfig(**settings)
    nowhere = torch.device("meta")
    encoders = Encoders(build_codec(CodecConfig(), nowhere), None)
    world: Any = SimpleNamespace(device=nowhere, device_name="none", world_size=1)
    metrics = Metrics(world, ParallelConfig())
    pack = pack_of(ALL, ALL).to(nowhere)
    result = diffusion_loss(VideoDiT(model_config).to(nowhere), pack, encoders, model_config, config, ALONE)
    result.loss.backward()
    metrics.add(result)
    metrics.end_step()
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        metrics.reduce()
