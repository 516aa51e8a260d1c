"""Damaged clips through the decoding processes: what they cost, and that nothing short is taken for good.

    python -m benchmarks.data_fuzz --cases 0:10000 --json FILE

Real footage in H.264, HEVC, AV1 and VP9, damaged by seed (tests/data/mutations.py), stands in shards whose index knows
only the undamaged clips, and no hash of their bytes: decoding alone has to notice.
"""

import argparse
import io
import os
import tarfile
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from benchmarks.figure import Figure, print_table, write_json
from sora_train.config.data import CaptionConfig
from sora_train.config.diffusion import TimestepConfig
from sora_train.data.clip import decode_clip
from sora_train.data.order import PlannedSample
from sora_train.data.probe import CONTAINERS, MEDIA_ERRORS
from sora_train.data.sample import Facts, SampleReader, Source, Task, places_of
from sora_train.data.schema import IndexRow, ShardEntry
from sora_train.data.size import ClipSize
from sora_train.data.stream import Job, Pool
from tests.data.media import real_clips, row_of, whole
from tests.data.mutations import mutate

STALL_SECONDS = 4.0
CHILD_GIB = 1.0
PER_JOB, JOBS_AHEAD = 8, 4
# Levels of 255 by which a frame may differ, on average, and still be the picture that was encoded.
SAME_PICTURE = 2.0


@dataclass
class Case:
    """One damaged clip."""

    codec: str
    damage: str
    row: IndexRow
    size: ClipSize
    data: bytes
    truth: np.ndarray


@dataclass
class Seen:
    """What has been counted."""

    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    accepted: Counter[str] = field(default_factory=Counter)  # by codec
    altered: Counter[str] = field(default_factory=Counter)  # of these, other pictures than were encoded; by codec
    ledger: set[tuple[str, str]] = field(default_factory=set)  # key and reason of every drop
    short: list[str] = field(default_factory=list)  # accepted, but libav alone finds fewer frames, or none were written
    pids: set[int] = field(default_factory=set)
    longest_wait: float = 0.0
    trainer_errors: int = 0
    child_mib: float = 0.0


def cases(first: int, last: int) -> Iterator[Case]:
    """One of each seed; every other is a clip from the middle, to which decoding has to seek."""
    clips = real_clips()
    rows = [row_of(data, kind.suffix) for kind, data in clips]
    sizes = [(whole(row), whole(row, 9, 9)) for row in rows]
    truths = [[decode_clip(clips[i][1], rows[i], size) for size in sizes[i]] for i in range(len(clips))]
    for seed in range(first, last):
        which, damage, data = mutate([data for _, data in clips], seed)
        row = replace(rows[which], key=f"case{seed}", medium_size=len(data))
        part = seed % 2
        yield Case(clips[which][0].codec, damage, row, sizes[which][part], data, truths[which][part])


def run(first: int, last: int, folder: Path, workers: int) -> Seen:
    """Reads all cases through a pool of decoding processes."""
    seen = Seen()
    pool = Pool(workers, STALL_SECONDS, int(CHILD_GIB * 2**30))
    pool.open(
        SampleReader((Source(LocalFileSystem(), str(folder), ("caption",)),), TimestepConfig(), CaptionConfig(), seed=0)
    )
    ahead: deque[tuple[Job, list[Case]]] = deque()
    batch: list[Case] = []
    try:
        for case in cases(first, last):
            batch.append(case)
            if len(batch) == PER_JOB:
                ahead.append((pool.submit(tasks(batch, folder)), batch))
                batch = []
            if len(ahead) > JOBS_AHEAD:
                settle(pool, *ahead.popleft(), seen)
        if batch:
            ahead.append((pool.submit(tasks(batch, folder)), batch))
        while ahead:
            settle(pool, *ahead.popleft(), seen)
    finally:
        pool.close()
    return seen


def tasks(batch: list[Case], folder: Path) -> list[Task]:
    """Writes the cases into a shard; what is to be read of it."""
    shard = ShardEntry(f"{batch[0].row.key}.tar", 0, "", len(batch))
    found = []
    with tarfile.open(folder / shard.name, "w") as tar:
        for case in batch:
            info = tarfile.TarInfo(f"{case.row.key}.{case.row.medium}")
            info.size = len(case.data)
            row = replace(case.row, medium_offset=tar.offset + tarfile.BLOCKSIZE)
            tar.addfile(info, io.BytesIO(case.data))
            found.append(Task(PlannedSample(0, 0, 0, 0, row, case.size, (1, 1, 1, 1), 1, None), shard))
    return found


