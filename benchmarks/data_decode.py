"""What decoding costs: 720p clips in the decoding child, beside libavcodec alone and beside webdataset + decord.

    python -m benchmarks.data_decode --json FILE

CPU-seconds of one process and one thread, methods in turn; the best of the repeats counts, their range is printed.
"""

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import av
import decord
import numpy as np
import torch
import webdataset as wds
from torch.nn import functional as F

from benchmarks.figure import Figure, print_table, write_json
from sora_train.data.clip import decode_clip
from sora_train.data.schema import IndexRow
from sora_train.data.size import ClipSize
from tests.data.media import real_video, row_of, whole

HEIGHT, WIDTH = 720, 1280
SMALL = (256, 455)  # scaled; then cropped to tokens of 8x8
REPEATS = 9


@dataclass(frozen=True)
class Subject:
    """A clip in a shard, and where its frames go."""

    name: str
    tar: Path
    row: IndexRow
    native: ClipSize
    small: ClipSize
    memory: np.ndarray  # as large as the clip, written again and again, as a child's shared memory is

    def read(self) -> bytes:
        """As a range of the shard."""
        with self.tar.open("rb") as file:
            file.seek(self.row.medium_offset)
            return file.read(self.row.medium_size)


def textured(num_frames: int = 150) -> bytes:
    """Five seconds of panning texture, a moving square and sensor noise: x264, medium, crf 20, about 10 Mbit/s."""
    rng = np.random.default_rng(0)
    height, width = HEIGHT + 128, WIDTH + 3 * num_frames + 64
    world = np.full((height, width, 3), 120.0)
    for grain, contrast in ((2, 12), (4, 24), (16, 30), (64, 30)):
        coarse = rng.normal(0, contrast, (-(-height // grain), -(-width // grain), 3))
        world += coarse.repeat(grain, axis=0).repeat(grain, axis=1)[:height, :width]
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "20", "preset": "medium"}
        for i in range(num_frames):
            top = round(50 + 40 * np.sin(i / 20))
            picture = world[top : top + HEIGHT, 3 * i : 3 * i + WIDTH].copy()
            picture[200:400, 100 + 5 * i : 300 + 5 * i] = (240, 30, 40)
            picture += rng.normal(0, 4, (HEIGHT, WIDTH, 1))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return sink.getvalue()


def subject(name: str, data: bytes, folder: Path) -> Subject:
    """Puts a clip into a shard."""
    tar = folder / f"{name}.tar"
    with tarfile.open(tar, "w") as shard:
        info = tarfile.TarInfo("clip.mp4")
        info.size = len(data)
        shard.addfile(info, io.BytesIO(data))
    row = row_of(data)
    row = replace(row, medium_offset=tarfile.BLOCKSIZE)
    small = ClipSize(row.num_frames, SMALL[0], SMALL[1] // 8 * 8, *SMALL, 0, 1.0)
    memory = np.zeros((row.num_frames, row.height, row.width, 3), np.uint8)
    return Subject(name, tar, row, whole(row), small, memory)


def decode_only(clip: Subject) -> int:
    """libavcodec through PyAV: frames are made and dropped."""
    with av.open(io.BytesIO(clip.read()), format="mp4") as container:
        container.streams.video[0].codec_context.thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def ours_native(clip: Subject) -> int:
    """What the decoding child does for a clip at its own size."""
    return len(decode_clip(clip.read(), clip.row, clip.native, out=clip.memory))


def ours_small(clip: Subject) -> int:
    """What the decoding child does for a clip at 256p."""
    return len(decode_clip(clip.read(), clip.row, clip.small))


def webdataset_decord(clip: Subject) -> int:
    """The usual loader: bytes from webdataset, get_batch, and the same scaling of the whole batch."""
    for sample in wds.WebDataset(str(clip.tar), shardshuffle=False):
        reader = decord.VideoReader(io.BytesIO(sample["mp4"]), num_threads=1)
        frames = torch.from_numpy(reader.get_batch(range(len(reader))).asnumpy()).permute(0, 3, 1, 2)
        scaled = F.interpolate(frames, SMALL, mode="bicubic", antialias=True, align_corners=False)
        return len(scaled[:, :, : clip.small.height, : clip.small.width].permute(0, 2, 3, 1).contiguous())
    raise RuntimeError("webdataset found no sample")


def decord_forward(clip: Subject) -> int:
    """decord, frame by frame, at native size."""
    reader = decord.VideoReader(io.BytesIO(clip.read()), num_threads=1)
    for index in range(len(reader)):
        clip.memory[index] = reader.next().asnumpy()
    return len(reader)


METHODS: dict[str, Callable[[Subject], int]] = {
    "decode only": decode_only,
    "ours, native": ours_native,
    "ours, 256p": ours_small,
    "webdataset + decord, 256p": webdataset_decord,
    "decord next(), native": decord_forward,
}


def figures(repeats: int = REPEATS) -> list[Figure]:
    """Frames per CPU-second of every method, and the shares that have bars."""
    torch.set_num_threads(1)
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        rendered, real = textured(), real_video("bigbuckbunny.mp4").read_bytes()
        for name, data in (("textured", rendered), ("big buck bunny", real)):
            clip = subject(name, data, Path(folder))
            speeds: dict[str, list[float]] = {method: [] for method in METHODS}
            for repeat in range(repeats + 1):
                for method, run in METHODS.items():
                    start = time.process_time()
                    frames = run(clip)
                    seconds = time.process_time() - start
                    if frames != clip.row.num_frames:
                        raise RuntimeError(f"{method}: {frames} of {clip.row.num_frames} frames")
                    if repeat:  # the first warms up
                        speeds[method].append(frames / seconds)
            found += _figures(clip, speeds)
    return found


def _figures(clip: Subject, speeds: dict[str, list[float]]) -> list[Figure]:
    row = clip.row
    what = f"{clip.name}: H.264 {row.width}x{row.height}, {row.num_frames} frames"
    found = []
    for method, values in speeds.items():
        spread = f"best of {len(values)}, {min(values):.0f} to {max(values):.0f}"
        found.append(Figure(f"{clip.name}, {method}", max(values), "frames/CPU-s", "", None, f"{what}; {spread}"))
    best = {method: max(values) for method, values in speeds.items()}
    for name, method, beside, bar in (
        ("before resizing / decode only", "ours, native", "decode only", 0.70),
        ("with antialiased 256p / decode only", "ours, 256p", "decode only", 0.5),
        ("with 256p / webdataset + decord", "ours, 256p", "webdataset + decord, 256p", 1.5),
    ):
        ratio = best[method] / best[beside]
        ratios = [a / b for a, b in zip(speeds[method], speeds[beside], strict=True)]
        spread = f"best / best of {len(ratios)}; repeat by repeat {min(ratios):.3f} to {max(ratios):.3f}"
        found.append(Figure(f"{clip.name}, {name}", ratio, "", f">= {bar}", ratio >= bar, f"{what}; {spread}"))
    return found


def main() -> None:
    """Prints the table; writes it with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    measured = figures(options.repeats)
    print_table(measured)
    if options.json:
        write_json(measured, options.json)


if __name__ == "__main__":
    main()
