"""Clips whose first frame is known: what the model is told, which tokens count, what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_step import ALL, ALONE, ENCODERS, MODEL, SIZES, gradient, pack_of

from sora_train.config.diffusion import CountedBy, DiffusionConfig, Target
from sora_train.config.root import ConfigError, TrainConfig, build_config
from sora_train.cost.flops import step_flops
from sora_train.encoders.codec_shape import CodecShape
from sora_train.encoders.first_frame import condition_latents
from sora_train.encoders.video_codec import to_unit_range
from sora_train.models.inputs import Conditioning
from sora_train.models.video_dit import VideoDiT, predict
from sora_train.training.first_frames import check_first_frames
from sora_train.training.metrics import COUNTED
from sora_train.training.step import diffusion_loss

CODEC = ENCODERS.codec.shape
IMAGE_TO_VIDEO = replace(MODEL, condition_channels=CODEC.temporal_ratio + CODEC.channels, image_width=10)
# Draws of the clips are 0, 0.25, 0.5, 0.75: here those of the first three; the first is an image.
SOME = DiffusionConfig(first_frame_probability=0.6)
EVERY = DiffusionConfig(first_frame_probability=1.0)


class Rows:
    """In place of CLIP."""

    def encode(self, frame_3HW: torch.Tensor) -> torch.Tensor:
        return frame_3HW.mean() * torch.arange(30.0).reshape(3, 10)


def build(config: Any = MODEL) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    return build()


@pytest.mark.parametrize("counted_by", list(CountedBy))
@pytest.mark.parametrize("prediction", list(Target))
def test_the_loss_is_that_of_the_noisy_frames_written_out(
    model: VideoDiT, counted_by: CountedBy, prediction: Target
) -> None:
    config = replace(SOME, counted_by=counted_by, prediction=prediction, loss_on=prediction)
    pack = pack_of(ALL, ALL)
    known = [False, True, True, False]
    latents = [ENCODERS.codec.encode(to_unit_range(frames)) for frames in pack.frames]
    noisy = [(1 - t) * x + t * noise for x, noise, t in zip(latents, pack.noise, pack.t_S, strict=True)]
    noisy = [torch.cat([x[:, :1], n[:, 1:]], 1) if k else n for x, n, k in zip(latents, noisy, known, strict=True)]
    predictions = predict(model, noisy, pack.t_S, pack.text, Conditioning(clean_frames=[int(k) for k in known]))
    total, tokens = torch.tensor(0.0), 0
    for x, noise, made, k in zip(latents, pack.noise, predictions, known, strict=True):
        wanted = noise - x if prediction is Target.velocity else x
        error = (made - wanted).square()[:, int(k) :]
        count = error[0].numel() // 4
        total = total + error.mean() * (count if counted_by is CountedBy.tokens else 1)
        tokens += x[0].numel() // 4
    expected = total / (tokens if counted_by is CountedBy.tokens else 4)
    result = diffusion_loss(model, pack, ENCODERS, MODEL, config, ALONE)
    torch.testing.assert_close(result.loss, expected)


@pytest.mark.parametrize("counted_by", list(CountedBy))
def test_the_gradient_does_not_depend_on_the_packs(model: VideoDiT, counted_by: CountedBy) -> None:
    config = replace(SOME, counted_by=counted_by)
    loss, whole = gradient(model, [pack_of(ALL, ALL)], config)
    plain, _ = gradient(model, [pack_of(ALL, ALL)], DiffusionConfig(counted_by=counted_by))
    assert abs(loss - plain) > 1e-3 * plain
    packs = [pack_of(numbers, ALL) for numbers in ([3, 0], [2], [1])]
    # A pack's draws stand in the order of its clips.
    packs = [
        replace(pack, first_frame_draws=tuple(0.25 * sample.index for sample in pack.samples)) for pack in packs
    ]
    other_loss, other = gradient(model, packs, config)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-6)


def test_a_clean_frame_is_seen_and_has_no_error(model: VideoDiT) -> None:
    """What stands in it changes the others' error; its own noise and prediction change nothing."""
    pack = pack_of([2], [2])
    loss = diffusion_loss(model, pack, ENCODERS, MODEL, EVERY, ALONE).loss
    assert pack.noise[0] is not None
    noise = pack.noise[0].clone()
    noise[:, 0] = 7
    assert torch.equal(diffusion_loss(model, replace(pack, noise=[noise]), ENCODERS, MODEL, EVERY, ALONE).loss, loss)
    assert pack.frames[0] is not None
    frames = pack.frames[0].clone()
    frames[0] = 9
    changed = diffusion_loss(model, replace(pack, frames=[frames]), ENCODERS, MODEL, EVERY, ALONE).loss
    assert (changed - loss).abs() > 1e-6


