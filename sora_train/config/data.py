"""Settings of the data: which shards, which sizes, which captions, how much a step and a pack hold."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SizeConfig:
    """The native size rule: aspect kept, never enlarged, cropped to the stride of codec and patch."""

    # Pixels of one frame after scaling down. With max_frames it bounds the tokens of a clip: these defaults give at
    # most 7,616 with the wavelet codec, which one pack holds; 480 * 854 and 81 frames give 260,000, with a VAE 33,000.
    max_pixels: int = 128 * 224
    # Longest clip in sampled frames; longer ones give their middle part.
    max_frames: int = 33
    # Frames a second after resampling; clips slower than this keep their own rate.
    sampling_fps: float = 16.0


@dataclass(frozen=True)
class CaptionConfig:
    # Weight of each "origin/style"; what a clip does not have is left out and the rest renormalised.
    weights: dict[str, float] = field(
        default_factory=lambda: {"original/short": 0.1, "recaption/short": 0.45, "recaption/dense": 0.45}
    )
    # Share of samples trained without caption (classifier-free guidance, Ho & Salimans 2022).
    dropout: float = 0.1


@dataclass(frozen=True)
class DataConfig:
    # Folder or fsspec URL that holds dataset.json and the shards.
    shards: str = "???"
    # Video tokens of the global batch, constant to within one clip, whatever the number of ranks.
    tokens_per_step: int = 16384
    # Most video tokens in one pack: bounds a rank's memory.
    max_tokens_per_pack: int = 8192
    size: SizeConfig = field(default_factory=SizeConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    # Share of sources (by hash of the source) kept out of training for validation.
    held_out_fraction: float = 0.02
    # Decoding processes on each rank; 0 decodes in the training process.
    workers: int = 1
    # Packs that each worker keeps ready.
    read_ahead: int = 4
    # A run stops when more than this share of its clips could not be read (quarantine.jsonl says which and why).
    max_bad_share: float = 0.05
