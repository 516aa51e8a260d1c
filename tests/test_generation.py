"""generation: what comes out is what the model predicts, whatever the pack, the solver and the prediction's space."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sora_train import generation
from sora_train.config.diffusion import DiffusionConfig, Target
from sora_train.config.encoders import CodecConfig
from sora_train.config.model import ModelConfig, TextConfig
from sora_train.config.root import ConfigError
from sora_train.config.validation import SamplingConfig, Solver
from sora_train.encoders.codec_shape import CodecShape
from sora_train.encoders.video_codec import to_unit_range
from sora_train.encoders.wavelet import WaveletCodec
from sora_train.generation import Request, check_sizes, draw_noise, generate, packs
from sora_train.models.video_dit import VideoDiT

CODEC = WaveletCodec(CodecConfig(temporal_ratio=2, spatial_ratio=4))
MODEL = ModelConfig(
    width=48, depth=2, heads=4, mlp_width=96, in_channels=96, out_channels=96, text=TextConfig(width=32, heads=2)
)
REQUESTS = [
    Request("a red circle", 32, 40, 5, seed=1),
    Request("a blue square, moving left (slowly)", 16, 24, 1, seed=2),
    Request("", 24, 16, 3, seed=3),
]


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    """Weights far from their zeros, so that text, t and neighbours would show."""
    model = VideoDiT(MODEL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def scene_of(request: Request) -> np.ndarray:
    rng = np.random.default_rng(request.seed)
    return rng.integers(0, 256, (request.num_frames, request.height, request.width, 3), dtype=np.uint8)


@pytest.mark.parametrize("prediction", list(Target))
@pytest.mark.parametrize("solver", list(Solver))
def test_a_perfect_model_generates_the_very_frames(monkeypatch, model, prediction, solver):
    answers = {r.prompt: CODEC.encode(to_unit_range(torch.from_numpy(scene_of(r)))) for r in REQUESTS}

    def perfect(model, noisy, t_S, text, conditioning=None):
        return [
            answers[prompt] if prediction is Target.latents else (sample - answers[prompt]) / t
            for sample, t, prompt in zip(noisy, t_S, text, strict=True)
        ]

    monkeypatch.setattr(generation, "predict", perfect)
    sampling = SamplingConfig(steps=7, solver=solver, guidance_scale=1.0)
    videos = generate(model, CODEC, REQUESTS, sampling, DiffusionConfig(prediction=prediction))
    for request, frames in zip(REQUESTS, videos, strict=True):
        assert np.abs(frames.astype(int) - scene_of(request)).max() <= 1


def test_guidance_goes_from_no_text_beyond_text(monkeypatch, model):
    """With latents c for a prompt and u for none, the guided field leads to u + scale (c - u)."""
    levels = {"": 0.1, "bright": 0.2}

    def flat(model, noisy, t_S, text, conditioning=None):
        values = []
        for sample, prompt in zip(noisy, text, strict=True):
            frames = torch.full((3, 3, sample.shape[2] * 4, sample.shape[3] * 4), levels[prompt])
            values.append(CODEC.encode(frames))
        return values

    monkeypatch.setattr(generation, "predict", flat)
    for scale, level in ((1.0, 0.2), (3.0, 0.4), (0.0, 0.1)):
        sampling = SamplingConfig(steps=3, guidance_scale=scale)
        diffusion = DiffusionConfig(prediction=Target.latents)
        (frames,) = generate(model, CODEC, [Request("bright", 16, 16, 3, 0)], sampling, diffusion)
        assert np.abs(frames.astype(float) - (level + 1) * 127.5).max() <= 1, scale


def test_guidance_is_one_pack_and_its_absence_half_of_it(monkeypatch, model):
    sizes = []
    predict = generation.predict

    def counting(model, noisy, t_S, text, conditioning=None):
        sizes.append((len(noisy), len(text)))
        return predict(model, noisy, t_S, text)

    monkeypatch.setattr(generation, "predict", counting)
    for scale, expected in ((2.0, 6), (1.0, 3)):
        sizes.clear()
        generate(model, CODEC, REQUESTS, SamplingConfig(steps=2, guidance_scale=scale), DiffusionConfig())
        assert sizes == [(expected, expected)] * 2


def test_a_prompt_gives_the_same_video_whatever_stands_beside_it(model):
    sampling, diffusion = SamplingConfig(steps=3, guidance_scale=2.0), DiffusionConfig()
    together = generate(model, CODEC, REQUESTS, sampling, diffusion)
    split = generate(model, CODEC, REQUESTS, sampling, diffusion, max_tokens_per_pack=1)
    alone = [generate(model, CODEC, [request], sampling, diffusion)[0] for request in reversed(REQUESTS)][::-1]
    for request, *videos in zip(REQUESTS, together, split, alone, strict=True):
        for frames in videos:
            assert frames.shape == (request.num_frames, request.height, request.width, 3)
            assert np.abs(frames.astype(int) - videos[0]).max() <= 1
    other_seed = generate(model, CODEC, [replace(REQUESTS[0], seed=9)], sampling, diffusion)[0]
    assert np.abs(other_seed.astype(int) - together[0]).max() > 10
    other_text = generate(model, CODEC, [replace(REQUESTS[0], prompt="!")], sampling, diffusion)[0]
    assert np.abs(other_text.astype(int) - together[0]).max() > 1


def test_the_model_is_left_as_it_was(model):
    for is_training in (True, False):
        model.train(is_training)
        generate(model, CODEC, REQUESTS[1:2], SamplingConfig(steps=1), DiffusionConfig())
        assert model.training is is_training


def test_packs_keep_order_and_limit():
    shape = CodecShape(96, 2, 4)
    requests = [Request(str(index), 64, 64, 9, index) for index in range(5)]  # 320 tokens each
    for limit, scale, expected in ((640, 1.0, [2, 2, 1]), (1300, 4.0, [2, 2, 1]), (1, 1.0, [1] * 5), (10**6, 4.0, [5])):
        made = list(packs(requests, MODEL, shape, scale, limit))
        assert [len(pack) for pack in made] == expected
        assert [request for pack in made for request in pack] == requests


def test_noise_is_the_seeds_alone():
    shape = CodecShape(4, 1, 1)
    noise = draw_noise(Request("a", 8, 8, 2, seed=5), shape)
    assert torch.equal(noise, draw_noise(Request("b", 8, 8, 2, seed=5), shape))
    assert not torch.equal(noise, draw_noise(Request("a", 8, 8, 2, seed=6), shape))


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((68, 64, 9), "height=68 is not a multiple of 8: use 64 or 72"),
        ((64, 4, 9), "width=4 is not a multiple of 8: use 8 or 16"),
        ((64, 64, 8), "frames=8 is not 1 plus a multiple of 2: use 7 or 9"),
        ((64, 64, 0), "frames=0 is not 1 plus a multiple of 2: use 1 or 3"),
    ],
)
def test_sizes_that_do_not_divide_are_named_with_a_way_out(size, says):
    with pytest.raises(ConfigError, match=says):
        check_sizes([Request("a", *size, seed=0)], MODEL, CODEC.shape)
    check_sizes([Request("a", 64, 72, 9, seed=0)], MODEL, CODEC.shape)
