"""What a sample in a shard is, and what the index knows of it: the contract between data_pipelines/ and training.

A shard is a WebDataset tar. Sample KEY (`[A-Za-z0-9_/-]+`; webdataset cuts keys at the first dot) has one medium
(KEY.mp4, .webm, .mkv, .mov, .jpg, .jpeg, .png, .webp, or KEY.latents.safetensors) and KEY.json, the ClipRecord; shards
made elsewhere may have KEY.txt, a KEY.json of their own, or nothing but the medium.

Pre-encoded members are safetensors with the identity of their encoder in the metadata (data.precomputed writes and
reads them):

    KEY.latents.safetensors   `latents` [C, T, H, W], float32, bfloat16 or float16, as the model takes them; metadata
                              `encoder`, and `num_frames`, `height`, `width`, `fps` of the pixels they stand for
    KEY.text.safetensors      `caption_0`, `caption_1`, ... [M, D], the rows of a text encoder for each caption, in the
                              order of the captions; `empty` [M, D] for a dropped caption, if the encoder gives rows to
                              an empty text; metadata `encoder`

Beside the tars lie `dataset.json` (DatasetManifest), per shard NAME.index.safetensors (the IndexRows as columns, see
ShardTable, in the order of the tar), and `index_rejects.jsonl`, which names what was left out and why.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

FORMAT_VERSION = 2
SHA256_OR_NONE = re.compile(r"([0-9a-f]{64})?")
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
LATENT_SUFFIX = "latents.safetensors"  # pre-encoded, of a video or an image
TEXT_SUFFIX = "text.safetensors"  # rows of a text encoder, for each caption
# An index holds the place of a medium's suffix in here: new ones go to the end.
MEDIA = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, LATENT_SUFFIX)
MANIFEST_NAME = "dataset.json"
REJECTS_NAME = "index_rejects.jsonl"


class Origin(Enum):
    """Who wrote a caption: whoever published the clip, or a captioner."""

    original = "original"
    recaption = "recaption"


class Style(Enum):
    """How a caption tells it."""

    short = "short"
    dense = "dense"
    structured = "structured"


@dataclass(frozen=True)
class Caption:
    """One text about a clip, and where it comes from."""

    text: str
    origin: Origin
    style: Style
    # Name of the captioner and hash of its prompt template; empty for originals.
    model: str = ""
    prompt_sha256: str = ""

    @property
    def kind(self) -> str:
        """`origin/style`: the key of config.data.captions.weights."""
        return f"{self.origin.value}/{self.style.value}"


@dataclass(frozen=True)
class Source:
    """The file a clip was cut from, and where."""

    sha256: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class ClipRecord:
    """KEY.json."""

    captions: tuple[Caption, ...]
    num_frames: int
    fps: float
    height: int  # as displayed, after rotation
    width: int
    duration_seconds: float
    source: Source
    scores: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line; equal records give equal text."""
        values = asdict(self)
        for caption in values["captions"]:
            caption["origin"], caption["style"] = caption["origin"].value, caption["style"].value
        return json.dumps(values, ensure_ascii=False, sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes) -> "ClipRecord":
        """Raises ValueError when the text is no clip record, or one that no clip can have."""
        try:
            values: dict[str, Any] = json.loads(text)
            captions = tuple(
                Caption(**{**item, "origin": Origin(item["origin"]), "style": Style(item["style"])})
                for item in values.pop("captions")
            )
            record = ClipRecord(captions=captions, source=Source(**values.pop("source")), **values)
            is_possible = min(record.num_frames, record.height, record.width) >= 1 and record.fps >= 0
            if len(bytes.fromhex(record.source.sha256)) != 32:  # decides what is held out
                raise ValueError(f"not a clip record: source sha256={record.source.sha256!r} is no SHA-256")
            if not is_possible or not all(isinstance(caption.text, str) for caption in captions):
                raise ValueError(
                    f"not a clip record: {record.num_frames} frames of {record.height}x{record.width} at "
                    f"{record.fps} fps, captions {captions}"
                )
            return record
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a clip record: {error!r}") from error


@dataclass(frozen=True)
class CaptionEntry:
    """What planning needs of a caption; its text stays in the shard."""

    kind: str  # origin/style
    num_bytes: int  # as read (data.caption_text); 0: nothing to train on, an empty text or one that is too long


