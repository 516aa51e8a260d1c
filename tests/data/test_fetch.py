"""Bytes of shards: few requests, tried again, or a copy on this machine; what cannot be had is said in one word."""

import fcntl
import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from sora_train.data import fetch
from sora_train.data.fetch import MAX_GAP, FetchError, Part, ShardBytes
from sora_train.data.schema import ShardEntry
from sora_train.data.shard_cache import ShardCache

DATA = bytes(range(256)) * 2048


def entry(data: bytes = DATA, name: str = "a.tar") -> ShardEntry:
    return ShardEntry(name, len(data), hashlib.sha256(data).hexdigest(), 1)


class Remote(MemoryFileSystem):
    """Counts what is asked of it, and fails as often as it is told to."""

    store: dict[str, Any] = {}  # noqa: RUF012  # as the class it extends
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []
        self.opened = 0
        self.failures: list[Exception] = []
        self.cut = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        self.asked.append((start or 0, end or 0))
        if self.failures:
            raise self.failures.pop(0)
        data: bytes = super().cat_file(path, start=start, end=end, **more)
        return data[: len(data) - self.cut]

    def _open(self, *arguments: Any, **more: Any) -> Any:
        self.opened += 1
        return super()._open(*arguments, **more)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: SLEPT.append(seconds))
    SLEPT.clear()
    Remote.store.clear()
    files = Remote()
    files.pipe_file("/set/a.tar", DATA)
    files.opened = 0
    yield files
    Remote.store.clear()


SLEPT: list[float] = []


def filled(files: Any, folder: str, *ranges: tuple[int, int], cache: ShardCache | None = None) -> list[bytes]:
    parts = [Part(start, memoryview(bytearray(size))) for start, size in ranges]
    ShardBytes(files, folder, cache).fill(entry(), parts)
    return [bytes(part.into) for part in parts]


def test_neighbours_come_in_one_request(remote: Remote) -> None:
    ranges = [(1000, 500), (512, 100), (1500 + MAX_GAP, 10)]
    assert filled(remote, "/set", *ranges) == [DATA[start : start + size] for start, size in ranges]
    assert remote.asked == [(512, 1510 + MAX_GAP)]
    remote.asked.clear()
    far = (1500 + MAX_GAP + 1, 10)
    assert filled(remote, "/set", (1000, 500), far) == [DATA[1000:1500], DATA[far[0] : far[0] + 10]]
    assert len(remote.asked) == 2


def test_troubles_of_the_network_are_waited_out(remote: Remote) -> None:
    class ClientError(Exception):
        """As the clients of object stores have them."""

    remote.failures = [ConnectionResetError(), TimeoutError(), ClientError(), OSError("503")]
    assert filled(remote, "/set", (0, 10)) == [DATA[:10]]
    assert SLEPT == [0.5, 1.0, 2.0, 4.0], "the same every time"
    remote.failures = [ClientError("throttled")] * 5
    with pytest.raises(FetchError, match=r"^read: .*throttled.* after 5 attempts"):
        filled(remote, "/set", (0, 10))
    remote.cut = 1
    with pytest.raises(FetchError, match=r"^read: .*9 of 10 bytes"):
        filled(remote, "/set", (0, 10))


def test_what_is_not_there_is_not_asked_for_again(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"^missing_shard: "):
        filled(remote, "/other", (0, 10))
    assert len(remote.asked) == 1
    with pytest.raises(FetchError, match=r"^missing_shard: "):
        filled(LocalFileSystem(), str(tmp_path), (0, 10))


def test_local_files_are_read_in_place_and_a_cut_one_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    ranges = [(300, 5), (100, 50)]
    assert filled(LocalFileSystem(), str(tmp_path), *ranges) == [DATA[300:305], DATA[100:150]]
    data = bytes(range(250)) * 5000
    (tmp_path / "a.tar").write_bytes(data)
    digest = hashlib.sha256()
    part = Part(17, memoryview(bytearray(len(data) - 17)), digest)
    ShardBytes(LocalFileSystem(), str(tmp_path)).fill(entry(data), [part])
    assert bytes(part.into) == data[17:]
    assert digest.digest() == hashlib.sha256(data[17:]).digest(), "hashed in passing"
    (tmp_path / "a.tar").write_bytes(DATA)
    with pytest.raises(FetchError, match=r"^read: .*ends 5 bytes before"):
        filled(LocalFileSystem(), str(tmp_path), (len(DATA) - 5, 10))


def test_a_shard_is_downloaded_once_and_read_from_the_copy(remote: Remote, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10 * len(DATA))
    for _ in range(3):
        assert filled(remote, "/set", (5, 10), cache=cache) == [DATA[5:15]]
    assert remote.opened == 1
    assert not remote.asked
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [DATA]


def test_the_least_recently_used_copies_make_room(remote: Remote, tmp_path: Path) -> None:
    shards = [bytes([number]) * 1000 for number in range(4)]
    cache = ShardCache(tmp_path, 3000)
    for number, data in enumerate(shards[:3]):
        remote.pipe_file(f"/set/{number}.tar", data)
        kept = cache.path(remote, f"/set/{number}.tar", entry(data), lambda: None)
        assert kept is not None
        os.utime(kept, (number, number))
    (tmp_path / "left behind.part").write_bytes(bytes(500))
    os.utime(tmp_path / "left behind.part", (0, 0))
    assert cache.path(remote, "/set/0.tar", entry(shards[0]), lambda: None) is not None  # used now
    remote.pipe_file("/set/3.tar", shards[3])
    assert cache.path(remote, "/set/3.tar", entry(shards[3]), lambda: None) is not None
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{hashlib.sha256(shards[number]).hexdigest()}.tar" for number in (0, 2, 3)
    }
    assert cache.path(remote, "/set/a.tar", entry(), lambda: None) is None, "more than all the room there is"


def test_a_cache_in_trouble_costs_nothing_but_time(
    remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = ShardEntry("a.tar", len(DATA), hashlib.sha256(b"other").hexdigest(), 1)
    cache = ShardCache(tmp_path / "new", 10 * len(DATA))
    for _ in range(2):
        assert cache.path(remote, "/set/a.tar", other, lambda: None) is None
    assert remote.opened == 1, "not downloaded again for each clip"
    assert not list((tmp_path / "new").iterdir()), "what is not as promised is not kept"
    (tmp_path / "file").write_bytes(b"")
    assert filled(remote, "/set", (5, 10), cache=ShardCache(tmp_path / "file", 10**9)) == [DATA[5:15]]
    assert "takes no copy of a.tar" in caplog.text
    # Another process is downloading: the remote shard is read meanwhile.
    busy = tmp_path / "busy"
    busy.mkdir()
    with (busy / f"{entry().sha256}.part").open("wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        assert filled(remote, "/set", (5, 10), cache=ShardCache(busy, 10**9)) == [DATA[5:15]]
    assert filled(remote, "/set", (5, 10), cache=ShardCache(busy, 10**9)) == [DATA[5:15]]
    assert [path.suffix for path in busy.iterdir()] == [".tar"]


def _download(folder: Path, source: Path) -> bool:
    cache = ShardCache(folder, 4 * len(DATA))
    kept = cache.path(LocalFileSystem(), str(source), entry(), lambda: None)
    return kept is None or kept.read_bytes() == DATA


def test_many_processes_share_a_cache(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert all(pool.starmap(_download, [(tmp_path / "cache", tmp_path / "a.tar")] * 30))
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [DATA]
