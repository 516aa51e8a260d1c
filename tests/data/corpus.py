"""Small data sets for the tests of this folder: real H.264 clips in real tars."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from sora_train.config.data import CaptionConfig, DataConfig, SizeConfig
from sora_train.config.model import ModelConfig
from sora_train.data.index_writer import write_index
from sora_train.data.schema import Caption, ClipRecord, Origin, Source, Style
from sora_train.data.video_file import save_video
from sora_train.encoders.codec_shape import CodecShape

CODEC = CodecShape(channels=96, temporal_ratio=2, spatial_ratio=4)
MODEL = ModelConfig(in_channels=96, out_channels=96, width=128, heads=4, depth=2, mlp_width=512)
# (frames, height, width)
SIZES = ((9, 64, 64), (9, 64, 80), (5, 80, 64), (1, 64, 112), (17, 112, 64), (9, 80, 80))


def moving_square(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    frames = np.full((num_frames, height, width, 3), 40 + seed % 100, dtype=np.uint8)
    for i, frame in enumerate(frames):
        left = (4 * seed + 2 * i) % (width - 6)
        frame[height // 4 : height // 2, left : left + 6] = (250, 20, 60)
    return frames


def encode(frames: np.ndarray, folder: Path, fps: float = 8.0) -> bytes:
    path = folder / "clip.mp4"
    save_video(frames, path, fps)
    return path.read_bytes()


def record(frames: np.ndarray, source: str, fps: float = 8.0) -> ClipRecord:
    num_frames, height, width, _ = frames.shape
    texts = (("weak tag", Origin.original, Style.short), ("a square", Origin.recaption, Style.short))
    captions = tuple(Caption(f"{text} {source}", origin, style) for text, origin, style in texts)
    seconds = num_frames / fps
    place = Source(sha256(source.encode()).hexdigest(), 0.0, seconds)
    return ClipRecord(captions, num_frames, fps, height, width, seconds, place)


def tar_bytes(members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> None:
    path.write_bytes(tar_bytes(members))


def write_corpus(folder: Path, num_clips: int = 24, clips_per_shard: int = 4) -> Path:
    """Clips of SIZES in turn, indexed."""
    shards = folder / "shards"
    shards.mkdir()
    for start in range(0, num_clips, clips_per_shard):
        members = {}
        for i in range(start, min(start + clips_per_shard, num_clips)):
            frames = moving_square(*SIZES[i % len(SIZES)], seed=i)
            members[f"clip{i:03d}.mp4"] = encode(frames, folder)
            members[f"clip{i:03d}.json"] = record(frames, f"source{i}").to_json().encode()
        write_tar(shards / f"shard-{start // clips_per_shard:06d}.tar", members)
    write_index(shards)
    return shards


def data_config(shards: Path, **changes: object) -> DataConfig:
    config = DataConfig(
        shards=str(shards),
        tokens_per_step=2400,
        max_tokens_per_pack=1400,
        size=SizeConfig(max_pixels=8960, max_frames=17, sampling_fps=8.0),
        captions=CaptionConfig(weights={"original/short": 0.3, "recaption/short": 0.7}, dropout=0.2),
        held_out_fraction=0.1,
        workers=0,
    )
    return replace(config, **changes)  # type: ignore[arg-type]
