"""The clips that the report shows: one of each part of the data set, as training will see it, and captions by kind."""

import base64
import io
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import xxhash
from PIL import Image

from data_pipelines.reporting.survey import Survey
from sora_train.config.data import SizeConfig
from sora_train.data.caption_text import read_captions
from sora_train.data.clip import DecodeError, Frames, decode_clip
from sora_train.data.index import Dataset
from sora_train.data.precomputed import read_latents
from sora_train.data.schema import IndexRow
from sora_train.data.shard_table import KINDS
from sora_train.data.size import ClipSize, Stride, clip_size

STRIP = 3  # frames shown of a video: first, middle and last of those that are trained on
_THUMBNAIL = (320, 160)  # most columns and rows
_MOST_CHARACTERS = 600  # of a caption


@dataclass(frozen=True)
class ShownClip:
    """A card of the report."""

    shard: str
    row: IndexRow
    size: ClipSize | None  # in training; None: it cannot be trained on
    num_tokens: int
    is_held_out: bool
    pictures: tuple[str, ...]  # data URIs
    problem: str  # why there are none
    captions: tuple[tuple[str, str], ...]  # kind and text
    caption_problem: str


def pick(survey: Survey, count: int, seed: int) -> list[int]:
    """One clip of each of `count` equal parts of the data set, the same ones every time."""
    edges = np.linspace(0, len(survey), min(count, len(survey)) + 1).astype(int)
    rng = np.random.default_rng(seed)
    return [int(rng.integers(first, last)) for first, last in pairwise(edges)]


def show(dataset: Dataset, survey: Survey, config: SizeConfig, stride: Stride, clip: int) -> ShownClip:
    """Reads and decodes one clip; what fails is part of the answer."""
    shard, place = survey.place(clip)
    row = dataset.table(shard).row(place)
    size: ClipSize | None = None
    pictures: tuple[str, ...] = ()
    captions: tuple[tuple[str, str], ...] = ()
    problem = caption_problem = ""
    try:
        size = clip_size(row, config, stride)
        data = dataset.read(shard, row.medium_offset, row.medium_size)
        if row.medium_xxh3 and xxhash.xxh3_64_intdigest(data) != row.medium_xxh3:
            raise DecodeError("hash", "not the bytes that were indexed")
        frames = decode_clip(data, row, strip(size)) if row.latent_shape is None else latent_pictures(data)
        pictures = tuple(data_uri(frame) for frame in frames)
    except (DecodeError, OSError, ValueError) as error:
        problem = str(error)
    try:
        captions = texts(dataset, shard, row)
    except (OSError, ValueError) as error:
        caption_problem = str(error)
    return ShownClip(
        shard=dataset.manifest.shards[shard].name,
        row=row,
        size=size,
        num_tokens=int(survey.num_tokens[clip]),
        is_held_out=bool(survey.is_held_out[clip]),
        pictures=pictures,
        problem=problem,
        captions=captions,
        caption_problem=caption_problem,
    )


def caption_samples(dataset: Dataset, survey: Survey, count: int, seed: int) -> dict[str, list[str]]:
    """Of each kind of caption, up to `count` texts from anywhere in the data set; unreadable ones are left out."""
    samples: dict[str, list[str]] = {}
    for kind in KINDS:
        clips = np.unique(survey.clips_with(kind))
        chosen = np.random.default_rng(seed).permutation(len(clips))[: 2 * count]
        found: list[str] = []
        for clip in clips[chosen]:
            shard, place = survey.place(int(clip))
            try:
                found += [text for name, text in texts(dataset, shard, dataset.table(shard).row(place)) if name == kind]
            except (OSError, ValueError):
                continue
        if len(clips):
            samples[kind] = list(dict.fromkeys(text for text in found if text))[:count]
    return samples


def texts(dataset: Dataset, shard: int, row: IndexRow) -> tuple[tuple[str, str], ...]:
    """Kind and text of each caption, long ones cut.

    Raises:
        OSError, ValueError: the member that holds them cannot be read.
    """
    data = dataset.read(shard, row.record_offset, row.record_size)
    captions = read_captions(data, row.captions_in, dataset.manifest.caption_fields)
    return tuple((caption.kind, shortened(caption.text)) for caption in captions)


def strip(size: ClipSize) -> ClipSize:
    """First, middle and last frame of a clip, at its size in training."""
    count = min(STRIP, size.num_frames)
    stride = (size.num_frames - 1) / max(1, count - 1)
    return replace(size, num_frames=count, frame_step=size.frame_step * stride)


def latent_pictures(data: bytes) -> Frames:
    """First, middle and last frame of latents: three channels as if they were colors, uint8 [T, H, W, 3].

    Raises:
        ValueError: the member is damaged.
    """
    latents = read_latents(data)[:3].float()
    frames = latents[:, sorted({0, (latents.shape[1] - 1) // 2, latents.shape[1] - 1})]
    low, high = torch.quantile(frames, torch.tensor([0.01, 0.99])).tolist()
    levels = ((frames - low) / max(high - low, 1e-6)).clamp(0, 1) * 255
    larger = max(1, _THUMBNAIL[1] // levels.shape[2])
    pixels = levels.byte().repeat_interleave(larger, 2).repeat_interleave(larger, 3).permute(1, 2, 3, 0)
    # Of a codec of one or two channels, the first alone as gray.
    return (pixels if pixels.shape[-1] == 3 else pixels[..., :1].repeat(1, 1, 1, 3)).contiguous().numpy()


def data_uri(pixels: Frames) -> str:
    """A small WebP of an image [H, W, 3]."""
    image = Image.fromarray(pixels)
    image.thumbnail(_THUMBNAIL)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def shortened(text: str) -> str:
    """At most about a paragraph of it."""
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS].rstrip() + " […]"
