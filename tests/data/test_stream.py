"""Whatever a decoding process does, one clip is lost at most, and the rest of the batch is the same to the bit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from corpus import CODEC, MODEL, data_config
from test_loader import by_index

from sora_train.config.diffusion import TimestepConfig
from sora_train.config.root import ConfigError
from sora_train.data.blocks import Blocks
from sora_train.data.handover import Phase, take_messages
from sora_train.data.loader import Loader, Pack, build_loader
from sora_train.data.precomputed_header import Place
from sora_train.data.stream import COMMAND, Pool, facts_from

MISBEHAVING = str(Path(__file__).parent / "misbehaving.py")
Start = Callable[..., Loader]


@pytest.fixture
def start(shards: Path) -> Iterator[Start]:
    """Loaders whose children misbehave as `ways` says (KEY=HOW), and are gone after the test."""
    loaders = []

    def build(ways: str = "", stall_seconds: float = 4.0, workers: int = 1, **changes: Any) -> Loader:
        masked = changes.pop("masked", None)
        config = data_config(shards, workers=workers, stall_seconds=stall_seconds, **changes)
        loader = build_loader(
            config, MODEL, CODEC, TimestepConfig(), seed=3, global_rank=0, world_size=1, masked=masked
        )
        if loader.pool is not None and ways:
            loader.close()
            loader.pool = Pool(workers, stall_seconds, 4 << 30, (sys.executable, "-P", MISBEHAVING, ways))
            loader.pool.patience[Phase.reading] = loader.pool.patience[Phase.starting] = 60.0
            loader.pool.open(loader.reader)
            loader._end = loader.pool.close
        loaders.append(loader)
        return loader

    yield build
    for loader in loaders:
        loader.close()


@pytest.fixture(scope="module")
def clean(shards: Path) -> list[dict[int, tuple[object, ...]]]:
    """Steps 0 to 3, read without children."""
    config = data_config(shards)
    loader = build_loader(config, MODEL, CODEC, TimestepConfig(), seed=3, global_rank=0, world_size=1)
    return [by_index(list(loader.packs(step))) for step in range(4)]


def key_of(clean: list[dict[int, Any]], index: int) -> str:
    key: str = clean[0][index][0].row.key
    return key


def reasons(packs: list[Pack]) -> dict[str, str]:
    return {failure.key: failure.reason for pack in packs for failure in pack.failures}


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("segfault", "crash"),
        ("abort", "crash"),
        ("exit", "crash"),
        ("garbage", "crash"),
        ("lie", "crash"),
        ("close", "crash"),
        ("hang", "timeout"),
        ("hang_in_c", "timeout"),
        ("stop", "timeout"),
        ("allocate", "memory"),
        ("allocate_in_c", "crash"),
        ("raise", "error"),
    ],
)
def test_one_clip_is_lost_and_its_neighbours_are_kept(
    start: Start, clean: list[dict[int, tuple[object, ...]]], way: str, reason: str
) -> None:
    victim = key_of(clean, 1)
    loader = start(f"{victim}={way}", stall_seconds=0.8)
    packs = list(loader.packs(0))
    assert reasons(packs) == {victim: reason}
    read = by_index(packs)
    assert read.keys() == clean[0].keys()
    for index in read.keys() - {1}:
        assert read[index] == clean[0][index]
    (failed,) = [
        (frames, noise, text, float(weight))
        for pack in packs
        for sample, frames, noise, text, weight in zip(
            pack.samples, pack.frames, pack.noise, pack.text, pack.weight, strict=True
        )
        if sample.row.key == victim
    ]
    assert not failed[0].any()
    assert not failed[1].any()
    assert failed[2:] == ("", 0.0)
    # A new child has taken its place.
    assert by_index(list(loader.packs(1))).keys() == clean[1].keys()


def test_a_clip_that_takes_long_but_goes_on_is_read(
    start: Start, clean: list[dict[int, tuple[object, ...]]]
) -> None:
    loader = start(f"{key_of(clean, 0)}=slow", stall_seconds=1.0)
    packs = list(loader.packs(0))
    assert not reasons(packs)
    assert by_index(packs) == clean[0]


def test_what_failed_before_is_masked_unread_and_gives_the_same_bytes(
    start: Start, clean: list[dict[int, tuple[object, ...]]], shards: Path
) -> None:
    victim = key_of(clean, 1)
    first = start(f"{victim}=exit")
    failed = list(first.packs(0))
    (failure,) = [failure for pack in failed for failure in pack.failures]
    masked = {0: frozenset({(failure.shard, failure.key)})}
    for workers in (0, 1):
        again = start(workers=workers, masked=masked)
        packs = list(again.packs(0))
        assert not reasons(packs), "told of once"
        assert by_index(packs) == by_index(failed)
        assert [pack.weight.tolist() for pack in packs] == [pack.weight.tolist() for pack in failed]
    elsewhere = start(workers=0, masked={1: masked[0]})
    assert by_index(list(elsewhere.packs(0))) == clean[0], "masked in its step alone"


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("read_ahead", [1, 4])
def test_packs_are_the_same_whoever_reads_them(
    start: Start, clean: list[dict[int, tuple[object, ...]]], workers: int, read_ahead: int
) -> None:
    loader = start(workers=workers, read_ahead=read_ahead)
    for step in (0, 1, 2, 3, 1, 2):  # back as well
        assert by_index(list(loader.packs(step))) == clean[step]
    next(loader.packs(0))  # left half-way
    assert by_index(list(loader.packs(2))) == clean[2]
    assert loader.pool is not None
    assert len(loader.pool.pids()) == workers


def test_validation_clips_are_read_by_the_children_too(start: Start) -> None:
    here = start(workers=0, held_out_fraction=0.4).validation_packs(5)
    loader = start(workers=1, held_out_fraction=0.4)
    next(loader.packs(0))
    assert by_index(loader.validation_packs(5)) == by_index(here)
    key = here[0].samples[0].row.key
    broken = start(f"{key}=segfault", held_out_fraction=0.4)
    packs = broken.validation_packs(5)
    assert reasons(packs) == {key: "crash"}


def test_children_that_cannot_work_stop_the_run_and_say_so(start: Start) -> None:
    with pytest.raises(RuntimeError, match="died 3 times in a row, the last with exit code 4"):
        list(start("start=exit").packs(0))
    with pytest.raises(RuntimeError, match="died 3 times in a row, the last with exit code 3"):
        list(start("every=exit").packs(0))
    loader = start()
    assert loader.pool is not None
    loader.close()
    loader.pool = Pool(1, 4.0, 4 << 30, COMMAND)
    loader.reader.__dict__["sources"] = _Unpicklable()
    loader.pool.open(loader.reader)
    with pytest.raises(RuntimeError, match=r"cannot start: ImportError.*no such module as this"):
        list(loader.packs(0))
    loader.pool.close()


class _Unpicklable:
    def __reduce__(self) -> tuple[Any, ...]:
        return _complain, ()


def _complain() -> None:
    raise ImportError("no such module as this")


def test_an_error_of_planning_is_told_as_itself(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = start()
    list(loader.packs(0))
    loader._leave()

    def fail(step: int) -> Any:
        raise ConfigError("the index is gone: copy it again")

    monkeypatch.setattr(loader.order, "batch", fail)
    with pytest.raises(ConfigError, match="the index is gone"):
        list(loader.packs(1))


def test_memory_and_descriptors_do_not_grow(start: Start) -> None:
    loader = start(workers=2, read_ahead=2)
    assert loader.pool is not None
    seen, descriptors, packs = [], [], 0
    for step in range(100):
        for _ in loader.packs(step):
            packs += 1
        seen.append(loader.pool.blocks.num_bytes)
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert packs >= 200
    # Two ahead, the one in hand, the one before it which the loop still refers to.
    largest = 4 * max(_pack_bytes(loader, step) for step in range(100))
    assert max(seen) <= largest
    assert max(descriptors[50:]) <= max(descriptors[:50])


def _pack_bytes(loader: Loader, step: int) -> int:
    return max(
        sum(sample.size.num_frames * sample.size.height * sample.size.width * 3 for sample in plan.samples)
        + sum(4 * torch.Size(sample.latent_shape).numel() + 4 * 4096 for sample in plan.samples)
        for plan in loader.plans(step)
    )


def test_memory_is_used_again_when_the_last_view_is_gone_and_not_before() -> None:
    blocks = Blocks()
    block = blocks.take(10_000)
    lent = blocks.lend(block)
    lent[:] = 5
    view = lent[100:200].view(10, 10)[3]
    del block, lent
    other = blocks.take(10_000)
    blocks.lend(other)[:] = 9
    assert (view == 5).all()
    file = other.file
    del other, view
    assert blocks.take(8_000).file >= 0
    taken = [blocks.take(8_000) for _ in range(2)]
    assert file in {block.file for block in taken} or blocks.num_bytes <= 3 * 12288
    assert blocks.num_bytes <= 4 * 12288


@pytest.mark.parametrize("way", ["", "every=hang_in_c"])
def test_children_end_with_their_parent_however_it_ends(shards: Path, way: str) -> None:
    program = f"""
