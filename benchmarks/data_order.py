"""The order of the data: is it random, does it survive kills and other worlds, what does a far position cost.

    python -m benchmarks.data_order --json FILE

All on simulated indexes: no tar is read. A million clips, their lengths those of workloads/web_mix.csv, stand for a
data set; a hundred million for a large one.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.figure import Figure, print_table, write_json
from sora_train.config.data import DataConfig, DatasetConfig, SizeChange, SizeConfig, StageConfig
from sora_train.config.model import ModelConfig
from sora_train.data import shuffle
from sora_train.data.order import Order
from sora_train.data.packing import PackLimits
from sora_train.data.selection import Selection
from sora_train.data.shard_table import ShardTable
from sora_train.data.size import Stride
from sora_train.data.totals import Rule, Totals, compute_totals
from sora_train.encoders.codec_shape import CodecShape
from tests.data.schedules import WORLDS, Attempt, drawn_schedule, run, small_model
from tests.data.simulated import Simulated
from tests.data.spread import Numbers, unevenness

LENGTHS = Path(__file__).parent / "workloads" / "web_mix.csv"
SHARDS, CLIPS = 1000, 1000
RULE = Rule(SizeConfig(64 * 64, 81, 8.0), Stride(2, 8, 8), Selection(0.0))
# What one in a thousand random orders has is above it.
MOST_UNEVEN = 3.1

CODEC = CodecShape(channels=96, temporal_ratio=2, spatial_ratio=4)
SCHEDULES, STEPS = 200, 60

LARGE_SHARDS, LARGE_CLIPS = 100_000, 1000
REPEATS = 11


def figures() -> list[Figure]:
    """All rows."""
    return [*randomness(), *elastic(), *resume()]


def randomness() -> list[Figure]:
    """Spread of the longest tenth of clips over steps, and that each clip is seen once."""
    rows = []
    frames = web_lengths()
    for name, lengths in (("drawn", frames), ("sorted by length", np.sort(frames))):
        tokens, share_once = epoch(lengths)
        what = f"{SHARDS} shards of {CLIPS} clips, {name}"
        rows.append(
            Figure(f"clips seen exactly once an epoch, {name}", share_once, "", "= 1", share_once == 1, what)
        )
        for clips, together, has_bar in ((64, 1, True), (64, 16, True), (512, 1, True), (512, 16, False)):
            value = unevenness(tokens, clips * int(tokens.mean()), together)
            steps = "steps" if together == 1 else f"{together} steps together"
            rows.append(
                Figure(
                    f"unevenness of long clips, {name}, {steps} of {clips} clips",
                    value,
                    "sd",
                    f"<= {MOST_UNEVEN}" if has_bar else "",
                    value <= MOST_UNEVEN if has_bar else None,
                    f"{what}; variance over an epoch beside 100 random permutations'",
                )
            )
    for name, mutate in MUTATIONS.items():
        tokens, _ = mutate(np.sort(frames))
        value = unevenness(tokens, 64 * int(tokens.mean()), 16)
        rows.append(
            Figure(
                f"the same with a fault: {name}",
                value,
                "sd",
                f"> {MOST_UNEVEN}",
                value > MOST_UNEVEN,
                "sorted, 16 steps of 64 clips together: the test must see it",
            )
        )
    return rows


def web_lengths() -> Numbers:
    """Frames at 8 a second of as many clips as the data set has, drawn from the list."""
    with LENGTHS.open() as file:
        rows = [(int(row["num_frames"]), float(row["fps"])) for row in csv.DictReader(file)]
    frames = np.array([1 if fps == 0 else max(1, round(count / fps * 8)) for count, fps in rows])
    return np.random.default_rng(0).choice(frames, SHARDS * CLIPS).astype(np.int64)


def epoch(frames: Numbers) -> tuple[Numbers, float]:
    """Tokens of the clips of an epoch in its order, and the share of clips that is seen exactly once."""
    dataset = Simulated(SHARDS, CLIPS, lambda numbers: frames[numbers])
    stream = shuffle.Shuffle(dataset, "main", RULE, compute_totals(dataset, RULE), seed=0)  # type: ignore[arg-type]
    tokens, seen = [], np.zeros(SHARDS * CLIPS, dtype=np.int64)
    for clip in stream.clips(0, stream.epoch_tokens):
        tokens.append(clip.num_tokens)
        first, _, place = clip.row.key.partition("x")
        seen[int(first) + int(place)] += 1
    return np.array(tokens), float((seen == 1).mean())


def without_strata(frames: Numbers) -> tuple[Numbers, float]:
    """Shards dealt into windows at random."""
    dealt = shuffle.strata

    def at_random(totals: Totals, most: int) -> Numbers:
        grid = dealt(totals, most)
        return np.random.default_rng(0).permutation(grid.ravel()).reshape(grid.shape)

    shuffle.strata = at_random
    try:
        return epoch(frames)
    finally:
        shuffle.strata = dealt


def with_windows_of(num_shards: int) -> Callable[[Numbers], tuple[Numbers, float]]:
    """Windows of another number of shards."""

    def mutate(frames: Numbers) -> tuple[Numbers, float]:
        before, shuffle.WINDOW_SHARDS = shuffle.WINDOW_SHARDS, (num_shards, num_shards)
        try:
            return epoch(frames)
        finally:
            shuffle.WINDOW_SHARDS = before

    return mutate


MUTATIONS = {
    "shards dealt at random, not by strata": without_strata,
    "windows of 16 shards": with_windows_of(16),
    "windows of 64 shards": with_windows_of(64),
}


def elastic() -> list[Figure]:
    """Random schedules of kills and world sizes, against the run that was never interrupted."""
    sets = {name: Simulated(24, 20, name=f"elastic-{name}") for name in ("films", "more", "stills")}
    size = SizeConfig(max_pixels=32 * 32, max_frames=5, sampling_fps=8.0)
    stages = [
        StageConfig(20, size=SizeChange(max_pixels=64 * 64, max_frames=9), tokens_per_step=6400),
        StageConfig(40, weights={"more": 1.0, "stills": 0.0}),
    ]
    weights = {"films": 1.0, "stills": 0.5, "more": 0.0}
    datasets = {name: DatasetConfig("simulated", weight) for name, weight in weights.items()}

    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(datasets=datasets, stages=stages, tokens_per_step=1600, size=size, cache_dir=cache)

        def build() -> Order:
            return Order(sets, config, small_model(), CODEC, 0)  # type: ignore[arg-type]

        limits = PackLimits(640, largest_group=8, heads=8)
        truth = run(build, [Attempt(1, 0, STEPS)], limits)
        equal = attempts = 0
        for seed in range(SCHEDULES):
            schedule = drawn_schedule(seed, STEPS)
            attempts += len(schedule)
            equal += run(build, schedule, limits) == truth
    conditions = (
        f"{SCHEDULES} schedules, {attempts} attempts, worlds of {WORLDS}; {STEPS} steps, {len(truth)} clips, 3 data "
        "sets, 3 stages, groups to 8; clip, frames, size, caption, timestep seed"
    )
    value = equal / SCHEDULES
    return [Figure("elastic schedules equal to the uninterrupted run", value, "", "= 1", value == 1, conditions)]


class Large(Simulated):
    """Tables made on demand: what tells one clip from another is the table's own, the rest is shared by all."""

    def __init__(self) -> None:
        super().__init__(LARGE_SHARDS, LARGE_CLIPS, name="large")
        self.models = [super(Large, self).table(shard) for shard in range(64)]

    def table(self, shard: int) -> ShardTable:
        """Of one of a few shards that stand for all."""
        model = self.models[shard % len(self.models)]
        return replace(
            model, keys=model.keys.copy(), num_frames=model.num_frames.copy(), source=model.source.copy()
        )


