"""Settings of the data: which shards in which shares, which sizes, which captions, how much a step and a pack hold.

A curriculum is `stages`: each says from which step on something is otherwise, and what. For example images of 256 x 256
pixels, then videos of that size, then videos of 720p (configs/experiment/curriculum.yaml, on two data sets):

    data:
      datasets:
        pictures: {shards: s3://bucket/pictures}
        films: {shards: s3://bucket/films, media: video, weight: 0}
      size: {max_pixels: 65536, max_frames: 1}
      stages:
        - {start_step: 20000, weights: {pictures: 0.2, films: 0.8}, size: {max_frames: 81}}
        - {start_step: 60000, size: {max_pixels: 921600}, tokens_per_step: 2000000}
"""

from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True)
class SizeConfig:
    """The native size rule: aspect kept, never enlarged, cropped to the stride of codec and patch."""

    # Pixels of one frame after scaling down. With max_frames it bounds the tokens of a clip: these defaults give at
    # most 7,616 with the wavelet codec, which one pack holds; 480 * 854 and 81 frames give 260,000, with a VAE 33,000.
    max_pixels: int = 128 * 224
    # Longest clip in sampled frames; longer ones give a part of that length, drawn anew each epoch.
    max_frames: int = 33
    # Frames a second after resampling; clips slower than this keep their own rate.
    sampling_fps: float = 16.0


# Elements of lists and dicts cannot be frozen: omegaconf would lock them before their values are in.
@dataclass
class CaptionPoint:
    """The weights of captions at one step of a schedule."""

    step: int = "???"  # type: ignore[assignment]
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptionConfig:
    # Weight of each "origin/style"; what a clip does not have is left out and the rest renormalised.
    weights: dict[str, float] = field(
        default_factory=lambda: {"original/short": 0.1, "recaption/short": 0.45, "recaption/dense": 0.45}
    )
    # Weights that change while training, in place of `weights`: straight lines from point to point, constant before the
    # first and after the last. A kind that a point does not name has weight 0 there.
    schedule: list[CaptionPoint] = field(default_factory=list)
    # Share of samples trained without caption (classifier-free guidance, Ho & Salimans 2022).
    dropout: float = 0.1
    # Of a structured caption (a JSON object), each field is left out with this probability; one at least stays.
    field_dropout: float = 0.0


class Decoder(Enum):
    """What decodes videos."""

    libav = "libav"  # through PyAV: the faster of the two as measured, every rate, rotation, depth and width
    decord = "decord"  # upright videos of constant rate; libav takes the others


class Media(Enum):
    """What is taken of a data set."""

    any = "any"
    image = "image"
    video = "video"


@dataclass
class DatasetConfig:
    """One of several data sets."""

    # Folder or fsspec URL that holds dataset.json and the shards.
    shards: str = "???"
    # Its share of the tokens is weight / sum of weights; 0: none, until a stage says otherwise.
    weight: float = 1.0
    media: Media = Media.any


@dataclass
class SizeChange:
    """What a stage changes of `size`; the rest stays as it was."""

    max_pixels: int | None = None
    max_frames: int | None = None
    sampling_fps: float | None = None


@dataclass
class StageConfig:
    """From `start_step` on, what is set here replaces what held before; the rest stays as it was."""

    start_step: int = "???"  # type: ignore[assignment]
    size: SizeChange = field(default_factory=SizeChange)
    # By name of the data set. One that had no weight before begins at its own beginning and moves no other.
    weights: dict[str, float] = field(default_factory=dict)
    tokens_per_step: int | None = None


@dataclass(frozen=True)
class DataConfig:
    # Folder or fsspec URL that holds dataset.json and the shards: one data set, the same as datasets={main: {…}}.
    shards: str = ""
    # Several, by name, in place of `shards`. The name is part of what shuffles a data set: keep it when a run goes on.
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    # A curriculum, by start_step; what stands outside holds from step 0.
    stages: list[StageConfig] = field(default_factory=list)
    # Video tokens of the global batch, constant to within one clip of each data set, whatever the number of ranks.
    tokens_per_step: int = 16384
    # Most video tokens in one pack: bounds a rank's memory.
    max_tokens_per_pack: int = 8192
    size: SizeConfig = field(default_factory=SizeConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    # Share of sources (by hash of the source) kept out of training for validation.
    held_out_fraction: float = 0.02
    # Folder that keeps the totals of each data set from one start to the next; empty: that of the user's caches.
    cache_dir: str = ""
    # Child processes on each rank that read and decode, and may die or hang without hurting training. 0 does it in the
    # training process, unprotected: a file that crashes the decoder ends the run. For debugging.
    workers: int = 1
    # Packs that each rank keeps ready, or is reading, ahead of the one in training. Memory holds one more than this.
    read_ahead: int = 4
    decoder: Decoder = Decoder.libav
    # A worker that decodes no further frame for so long is killed, and its clip left out.
    stall_seconds: float = 4.0
    # Most memory of one worker, beside the frames it hands over: a file that needs more is left out. (Linux)
    worker_memory_gib: float = 4.0
    # Remote shards are downloaded whole to `cache_dir`, once a machine, up to so much in all; 0: read by range.
    cache_gib: float = 0.0
    # A run stops when more than this share of its clips could not be read (quarantine.jsonl says which and why).
    max_bad_share: float = 0.05


def dataset_configs(config: DataConfig) -> dict[str, DatasetConfig]:
    """Both ways of naming the data as one: by name, in the order of the names, whatever order they were given in."""
    if config.shards:
        return {"main": DatasetConfig(config.shards)}
    return dict(sorted(config.datasets.items()))