import sys, threading, time
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from corpus import CODEC, MODEL, data_config
from sora_train.config.diffusion import TimestepConfig
from sora_train.data.handover import Phase
from sora_train.data.loader import build_loader
from sora_train.data.stream import Pool
config = data_config(Path({str(shards)!r}), workers=2, stall_seconds=100.0)
loader = build_loader(config, MODEL, CODEC, TimestepConfig(), seed=3, global_rank=0, world_size=1)
if {way!r}:
    loader.pool.close()
    loader.pool = Pool(2, 100.0, 4 << 30, (sys.executable, "-P", {MISBEHAVING!r}, {way!r}))
    loader.pool.open(loader.reader)
threading.Thread(target=lambda: list(loader.packs(0)), daemon=True).start()
# Hanging; or at rest, one of them perhaps without having had a sample, if the other was there first.
is_there = lambda child: child.status.look()[1] is Phase.decoding if {way!r} else child.is_ready and not child.tasks
while len(loader.pool.pids()) < 2 or not all(map(is_there, loader.pool._children)):
    time.sleep(0.02)
print(*loader.pool.pids(), flush=True)
time.sleep(1000)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        children = [int(word) for word in trainer.stdout.readline().split()]
        assert len(children) == 2
        for pid in children:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(pid, number)  # deaf to what launchers send
        time.sleep(0.2)
        assert all(map(_is_alive, children))
    finally:
        trainer.kill()
    deadline = time.monotonic() + 10
    while any(map(_is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_is_alive, children))
    trainer.communicate()


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_forgotten_loader_leaves_no_process(start: Start, shards: Path) -> None:
    config = data_config(shards, workers=1)
    loader = build_loader(config, MODEL, CODEC, TimestepConfig(), seed=3, global_rank=0, world_size=1)
    assert loader.pool is not None
    while not loader.pool.pids():
        time.sleep(0.01)
    (pid,) = loader.pool.pids()
    del loader
    assert not _is_alive(pid)


def test_what_a_child_says_of_its_memory_is_checked() -> None:
    place = {"number": "F32", "shape": [2, 3], "offset": 8}
    said = {"t": 0.5, "text": "a", "latents": place, "rows": None}
    assert facts_from(said, 32).latents == Place("F32", (2, 3), 8)
    for lie in (
        {"t": 2.0},
        {"text": None},
        {"latents": {**place, "offset": 9}},
        {"latents": {**place, "offset": -8}},
        {"latents": {**place, "shape": [-2, -3]}},
        {"rows": {**place, "shape": [10**9, 10**9]}},
    ):
        with pytest.raises(ValueError, match=r"lies outside|t="):
            facts_from({**said, **lie}, 32)


def test_messages_are_whole_or_wait() -> None:
    inbox = bytearray(b"\x02\x00\x00\x00{}\x02\x00\x00\x00{")
    assert take_messages(inbox) == [{}]
    inbox += b"}"
    assert take_messages(inbox) == [{}]
    assert not inbox
    for bad in (b"\xff\xff\xff\xff", b"\x02\x00\x00\x00[]", b"\x02\x00\x00\x00{{"):
        with pytest.raises(ValueError, match=r"message|Expecting"):
            take_messages(bytearray(bad))
