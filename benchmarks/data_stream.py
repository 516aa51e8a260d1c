"""From shards to packs: latents beside an mmap and beside webdataset, videos through 1 and 2 decoding processes, how
soon the first batch is there, what the training process holds.

    python -m benchmarks.data_stream --json FILE

CPU-seconds where costs are compared, methods in turn, the best of the repeats; the wall's seconds for the first batch.
"""

import argparse
import io
import json
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset as wds

from benchmarks.figure import Figure, print_table, write_json
from sora_train.config.data import CaptionConfig, DataConfig, SizeConfig
from sora_train.config.diffusion import TimestepConfig
from sora_train.config.model import ModelConfig
from sora_train.data.clip import decode_clip
from sora_train.data.decoder import Memory, Request
from sora_train.data.handover import memory_file
from sora_train.data.index_writer import write_index
from sora_train.data.loader import Loader, build_loader
from sora_train.data.precomputed import latents_member
from sora_train.data.sample import SampleReader, Task, Unwatched, places_of
from sora_train.data.stream import facts_from
from sora_train.encoders.codec_shape import CodecShape
from tests.data.corpus import encode, moving_square, record, write_tar

CODEC = CodecShape(channels=16, temporal_ratio=4, spatial_ratio=8)
MODEL = ModelConfig(in_channels=16, out_channels=16, width=128, heads=4, depth=2, mlp_width=512)
# 81 frames in bfloat16, by height: 9.7 MB and 4.2 MB.
LATENTS = {720: (16, 21, 90, 160), 480: (16, 21, 60, 104)}
REPEATS = 15
FIRST_BATCHES = 7


def figures(repeats: int = REPEATS) -> list[Figure]:
    """All rows."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/caches"
        place = Path(folder)
        latents = [figure for height in LATENTS for figure in latent_shards(place, repeats, height)]
        return [*latents, *videos(place), *first_batch(place)]


@dataclass(frozen=True)
class LatentShard:
    """The same latents for every method: ours, and as .npy for webdataset."""

    tasks: list[Task]
    reader: SampleReader
    tar: Path
    npy_tar: Path

    @property
    def num_bytes(self) -> int:
        """Of all latents."""
        return sum(task.sample.row.medium_size for task in self.tasks)


def loader_of(shards: Path, **changes: object) -> Loader:
    """One rank's."""
    values: dict[str, object] = {
        "shards": str(shards),
        "tokens_per_step": 160_000,
        "max_tokens_per_pack": 80_000,
        "captions": CaptionConfig(dropout=0.1),
        "held_out_fraction": 0.0,
        "workers": 0,
        **changes,
    }
    config = DataConfig(**values)  # type: ignore[arg-type]
    return build_loader(config, MODEL, CODEC, TimestepConfig(), 0, 0, 1, codec_identity="vae")


def latent_shard(folder: Path, height: int, count: int = 24) -> LatentShard:
    """A shard of 81-frame clips and its twin."""
    shards = folder / f"latents-{height}"
    shards.mkdir()
    shape = LATENTS[height]
    width = 8 * shape[3]
    generator = torch.Generator().manual_seed(0)
    ours, theirs = {}, {}
    text = record(moving_square(1, height, width), "source").to_json()
    for i in range(count):
        latents = torch.randn(shape, generator=generator).to(torch.bfloat16)
        ours[f"clip{i}.latents.safetensors"] = latents_member(latents, "vae", 81, height, width, 16.0)
        about = {**json.loads(text), "num_frames": 81, "fps": 16.0}
        ours[f"clip{i}.json"] = theirs[f"clip{i}.json"] = json.dumps(about).encode()
        file = io.BytesIO()
        np.save(file, latents.view(torch.int16).numpy())
        theirs[f"clip{i}.npy"] = file.getvalue()
    write_tar(shards / "shard-000000.tar", ours)
    write_tar(folder / f"npy-{height}.tar", theirs)
    write_index(shards)
    size = SizeConfig(max_pixels=height * width, max_frames=81, sampling_fps=16.0)
    loader = loader_of(shards, size=size)
    samples = {sample.row.key: sample for step in range(40) for plan in loader.plans(step) for sample in plan.samples}
    entry = loader.order.datasets[0].manifest.shards[0]
    tasks = [Task(sample, entry) for sample in samples.values()]
    if len(tasks) != count:
        raise RuntimeError(f"{len(tasks)} of {count} clips were planned")
    return LatentShard(tasks, loader.reader, shards / "shard-000000.tar", folder / f"npy-{height}.tar")


def by_mmap(shard: LatentShard, memory: np.ndarray) -> None:
    """Every latent copied out of a map of the file, to a place of its own."""
    with shard.tar.open("rb") as file:
        whole = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), dtype=np.uint8)
    for i, task in enumerate(shard.tasks):
        row = task.sample.row
        np.copyto(memory[i * row.medium_size :][: row.medium_size], whole[row.medium_offset :][: row.medium_size])


