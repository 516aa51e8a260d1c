"""Generates videos from prompts with a trained run, or with open Wan weights.

    python -m sora_train.sample RUN_DIR "a red circle, moving left (slowly)" "two cats" --frames 17
    python -m sora_train.sample RUN_DIR --prompts prompts.txt --height 128 --width 80 --seed 3
    python -m sora_train.sample WAN_DIR "two cats" --image first_frame.png

Each prompt becomes a numbered mp4 and a row of a contact sheet; samples.jsonl says what each was made from. Nothing is
ever overwritten. Any prompt text works: arguments are plain, not configuration.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw

from sora_train.config.command import fail
from sora_train.config.data import DataConfig
from sora_train.config.diffusion import DiffusionConfig
from sora_train.config.encoders import CodecConfig, CodecKind, ImageEncoderConfig, TextEncoderConfig
from sora_train.config.model import TextKind
from sora_train.config.root import ConfigError, TrainConfig, build_config
from sora_train.config.validation import SamplingConfig, Solver, ValidationConfig
from sora_train.data.video_file import Frames, save_video
from sora_train.encoders.first_frame import load_image_encoder
from sora_train.encoders.text_encoder import load_text_encoder
from sora_train.encoders.video_codec import VideoCodec, build_codec, codec_shape
from sora_train.generation import EncodeImage, EncodeText, Experts, Request, check_images, check_sizes, generate
from sora_train.models.attention import apply_core
from sora_train.models.video_dit import VideoDiT
from sora_train.models.wan_weights import (
    EXPERTS,
    PIPELINE,
    WanWeights,
    expert_boundary,
    load_wan,
    sampler_shift,
    starts_from_frames,
)
from sora_train.training.checkpoint_reading import latest_checkpoint, load_weights
from sora_train.training.fragment_files import read_manifest
from sora_train.training.places import Folder

RECORD = "samples.jsonl"


@dataclass(frozen=True)
class TrainedRun:
    """What is needed to generate from a run, or from a Wan folder, which is one of no steps."""

    config: TrainConfig
    model: VideoDiT | Experts
    codec: VideoCodec
    encode_text: EncodeText
    checkpoint: Folder
    step: int
    encode_image: EncodeImage | None = None

    def check(self, requests: Sequence[Request]) -> None:
        """Raises ConfigError for sizes and images that this model cannot use."""
        check_sizes(requests, self.config.model, self.codec.shape)
        takes_images = self.config.diffusion.first_frame_probability > 0
        check_images(requests, self.config.model, takes_images)

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Frames]:
        """Videos for requests that `check` accepts, behind a progress bar."""
        return generate(
            self.model,
            self.codec,
            requests,
            sampling,
            self.config.diffusion,
            encode_text=self.encode_text,
            encode_image=self.encode_image,
            max_tokens_per_pack=self.config.data.max_tokens_per_pack,
            show_progress=True,
        )

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def open_run(folder: Path, device: torch.device) -> TrainedRun:
    """The averaged weights of a run's newest checkpoint, of the checkpoint given, or those of a Wan pipeline, ready to
    generate on `device`.

    The configuration is the one the checkpoint was trained with, from its manifest.

    Raises:
        ConfigError: no checkpoint there, or parts of a pipeline are missing.
    """
    if (folder / PIPELINE).is_file():
        return open_wan(folder, device)
    checkpoint = latest_checkpoint(folder)
    config = build_config(TrainConfig, read_manifest(checkpoint)["config"])
    trained = VideoDiT(config.model)
    step = load_weights(checkpoint, trained)
    model: VideoDiT | Experts = trained
    if config.init.expert is not None:
        # Half of a sampler: the other half is the open one.
        other = "low" if config.init.expert.value == "high" else "high"
        pair = {config.init.expert.value: trained, other: load_wan(config.init.weights, other)}
        boundary = expert_boundary(config.init.weights)
        assert boundary is not None  # or it would not have two
        model = Experts(pair["high"], pair["low"], boundary, device)
    return _ready(config, model, device, checkpoint, step)


def open_wan(folder: Path, device: torch.device) -> TrainedRun:
    """The pipeline of a Wan folder, as `open_run` opens a run. Sizes, rate and shift are those Wan is sampled with."""
    boundary = expert_boundary(folder)
    experts = [None] if boundary is None else list(EXPERTS)
    weights = [WanWeights(folder, expert) for expert in experts]
    codec = CodecConfig(kind=CodecKind.diffusers, path=str(folder / "vae"))
    is_small = codec_shape(codec).spatial_ratio <= 8  # Wan 2.2 TI2V has larger latents, for larger frames
    has_frames = weights[0].config.condition_channels > 0 or starts_from_frames(folder)
    config = TrainConfig(
        model=weights[0].config,
        codec=codec,
        text_encoder=TextEncoderConfig(path=str(folder), pad_to_max=True),
        image_encoder=ImageEncoderConfig(path=str(folder)),
        diffusion=DiffusionConfig(first_frame_probability=float(has_frames)),
        data=DataConfig(max_tokens_per_pack=65536),  # of 480p or 720p, one video with its unguided copy
        validation=ValidationConfig(height=480, width=832, frames=81)
        if is_small
        else ValidationConfig(height=704, width=1280, frames=121, fps=24.0),
        sampling=SamplingConfig(shift=sampler_shift(folder)),
    )
    dtype = _dtype(config, device)
    models = [load_wan(folder, expert, dtype) for expert in experts]
    model = models[0] if boundary is None else Experts(models[0], models[1], boundary, device)
    return _ready(config, model, device, folder, 0)


def _ready(
    config: TrainConfig, model: VideoDiT | Experts, device: torch.device, place: Folder, step: int
) -> TrainedRun:
    """Everything frozen, in the precision that the device samples in; beside the model what it needs."""
    dtype = _dtype(config, device)
    for each in [model.high, model.low] if isinstance(model, Experts) else [model.to(device)]:
        each.to(dtype=dtype).eval().requires_grad_(False)
        apply_core(each, config.parallel.attention, device, dtype)
    codec = build_codec(config.codec, device)
    encode_text: EncodeText = list
    if config.model.text.kind is TextKind.encoder:
        encode_text = load_text_encoder(config.text_encoder, config.model.text.width, device, dtype).encode
    encode_image: EncodeImage | None = None
    if config.model.image_width:
        encode_image = load_image_encoder(config.image_encoder, config.model.image_width, device, dtype).encode
    return TrainedRun(config, model, codec, encode_text, place, step, encode_image)


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" and config.parallel.precision.is_bf16 else torch.float32


def best_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sample(
    run_dir: Annotated[
        Path, typer.Argument(help="directory of a run, one of its checkpoints, or a Wan pipeline of diffusers")
    ],
    prompt: Annotated[list[str] | None, typer.Argument(help="one or more prompts")] = None,
    prompts: Annotated[Path | None, typer.Option(help="file with a prompt on each line")] = None,
    height: Annotated[int | None, typer.Option(help="pixels; default: the run's validation.height")] = None,
    width: Annotated[int | None, typer.Option(help="pixels; default: the run's validation.width")] = None,
    frames: Annotated[int | None, typer.Option(help="default: the run's validation.frames")] = None,
    fps: Annotated[float | None, typer.Option(help="of the mp4; default: the run's validation.fps")] = None,
    steps: Annotated[int | None, typer.Option(help="of the sampler; default: the run's sampling.steps")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 turns guidance off")] = None,
    solver: Annotated[Solver | None, typer.Option(help="default: the run's sampling.solver")] = None,
    image: Annotated[Path | None, typer.Option(help="first frame, where the model makes videos of images")] = None,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="folder; default: RUN_DIR/samples, or ./samples for a Wan pipeline")
    ] = None,
) -> None:
    """Generates one video for each prompt."""
    try:
        texts = all_prompts(prompt or [], prompts)
        run = open_run(run_dir, best_device())
        given_size = {"height": height, "width": width, "frames": frames, "fps": fps}
        shown = replace(run.config.validation, **given(given_size))
        if shown.fps <= 0:
            raise ConfigError(f"fps={shown.fps:g}: give a rate above 0")
        requests = [
            Request(text, shown.height, shown.width, shown.frames, prompt_seed, str(image or ""))
            for text, prompt_seed in zip(texts, seeds(texts, seed), strict=True)
        ]
        run.check(requests)
        given_sampling = {"steps": steps, "guidance_scale": guidance_scale, "solver": solver}
        sampling = replace(run.config.sampling, **given(given_sampling))
        if sampling.steps < 1:
            raise ConfigError(f"steps={sampling.steps}: give 1 or more")
        is_pipeline = (run_dir / PIPELINE).is_file()
        folder = open_output(output or (Path("samples") if is_pipeline else run_dir / "samples"))
    except ConfigError as error:
        fail(error)
    videos = run.generate(requests, sampling)
    how = {**asdict(sampling), "solver": sampling.solver.value}
    facts = {"checkpoint": str(run.checkpoint), "step": run.step, **how}
    for path in save_samples(folder, requests, videos, shown.fps, facts):
        print(path)


def open_output(folder: Path) -> Path:
    """Makes the folder that samples go to, before time is spent on them.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error.strerror}: give another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {folder} is not writable: give another folder")
    return folder


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, whatever their value."""
    return {name: value for name, value in options.items() if value is not None}


def all_prompts(words: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then those of the file, one a line, empty lines left out."""
    texts = list(words)
    if file is not None:
        if not file.is_file():
            raise ConfigError(f"--prompts {file}: no such file")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompts {file} is not UTF-8 text: save it as such") from error
        texts += [line.strip() for line in text.splitlines() if line.strip()]
    if not texts:
        raise ConfigError("no prompt: give one or more after RUN_DIR, or --prompts FILE")
    return texts