class CaptionsIn(Enum):
    """Where a sample's captions stand."""

    nowhere = "nowhere"
    record = "record"  # KEY.json, a ClipRecord
    field = "field"  # a text field of a foreign KEY.json
    text = "text"  # KEY.txt


@dataclass(frozen=True)
class IndexRow:
    """All that planning and reading need of one sample, without opening its shard."""

    key: str
    medium: str  # one of MEDIA
    medium_offset: int  # of the member's bytes in the tar
    medium_size: int
    num_frames: int
    fps: float  # 0 for an image; the mean where the rate varies
    height: int  # as displayed, after rotation
    width: int
    duration_seconds: float
    source_sha256: str
    captions: tuple[CaptionEntry, ...] = ()
    medium_xxh3: int = 0  # of the member's bytes; 0: not known
    captions_in: CaptionsIn = CaptionsIn.record
    record_offset: int = 0  # of the member that holds the captions
    record_size: int = 0
    text_offset: int = 0  # of KEY.text.safetensors; size 0: there is none
    text_size: int = 0
    rotation: int = 0  # clockwise degrees that turn coded frames into displayed ones: 0, 90, 180 or 270
    is_variable_rate: bool = False
    latent_shape: tuple[int, int, int, int] | None = None  # C T H W of pre-encoded latents


@dataclass(frozen=True)
class ShardEntry:
    """What dataset.json says of one tar."""

    name: str  # "shard-000000.tar", relative to the data set's folder
    num_bytes: int
    sha256: str
    num_samples: int  # indexed
    num_rejected: int = 0  # samples left out; indexed and rejected are all that the tar holds
    index_sha256: str = ""  # of the index file: one of another version of the shard is noticed; empty: not checked

    def __post_init__(self) -> None:
        # A manifest may come from anywhere, and names become paths.
        counts = (self.num_bytes, self.num_samples, self.num_rejected)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"shard {self.name!r} has sizes {counts}, which are none")
        for digest in (self.sha256, self.index_sha256):
            if not isinstance(digest, str) or not SHA256_OR_NONE.fullmatch(digest):
                raise ValueError(f"shard {self.name!r} has hash {digest!r}, which is no SHA-256")
        parts = self.name.split("/") if isinstance(self.name, str) else [""]
        if "\\" in parts[-1] or not parts[-1].endswith(".tar") or {"", ".", ".."} & set(parts):
            raise ValueError(f"shard {self.name!r} is no name of a tar inside the data set")


@dataclass(frozen=True)
class DatasetManifest:
    """dataset.json."""

    shards: tuple[ShardEntry, ...]
    # Identities of what made the pre-encoded latents and text rows; none where there are none.
    encoders: tuple[str, ...] = ()
    text_encoders: tuple[str, ...] = ()
    # Fields of a foreign KEY.json that hold its caption; the first that is there counts.
    caption_fields: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def num_samples(self) -> int:
        """In all shards together."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_rejected(self) -> int:
        """Samples of the tars that no index holds."""
        return sum(shard.num_rejected for shard in self.shards)

    def to_json(self) -> str:
        """The file, with totals for people to read."""
        totals = {"shards": len(self.shards), "samples": self.num_samples, "rejected": self.num_rejected}
        return json.dumps({**asdict(self), "totals": totals}, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes) -> "DatasetManifest":
        """Raises ValueError for what is no manifest, or one of another format version."""
        rebuild = "rebuild it with `python -m data_pipelines.index shards=DIR`"
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version == FORMAT_VERSION:
                manifest = DatasetManifest(
                    shards=tuple(ShardEntry(**item) for item in values["shards"]),
                    encoders=tuple(values["encoders"]),
                    text_encoders=tuple(values["text_encoders"]),
                    caption_fields=tuple(values["caption_fields"]),
                )
                if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
                    raise ValueError("it names a shard twice")
                if json.loads(manifest.to_json()) != values:
                    raise ValueError("its totals are not the sums of its shards")
                return manifest
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"dataset.json is damaged ({error!r}): {rebuild}") from error
        raise ValueError(f"dataset.json has format_version {version}, this code reads {FORMAT_VERSION}: {rebuild}")


def index_name(shard_name: str) -> str:
    """shard-000000.tar -> shard-000000.index.safetensors."""
    return shard_name.removesuffix(".tar") + ".index.safetensors"