def test_images_stay_noisy(model: VideoDiT) -> None:
    assert SIZES[0][0] == 1
    pack = pack_of([0], [0])
    known, plain = (diffusion_loss(model, pack, ENCODERS, MODEL, c, ALONE).loss for c in (EVERY, DiffusionConfig()))
    torch.testing.assert_close(known, plain)


@pytest.mark.parametrize("image_rows", [0, 3])
def test_flops_count_the_images_and_each_t(model: VideoDiT, image_rows: int) -> None:
    config = IMAGE_TO_VIDEO if image_rows else MODEL
    used, encoders = (build(config), replace(ENCODERS, image=Rows())) if image_rows else (model, ENCODERS)
    pack = pack_of([1, 2], [1, 2])
    texts = [len(text) + 1 for text in pack.text if isinstance(text, str)]
    expected = sum(
        step_flops(config, sample.num_tokens, text, image_rows, 1 if image_rows else 2)
        for sample, text in zip(pack.samples, texts, strict=True)
    )
    counts = diffusion_loss(used, pack, encoders, config, EVERY, ALONE).counts
    assert counts[COUNTED.index("flops")] == expected


@pytest.mark.parametrize("are_made_in_advance", [False, True])
def test_image_to_video_models_are_given_frame_and_rows(are_made_in_advance: bool) -> None:
    """Of latents made in advance the codec gives the first frame back, here without loss."""
    model, encoders = build(IMAGE_TO_VIDEO), replace(ENCODERS, image=Rows())
    pack = pack_of([1, 2], [1, 2])
    frames = [to_unit_range(pixels) for pixels in pack.frames if pixels is not None]
    latents = [ENCODERS.codec.encode(clip) for clip in frames]
    noisy = [(1 - t) * x + t * noise for x, noise, t in zip(latents, pack.noise, pack.t_S, strict=True)]
    conditioning = Conditioning(
        latents=[condition_latents(ENCODERS.codec, clip[:, 0], clip.shape[1]) for clip in frames],
        image=[Rows().encode(clip[:, 0]) for clip in frames],
    )
    mask = conditioning.latents[0][: CODEC.temporal_ratio]
    assert (mask[:, 0] == 1).all()
    assert (mask[:, 1:] == 0).all()
    predictions = predict(model, noisy, pack.t_S, pack.text, conditioning)
    errors = [
        (p - (n - x)).square().sum() for p, n, x in zip(predictions, pack.noise, latents, strict=True)
    ]
    expected = sum(errors) / 96 / 4 / sum(x[0].numel() // 4 for x in latents)
    if are_made_in_advance:
        pack = replace(pack, frames=[None, None], latents=list(latents))
    result = diffusion_loss(model, pack, encoders, IMAGE_TO_VIDEO, EVERY, ALONE)
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=0)


def config_of(**values: Any) -> TrainConfig:
    model = {"in_channels": 16, "out_channels": 16, **values.pop("model", {})}
    return build_config(TrainConfig, {"data": {"shards": "x"}, "model": model, **values})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model": {"condition_channels": 20}}, "set diffusion.first_frame_probability=1"),
        (
            {"model": {"condition_channels": 17}, "diffusion": {"first_frame_probability": 1.0}},
            "set model.condition_channels=20",
        ),
        ({"model": {"image_width": 8}}, "set model.condition_channels=20"),
        (
            {"model": {"condition_channels": 20, "image_width": 8}, "diffusion": {"first_frame_probability": 1.0}},
            "set parallel.largest_group=1",
        ),
        (
            {
                "model": {"condition_channels": 20},
                "diffusion": {"first_frame_probability": 1.0},
                "validation": {"prompts": ["a"]},
            },
            "validation.prompts have no first frames",
        ),
        (
            {"model": {"patch_frames": 2}, "diffusion": {"first_frame_probability": 0.5}},
            "model.patch_frames=2: a token would be half known",
        ),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_first_frames(config_of(**values), CodecShape(16, 4, 8))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_can_be_is_not() -> None:
    shape = CodecShape(16, 4, 8)
    known = {"diffusion": {"first_frame_probability": 1.0}}
    check_first_frames(config_of(), shape)
    check_first_frames(config_of(**known), shape)
    check_first_frames(config_of(model={"condition_channels": 20}, **known), shape)
    image = {"condition_channels": 20, "image_width": 8}
    check_first_frames(config_of(model=image, parallel={"largest_group": 1}, **known), shape)