def seeds(texts: Sequence[str], seed: int) -> list[int]:
    """A prompt's seed does not depend on the other prompts; given again, it gets the next one, for another video."""
    return [seed + texts[:index].count(text) for index, text in enumerate(texts)]


def save_samples(
    folder: Path, requests: Sequence[Request], videos: Sequence[Frames], fps: float, facts: dict[str, object]
) -> list[Path]:
    """Writes NNNN-words.mp4 each, their contact sheet, and a line each in samples.jsonl. Numbers go on from what is
    there. Returns the paths, the sheet's last."""
    folder.mkdir(parents=True, exist_ok=True)
    numbered = (re.match(r"(\d{4,})-", path.name) for path in folder.iterdir())
    first = 1 + max((int(found[1]) for found in numbered if found), default=0)
    paths = []
    for number, (request, frames_THWC) in enumerate(zip(requests, videos, strict=True), start=first):
        path = folder / f"{number:04d}-{file_words(request.prompt)}.mp4"
        save_video(frames_THWC, path, fps)
        with (folder / RECORD).open("a") as record:
            record.write(json.dumps({"file": path.name, **asdict(request), "fps": fps, **facts}) + "\n")
        paths.append(path)
    sheet = folder / f"{first:04d}-contact-sheet.png"
    contact_sheet([(request.prompt, [frames]) for request, frames in zip(requests, videos, strict=True)]).save(sheet)
    return [*paths, sheet]


