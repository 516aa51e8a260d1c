"""Settings of curation: from a folder of videos to recaptioned shards, and of index and report of existing shards."""

from dataclasses import dataclass, field
from enum import Enum

from sora_train.config.data import DataConfig
from sora_train.config.encoders import CodecConfig
from sora_train.config.model import ModelConfig


class SceneDetectorKind(Enum):
    content = "content"  # PySceneDetect's ContentDetector: change of hue, saturation and luma against a threshold
    adaptive = "adaptive"  # its AdaptiveDetector: the same change against its neighbourhood; calmer under fast motion


@dataclass(frozen=True)
class SceneConfig:
    """Where a source is cut into clips, and how the clips are encoded."""

    detector: SceneDetectorKind = SceneDetectorKind.content
    # Change between two frames (0 to 255) that counts as a cut; for adaptive the least change considered.
    threshold: float = 27.0
    # No two cuts closer than this.
    min_scene_frames: int = 4
    # Longer scenes are cut into equal parts.
    max_clip_seconds: float = 20.0
    # Of x264, for clips that are encoded anew. A source of a single scene keeps its bytes.
    crf: int = 16
    preset: str = "medium"


@dataclass(frozen=True)
class FilterConfig:
    """A clip outside these bounds is rejected; its scores stay in the record either way."""

    min_side: int = 32
    min_frames: int = 1
    # Longer side over shorter side.
    max_aspect: float = 4.0
    # Standard deviation within a frame (0 to 255) of the color channel that varies most: a blank picture has none.
    min_contrast: float = 1.0
    # Mean absolute change of luma between frames a second apart or less (0 to 255); 0 keeps what stands still.
    min_motion: float = 0.0


@dataclass(frozen=True)
class CurationConfig:
    # Folder of videos and images, searched with its subfolders. NAME.txt beside NAME.mp4 is its original caption.
    input: str = "???"
    # Folder that receives shards, dataset.json, rejects.jsonl and curation.json; must be new, or of the same run.
    output: str = "???"
    # Sources taken, in the order of their paths; 0 takes all.
    limit: int = 0
    # Processes. The shards do not depend on their number.
    workers: int = 1
    # Largest decoded picture accepted, against files that claim sizes no memory holds.
    max_source_pixels: int = 8192 * 8192
    # Shards are of equal size in bytes, at most about this.
    shard_mib: int = 256
    scenes: SceneConfig = field(default_factory=SceneConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)


@dataclass(frozen=True)
class IndexConfig:
    # Folder or fsspec URL of WebDataset tars; sub-folders are searched. The index is written beside the tars.
    shards: str = "???"
    # Writes nothing: reads every tar again and compares it, sample by sample, with the index that is there.
    verify: bool = False
    # Processes; 0: one a core.
    workers: int = 0
    # Fields of a KEY.json made elsewhere that hold the caption; the first that is there counts.
    caption_fields: list[str] = field(default_factory=lambda: ["caption", "text"])


@dataclass(frozen=True)
class ReportConfig:
    # Folder or URL of an indexed data set.
    shards: str = "???"
    # The page; empty: report.html in the folder of the shards, or here where they are behind a URL.
    output: str = ""
    # Ranks of the simulated training; half as many and twice as many stand beside them.
    ranks: int = 8
    # Steps that are simulated.
    steps: int = 50
    # Clips that are shown; no other is decoded.
    clips: int = 24
    # Of the simulated training; also picks the clips that are shown.
    seed: int = 0
    # As in training, where they decide what a clip becomes and what a step costs.
    model: ModelConfig = field(default_factory=ModelConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    data: DataConfig = field(default_factory=DataConfig)