def large_order(cache: str) -> Order:
    """Steps of 64 clips or so."""
    size = SizeConfig(64 * 64, 17, 8.0)
    config = DataConfig(shards="simulated", tokens_per_step=64 * 340, size=size, cache_dir=cache)
    return Order({"main": Large()}, config, ModelConfig(in_channels=96, out_channels=96), CODEC, 0)  # type: ignore[dict-item]


def resume_once(cache: str, is_boundary: bool) -> None:
    """In a fresh process: the first batch at the end of the first epoch, or astride the end. Prints what it took."""
    order = large_order(cache)
    (stream,) = order.shuffles.values()
    step = stream.epoch_tokens // order.config.tokens_per_step - (0 if is_boundary else 100)
    start, cpu = time.perf_counter(), time.process_time()
    batch = order.batch(step)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    # Not getrusage: what it calls a process's own peak begins at that of the process that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    resident = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert len(batch.samples) > 30
    assert "torch" not in sys.modules
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "resident_bytes": resident}))


def resume() -> list[Figure]:
    """What it costs to go on at clip 100,000,000, in fresh processes."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.process_time()
        large_order(cache)
        totals_seconds = time.process_time() - start
        measured: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(REPEATS):
            for is_boundary, found in measured.items():
                program = f"from benchmarks.data_order import resume_once; resume_once({cache!r}, {is_boundary})"
                command = [sys.executable, "-c", program]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout))
    plain = measured[False]
    index = f"simulated index of {LARGE_SHARDS:,} shards of {LARGE_CLIPS:,} clips, totals from the cache"
    conditions = f"{index}; fresh process, {REPEATS} repeats, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    rows = []
    for name, key, bar in (("CPU time", "cpu_seconds", 100.0), ("time", "seconds", None)):
        values = sorted(1000 * entry[key] for entry in plain)
        rows.append(
            Figure(
                f"first batch at clip 100,000,000, {name}",
                values[0],
                "ms",
                f"< {bar:.0f}" if bar else "",
                values[0] < bar if bar else None,
                f"{conditions}; minimum, to {values[-1]:.0f}",
            )
        )
    astride = sorted(1000 * entry["cpu_seconds"] for entry in measured[True])
    rows.append(
        Figure(
            "the same where the step lies in two windows, CPU time",
            astride[0],
            "ms",
            "",
            None,
            f"{conditions}; minimum, to {astride[-1]:.0f}; one step in {LARGE_SHARDS // 256 * 10}",
        )
    )
    largest = max(entry["resident_bytes"] for entries in measured.values() for entry in entries) / 1e6
    rows.append(Figure("memory of the process", largest, "MB", "< 300", largest < 300, f"{conditions}; the largest"))
    rows.append(
        Figure("totals computed, once a data set and rule", totals_seconds, "CPU s", "", None, f"{index}, when new")
    )
    return rows


def main() -> None:
    """Prints the table; writes it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = figures()
    print_table(rows)
    if arguments.json:
        write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