def file_words(prompt: str) -> str:
    """The prompt's beginning as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "sample"


def contact_sheet(rows: Sequence[tuple[str, Sequence[Frames]]], frames_shown: int = 5) -> Image.Image:
    """A row for each label: `frames_shown` frames of each of its videos, evenly over time, left to right."""
    gap, text_height = 6, 16
    strips = [[strip(frames, frames_shown) for frames in videos] for _, videos in rows]
    width = max(sum(image.shape[1] + 2 * gap for image in images) for images in strips) + gap
    height = sum(max(image.shape[0] for image in images) + text_height + 2 * gap for images in strips)
    sheet = Image.new("RGB", (max(width, 240), height + gap), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    top = gap
    for (label, _), images in zip(rows, strips, strict=True):
        draw.text((gap, top), label.encode("latin-1", "replace").decode("latin-1"), fill=(30, 30, 30))
        left = gap
        for image in images:
            sheet.paste(Image.fromarray(image), (left, top + text_height))
            left += image.shape[1] + 2 * gap
        top += max(image.shape[0] for image in images) + text_height + 2 * gap
    return sheet


def strip(frames_THWC: Frames, count: int, gap: int = 2) -> Frames:
    """`count` frames side by side, [H, W', 3]; all of them when there are fewer."""
    num_frames, height = frames_THWC.shape[:2]
    chosen = np.unique(np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int))
    white = np.full((height, gap, 3), 250, np.uint8)
    parts = [part for index in chosen for part in (frames_THWC[index], white)]
    return np.concatenate(parts[:-1], axis=1)


if __name__ == "__main__":
    typer.run(sample)
