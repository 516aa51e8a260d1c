"""Videos of Wan's folders are those of diffusers' pipelines: two experts, first frames in all three ways."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from wan_folder import save_pipeline, tiny_model

from sora_train import generation
from sora_train.config.root import ConfigError
from sora_train.config.validation import SamplingConfig
from sora_train.diffusion.samplers import sampler_grid
from sora_train.encoders.first_frame import ImageEncoder, condition_channels
from sora_train.encoders.video_codec import to_unit_range
from sora_train.generation import Experts, Request, draw_noise, sample_pack
from sora_train.sample import open_run

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
HEIGHT, WIDTH, FRAMES = 32, 32, 9
CONDITIONED = {"condition_channels": condition_channels(4, 4)}
FOLDERS: dict[str, dict[str, Any]] = {
    "2.1 T2V": {},
    "2.2 T2V A14B": {"boundary": 0.7},
    "2.1 I2V": {"config": tiny_model(**CONDITIONED, image_width=10)},
    "2.2 I2V A14B": {"config": tiny_model(**CONDITIONED), "boundary": 0.7},
    "2.2 TI2V": {"takes_frames": True},
    "2.2 TI2V of text": {"takes_frames": True},
}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def their_pipeline(folder: Path, shift: float) -> Any:
    """diffusers' pipeline of the folder, on our grid of t."""

    class Grid(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(sigmas=sampler_grid(num_inference_steps, shift)[:-1], device=device)

    index = json.loads((folder / "model_index.json").read_text())
    low = folder / "transformer_2"
    parts: dict[str, Any] = {
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        "vae": diffusers.AutoencoderKLWan.from_pretrained(folder / "vae"),
        "scheduler": Grid(),
        "transformer": diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer"),
        "transformer_2": diffusers.WanTransformer3DModel.from_pretrained(low) if low.is_dir() else None,
        "boundary_ratio": index["boundary_ratio"],
        "expand_timesteps": index["expand_timesteps"],
    }
    return parts


def theirs(folder: Path, request: Request, sampling: SamplingConfig, noise: torch.Tensor) -> torch.Tensor:
    parts = their_pipeline(folder, sampling.shift)
    how = {
        "prompt": request.prompt, "height": request.height, "width": request.width, "num_frames": request.num_frames,
        "num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance_scale, "latents": noise[None],
        "output_type": "latent",
    }  # fmt: skip
    if request.image:
        if (folder / "image_encoder").is_dir():
            parts["image_encoder"] = transformers.CLIPVisionModel.from_pretrained(folder / "image_encoder")
            parts["image_processor"] = transformers.CLIPImageProcessor.from_pretrained(folder / "image_processor")
        pipe = diffusers.WanImageToVideoPipeline(**parts)
        how["image"] = Image.open(request.image)
    else:
        pipe = diffusers.WanPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    latents: torch.Tensor = pipe(**how).frames[0]
    return latents


@pytest.mark.parametrize("name", FOLDERS)
def test_latents_are_those_of_diffusers(
    name: str, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It cleans captions with a library that need not be here.
    cleaner = SimpleNamespace(fix_text=lambda text: text)
    monkeypatch.setattr(diffusers.pipelines.wan.pipeline_wan_i2v, "ftfy", cleaner, raising=False)
    folder = save_pipeline(tmp_path / "wan", **FOLDERS[name])
    run = open_run(folder, CPU)
    image = str(picture) if "I2V" in name and "text" not in name else ""
    requests = [
        Request("a red square moves left", HEIGHT, WIDTH, FRAMES, 3, image),
        Request("a blue square", HEIGHT, WIDTH, FRAMES, 4, image),
    ]
    run.check(requests)
    sampling = SamplingConfig(steps=4, guidance_scale=3.0, shift=2.0)
    ours = sample_pack(
        run.model, run.codec, requests, sampling, run.config.diffusion, run.encode_text, run.encode_image
    )
    for latents, request in zip(ours, requests, strict=True):
        wanted = theirs(folder, request, sampling, draw_noise(request, run.codec.shape))
        wanted = wanted if wanted.shape == latents.shape else wanted[0]
        torch.testing.assert_close(latents, wanted, atol=3e-4, rtol=3e-4)
    if "TI2V" in name and image:
        frame = to_unit_range(torch.from_numpy(np.asarray(Image.open(image)).copy())[None])
        assert torch.equal(ours[0][:, :1], run.codec.encode(frame)), "the first frame is the picture's"


def test_an_expert_works_on_its_side_of_the_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(save_pipeline(tmp_path / "wan", boundary=0.75), CPU)
    assert isinstance(run.model, Experts)
    worked: list[tuple[str, float]] = []
    predict = generation.predict

    def watched(model: Any, noisy: Any, t_S: torch.Tensor, *others: Any) -> Any:
        worked.append(("high" if model is run.model.high else "low", float(t_S[0])))
        return predict(model, noisy, t_S, *others)

    monkeypatch.setattr(generation, "predict", watched)
    run.generate([Request("a", 16, 16, 5, 0)], SamplingConfig(steps=4, guidance_scale=1.0))
    assert worked == [("high", 1.0), ("high", 0.75), ("low", 0.5), ("low", 0.25)]
    assert not torch.equal(run.model.high.proj_out.weight, run.model.low.proj_out.weight)


def test_sizes_and_shift_are_those_the_folder_is_sampled_with(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "wan")
    assert open_run(folder, CPU).config.sampling.shift == 5.0
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 3.0, "shift": 1.0}')
    config = open_run(folder, CPU).config
    assert config.sampling.shift == 3.0
    assert (config.validation.height, config.validation.width, config.validation.frames) == (480, 832, 81)
    assert config.text_encoder.pad_to_max


def test_images_are_asked_for_and_refused(tmp_path: Path, picture: Path) -> None:
    text = open_run(save_pipeline(tmp_path / "t2v"), CPU)
    image = open_run(save_pipeline(tmp_path / "i2v", tiny_model(**CONDITIONED)), CPU)
    plain = Request("a", HEIGHT, WIDTH, FRAMES, 0)
    with pytest.raises(ConfigError, match="makes videos of images: give one with --image"):
        image.check([plain])
    with pytest.raises(ConfigError, match="trained on text alone, leave it out"):
        text.check([Request("a", HEIGHT, WIDTH, FRAMES, 0, str(picture))])
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"no\.png cannot be read"):
        image.check([Request("a", HEIGHT, WIDTH, FRAMES, 0, str(tmp_path / "no.png"))])
    shutil.rmtree(tmp_path / "i2v" / "vae")
    with pytest.raises(ConfigError, match=r"codec\.path"):
        open_run(tmp_path / "i2v", CPU)