def by_webdataset(shard: LatentShard, memory: np.ndarray) -> None:
    """As its users do."""
    dataset = wds.WebDataset(str(shard.npy_tar), shardshuffle=False, empty_check=False).decode()
    if sum(1 for _ in dataset) != len(shard.tasks):
        raise RuntimeError("webdataset lost some")


class Ours:
    """What parent and child do for a sample, in one process: task there, latents and their hash, answer back."""

    def __init__(self, shard: LatentShard) -> None:
        self.starts, end = [], 0
        for task in shard.tasks:
            self.starts.append(end)
            end += -(-places_of(task.sample).num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.file = memory_file(end)
        self.child = Memory()
        self.parent = mmap.mmap(self.file, end)

    def __call__(self, shard: LatentShard, memory: np.ndarray) -> None:
        """The draws of noise, which no other method makes, are left out."""
        for start, task in zip(self.starts, shard.tasks, strict=True):
            size = places_of(task.sample).num_bytes
            request: Request = pickle.loads(pickle.dumps(Request(1, task, start, size, 1, (1,))))
            part = np.frombuffer(self.child.part(request, self.file), dtype=np.uint8)
            facts = shard.reader.fill(request.task, part, Unwatched())
            facts = facts_from(json.loads(json.dumps(vars(facts), default=vars)), request.num_bytes)
            assert facts.latents is not None


class InTheTrainer:
    """The alternative to a child: read in the training process, without a hand-over; memory is used again as well."""

    def __init__(self, shard: LatentShard) -> None:
        self.parts = [np.ones(places_of(task.sample).num_bytes, dtype=np.uint8) for task in shard.tasks]

    def __call__(self, shard: LatentShard, memory: np.ndarray) -> None:
        """Without noise, too."""
        for part, task in zip(self.parts, shard.tasks, strict=True):
            shard.reader.fill(task, part, Unwatched())


def latent_shards(folder: Path, repeats: int, height: int) -> list[Figure]:
    """Bytes a CPU-second, and the shares that have bars."""
    shard = latent_shard(folder, height)
    methods: dict[str, Callable[[LatentShard, np.ndarray], None]] = {
        "mmap": by_mmap,
        "ours": Ours(shard),
        "webdataset .decode()": by_webdataset,
        "ours, in the training process": InTheTrainer(shard),
    }
    memory = np.zeros(shard.num_bytes, dtype=np.uint8)
    memory[:] = 1
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, run in methods.items():
            start = time.process_time()
            run(shard, memory)
            seconds = time.process_time() - start
            if repeat:  # the first warms up
                speeds[name].append(shard.num_bytes / seconds / 1e9)
    what = f"{len(shard.tasks)} latents of {shard.num_bytes / len(shard.tasks) / 1e6:.1f} MB, page cache warm"
    found = [
        Figure(f"{height}p latents, {name}", max(speed), "GB/CPU-s", "", None, f"{what}; from {min(speed):.2f}")
        for name, speed in speeds.items()
    ]
    for beside, bar in (("mmap", 0.6), ("webdataset .decode()", 3.0)):
        ratio = max(speeds["ours"]) / max(speeds[beside])
        ratios = [a / b for a, b in zip(speeds["ours"], speeds[beside], strict=True)]
        found.append(
            Figure(
                f"{height}p latents, ours / {beside}",
                ratio,
                "",
                f">= {bar}",
                ratio >= bar,
                f"best / best of {repeats}, hash and hand-over included, noise left out; "
                f"repeat by repeat {min(ratios):.2f} to {max(ratios):.2f}",
            )
        )
    return found


def videos(folder: Path, steps: int = 12) -> list[Figure]:
    """Frames through the whole loader, beside the same frames decoded here; what the training process holds."""
    shards = folder / "videos"
    shards.mkdir()
    members = {}
    for i in range(16):
        frames = moving_square(33, 256, 448, seed=i)
        frames += np.random.default_rng(i).integers(0, 24, frames.shape, dtype=np.uint8)
        members[f"clip{i}.mp4"] = encode(frames, folder, fps=16.0)
        members[f"clip{i}.json"] = record(frames, f"source{i}", fps=16.0).to_json().encode()
    write_tar(shards / "shard-000000.tar", members)
    write_index(shards)
    sizes = SizeConfig(max_pixels=256 * 448, max_frames=33, sampling_fps=16.0)
    settings: dict[str, object] = {"size": sizes, "tokens_per_step": 30_000, "max_tokens_per_pack": 10_000}
    here = loader_of(shards, **settings)
    samples = [sample for step in range(2) for plan in here.plans(step) for sample in plan.samples]
    data = {sample.row.key: _bytes(shards, sample.row.medium_offset, sample.row.medium_size) for sample in samples}
    alone = 0.0
    for _ in range(REPEATS):
        start = time.process_time()
        for sample in samples:
            decode_clip(data[sample.row.key], sample.row, sample.size)
        alone = max(alone, sum(sample.size.num_frames for sample in samples) / (time.process_time() - start))
    what = "H.264 256x448, 33 frames, noise"
    found = [Figure("videos, decode_clip alone", alone, "frames/CPU-s", "", None, f"{what}; best of {REPEATS}")]
    for workers in (1, 2):
        loader = loader_of(shards, workers=workers, **settings)
        assert loader.pool is not None
        list(loader.packs(0))
        children = [psutil.Process(pid) for pid in loader.pool.pids()]
        before, trainer = [_cpu(child) for child in children], time.process_time()
        start, count, packs, held = time.monotonic(), 0, 0, 0
        for step in range(1, steps):
            for pack in loader.packs(step):
                count += sum(sample.size.num_frames for sample in pack.samples)
                packs += 1
                held = max(held, psutil.Process().memory_info().rss)
        wall, own = time.monotonic() - start, time.process_time() - trainer
        spent = sum(_cpu(child) - cpu for child, cpu in zip(children, before, strict=True))
        name = f"videos, {workers} worker{'s' * (workers > 1)}"
        found += [
            Figure(f"{name}: CPU", count / (spent + own), "frames/CPU-s", "", None, f"{what}; noise drawn as well"),
            Figure(f"{name}: wall", count / wall, "frames/s", "", None, f"{os.cpu_count()} cores, load {_load():.1f}"),
            Figure(f"{name}: CPU of the training process", 1e3 * own / packs, "ms/pack", "", None, f"{packs} packs"),
            Figure(
                f"{name}: memory of packs", loader.pool.blocks.num_bytes / 2**20, "MiB", "", None, "read_ahead=4"
            ),
            Figure(f"{name}: RSS of the training process", held / 2**20, "MiB", "", None, "torch included"),
        ]
        loader.close()
    return found


FIRST = """
import json, sys, time
import torch
import benchmarks.data_stream as b
from sora_train.config.data import SizeConfig
from pathlib import Path
size = SizeConfig(max_pixels=int(sys.argv[2]), max_frames=9, sampling_fps=8.0)
start = time.monotonic()
loader = b.loader_of(Path(sys.argv[1]), size=size, tokens_per_step=400, max_tokens_per_pack=400, workers=1)
opened = time.monotonic() - start
pack = next(iter(loader.packs(0)))
print(json.dumps([time.monotonic() - start, opened, len(pack.failures)]))
loader.close()
"""


def first_batch(folder: Path, num_shards: int = 1000) -> list[Figure]:
    """Seconds from the start of build_loader, in a process that has imported torch, to the first pack."""
    shards = folder / "many"
    shards.mkdir()
    videos = []
    for i in range(4):
        frames = moving_square(9, 64, 80, seed=i)
        videos.append((encode(frames, folder), frames))
    for number in range(num_shards):
        members = {}
        for i, (video, frames) in enumerate(videos):
            members[f"clip{number}-{i}.mp4"] = video
            members[f"clip{number}-{i}.json"] = record(frames, f"source{number}-{i}").to_json().encode()
        write_tar(shards / f"shard-{number:06d}.tar", members)
    write_index(shards)
    found = []
    for name, max_pixels in (("native size", 64 * 80), ("scaled", 56 * 70)):
        seconds, opened = [], []
        for _ in range(FIRST_BATCHES):
            command = [sys.executable, "-c", FIRST, str(shards), str(max_pixels)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            total, first, failures = json.loads(done.stdout)
            if failures:
                raise RuntimeError(f"{failures} failures")
            seconds.append(total)
            opened.append(first)
        spread = f"{num_shards} shards; build_loader {min(opened):.2f}; wall, {min(seconds):.2f} to {max(seconds):.2f}"
        conditions = f"{spread}, load {_load():.1f} on {os.cpu_count()} cores"
        cold = f"first batch, {name}, totals not cached"
        found += [
            Figure(cold, seconds[0], "s", "", None, f"{num_shards} shards; one run"),
            Figure(f"first batch, {name}", min(seconds), "s", "< 2", min(seconds) < 2, conditions),
        ]
    return found


def _bytes(shards: Path, offset: int, size: int) -> bytes:
    with (shards / "shard-000000.tar").open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _load() -> float:
    return os.getloadavg()[0]


def main() -> None:
    """Prints the table, and writes it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    found = figures(arguments.repeats)
    print_table(found)
    if arguments.json:
        write_json(found, arguments.json)


if __name__ == "__main__":
    main()