def settle(pool: Pool, job: Job, batch: list[Case], seen: Seen) -> None:
    """Waits for a shard of cases and counts what became of each."""
    start = time.monotonic()
    try:
        memory = pool.wait(job)
    except RuntimeError as error:  # would end training
        print(f"the trainer would have ended: {error}")
        seen.trainer_errors += 1
        return
    seen.longest_wait = max(seen.longest_wait, time.monotonic() - start)
    assert memory is not None
    seen.pids.update(pool.pids())
    seen.child_mib = max([seen.child_mib, *map(peak_mib, pool.pids())])
    for case, outcome, task, at in zip(batch, job.outcomes, job.tasks, job.starts, strict=True):
        assert task is not None
        if not isinstance(outcome, Facts):
            reason = outcome.reason if outcome else "nothing"
            seen.dropped[reason] += 1
            seen.ledger.add((case.row.key, reason))
            continue
        seen.accepted[case.codec] += 1
        frames = memory.numpy()[at:][places_of(task.sample).medium].reshape(case.truth.shape)
        if num_frames(case) < case.size.num_frames:
            seen.short.append(f"{case.row.key} ({case.codec}, {case.damage})")
        difference = np.abs(frames.astype(int) - case.truth).mean((1, 2, 3)).max()
        seen.altered[case.codec] += int(difference > SAME_PICTURE)


def num_frames(case: Case) -> int:
    """What libav alone makes of a file from its start, packets that do not decode left out."""
    count = 0
    try:
        file, container_format = io.BytesIO(case.data), CONTAINERS[case.row.medium]
        with av.open(file, format=container_format, metadata_errors="replace") as container:
            for packet in container.demux(video=0):
                with suppress(*MEDIA_ERRORS):
                    count += len(packet.decode())
    except MEDIA_ERRORS:
        pass
    return count


def peak_mib(pid: int) -> float:
    """The most memory that a process has had."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # gone
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def figures(first: int = 0, last: int = 10_000, workers: int = 2) -> list[Figure]:
    """What became of the cases."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        before = peak_mib(os.getpid())
        seen = run(first, last, Path(folder), workers)
    seconds = time.monotonic() - start
    total, dropped, accepted = last - first, seen.dropped.total(), seen.accepted.total()
    what = f"seeds {first} to {last - 1}: 24 frames of 64x96 in H.264, HEVC, AV1 and VP9; {workers} processes"
    lost = len(seen.pids) - workers
    print("not of the length that was asked for:", ", ".join(seen.short) or "none")
    found = [
        Figure("cases", total, "", "", None, f"{what}; {seconds:.0f} s"),
        Figure("trainer deaths", seen.trainer_errors, "", "0", seen.trainer_errors == 0, what),
        Figure("longest wait", seen.longest_wait, "s", "<= 5", seen.longest_wait <= 5, f"{what}; for {PER_JOB} clips"),
        Figure("accepted + dropped", accepted + dropped, "", f"{total}", accepted + dropped == total, what),
        Figure("drops with key and reason", len(seen.ledger), "", f"{dropped}", len(seen.ledger) == dropped, what),
        Figure("short or empty clips accepted", len(seen.short), "", "0", not seen.short, f"{what}; libav's own count"),
        Figure(
            "peak memory of a process", seen.child_mib, "MiB", f"<= {CHILD_GIB * 1024:.0f}",
            seen.child_mib <= CHILD_GIB * 1024, f"{what}; resident",
        ),
        Figure("growth of the trainer", peak_mib(os.getpid()) - before, "MiB", "", None, f"{what}; resident"),
        Figure("processes that died", lost, "", "", None, f"{what}; seen between shards"),
    ]  # fmt: skip
    found += [Figure(f"dropped: {reason}", n, "", "", None, what) for reason, n in sorted(seen.dropped.items())]
    for codec, count in sorted(seen.accepted.items()):
        altered = seen.altered[codec]
        told = f"{what}; {altered} show another picture, which only the hash of the index tells"
        found.append(Figure(f"accepted: {codec}", count, "", "", None, told))
    return found


def main() -> None:
    """Prints the table; writes it with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", default="0:10000", help="seeds, FIRST:LAST")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    first, last = (int(word) for word in options.cases.split(":"))
    measured = figures(first, last, options.workers)
    print_table(measured)
    if options.json:
        write_json(measured, options.json)


if __name__ == "__main__":
    main()