def test_a_picture_of_another_shape_is_scaled_and_cut(tmp_path: Path) -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 200  # the middle third is what remains
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    frame = generation.read_image(Request("a", 16, 16, 5, 0, str(tmp_path / "wide.png")))
    assert frame.shape == (16, 16, 3)
    assert (frame[:, 4:-4] == 200).all()


@pytest.mark.parametrize("size", [(40, 56), (70, 33), (32, 32), (20, 24)])
def test_pictures_reach_clip_as_its_own_preparation_brings_them(size: tuple[int, int]) -> None:
    """That rounds to 8 bits after each axis, ours does not: two levels apart at most."""
    prepare = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_std=[1, 1, 1], image_mean=[0, 0, 0]
    )
    pixels = np.random.default_rng(0).integers(80, 176, (*size, 3), dtype=np.uint8)
    wanted = prepare(images=Image.fromarray(pixels), return_tensors="pt").pixel_values[0]

    class Model:
        device, dtype = CPU, torch.float32
        config = type("Config", (), {"hidden_size": 1})

        def eval(self) -> "Model":
            return self

        def requires_grad_(self, _: bool) -> "Model":
            return self

        def __call__(self, pixel_values: torch.Tensor, **_: Any) -> Any:
            return type("Out", (), {"hidden_states": [None, pixel_values, None]})

    encoder = ImageEncoder(Model(), 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    rows = encoder.encode(to_unit_range(torch.from_numpy(pixels)[None])[:, 0])
    assert rows.shape == wanted.shape
    assert (rows - wanted).abs().max() < 2.01 / 255
