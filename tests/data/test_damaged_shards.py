"""A hundred ways to damage an indexed data set: refused by name, or every sample read or counted as failed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from corpus import encode, moving_square, record, write_tar

from sora_train.config.root import ConfigError
from sora_train.data.index import open_dataset
from sora_train.data.index_writer import write_index
from sora_train.data.schema import MANIFEST_NAME, index_name

SHARDS = tuple(f"shard-{i:06d}.tar" for i in range(3))
NUM_DAMAGES = 100


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set, and one with the same names and other clips."""
    root = tmp_path_factory.mktemp("damage")
    made = []
    for which in range(2):
        folder = root / str(which)
        folder.mkdir()
        for i, shard in enumerate(SHARDS):
            members = {}
            for j in range(4 - which):
                frames = moving_square(3, 64, 64, seed=100 * which + 10 * i + j)
                members[f"c{i}{j}.mp4"] = encode(frames, root)
                members[f"c{i}{j}.json"] = record(frames, f"{which}{i}{j}").to_json().encode()
            write_tar(folder / shard, members)
        write_index(folder)
        made.append(folder)
    return made[0], made[1]


def media(folder: Path) -> dict[tuple[str, str], bytes]:
    dataset = open_dataset(folder)
    return {
        (entry.name, row.key): dataset.read(i, row.medium_offset, row.medium_size)
        for i, entry in enumerate(dataset.manifest.shards)
        for row in dataset.table(i).rows()
    }


def damage(folder: Path, other: Path, rng: np.random.Generator) -> str:
    """Damages one file of the folder; says how."""
    shard = SHARDS[rng.integers(len(SHARDS))]
    target = folder / [shard, index_name(shard), MANIFEST_NAME][rng.choice(3, p=[0.45, 0.35, 0.2])]
    kind = str(rng.choice(["flip", "flips", "cut", "grow", "delete", "swap", "stale", "zeros"]))
    data = bytearray(target.read_bytes())
    if kind in ("flip", "flips"):
        for place in rng.integers(len(data), size=1 if kind == "flip" else 50):
            data[place] ^= 1 << int(rng.integers(8))
        target.write_bytes(data)
    elif kind == "cut":
        target.write_bytes(data[: int(rng.integers(len(data)))])
    elif kind == "grow":
        target.write_bytes(data + rng.bytes(int(rng.integers(1, 5000))))
    elif kind == "zeros":
        start = int(rng.integers(len(data)))
        data[start : start + 700] = bytes(len(data[start : start + 700]))
        target.write_bytes(data)
    elif kind == "delete":
        target.unlink()
    elif kind == "stale" or target.name == MANIFEST_NAME:
        shutil.copy(other / target.name, target)
    else:
        partner = folder / target.name.replace(shard.removesuffix(".tar"), SHARDS[SHARDS.index(shard) - 1][:-4])
        target.write_bytes(partner.read_bytes())
        partner.write_bytes(data)
    return f"{kind} {target.name}"


def read_all(folder: Path, truth: dict[tuple[str, str], bytes]) -> tuple[int, int]:
    """(samples read, samples failed); raises ConfigError for a data set that is refused."""
    dataset = open_dataset(folder)
    expected, read, failed = dataset.manifest.num_samples, 0, 0
    for shard, entry in enumerate(dataset.manifest.shards):
        for row in dataset.table(shard).rows():
            try:
                data = dataset.read(shard, row.medium_offset, row.medium_size)
            except OSError:
                failed += 1
                continue
            if xxhash.xxh3_64_intdigest(data) != row.medium_xxh3:
                failed += 1
                continue
            read += 1
            assert data == truth[entry.name, row.key]
    assert expected == read + failed
    return read, failed


def test_expected_and_read_always_reconcile(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, other = folders
    truth = media(whole)
    assert read_all(whole, truth) == (12, 0)
    refused, with_failures, unharmed = [], [], []
    for seed in range(NUM_DAMAGES):
        folder = tmp_path / "shards"
        shutil.copytree(whole, folder)
        what = damage(folder, other, np.random.default_rng(seed))
        refusal = ""
        try:
            read, failed = read_all(folder, truth)
            assert read + failed == 12, what
            (with_failures if failed else unharmed).append(what)
        except ConfigError as error:
            refusal = str(error)
            refused.append(what)
        assert not refusal or "shard-" in refusal or MANIFEST_NAME in refusal, what
        # A tar is never the reason to refuse a run: only its own clips are lost.
        assert not refusal or not what.endswith(".tar"), f"{what}: {refusal}"
        shutil.rmtree(folder)
    assert min(len(refused), len(with_failures), len(unharmed)) >= 10
    # What changes nothing that is trained on: bytes of a tar that are no medium's, hashes that only verification reads.
    assert all(what.endswith((".tar", MANIFEST_NAME)) for what in unharmed), unharmed


def test_every_damage_of_a_tar_is_found_by_indexing_it_anew(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, _ = folders
    truth = media(whole)
    for seed in range(NUM_DAMAGES // 4):
        folder = tmp_path / "shards"
        shutil.copytree(whole, folder)
        for name in (MANIFEST_NAME, *map(index_name, SHARDS)):
            (folder / name).unlink()
        rng = np.random.default_rng(seed)
        target = folder / SHARDS[rng.integers(3)]
        data = bytearray(target.read_bytes())
        if seed % 2:
            del data[int(rng.integers(len(data))) :]
        else:
            for place in rng.integers(len(data), size=20):
                data[place] ^= 1 << int(rng.integers(8))
        target.write_bytes(data)
        manifest = write_index(folder, allow_rejects=True)
        dataset = open_dataset(folder)
        rows = {(e.name, row.key): row for i, e in enumerate(manifest.shards) for row in dataset.table(i).rows()}
        assert len(rows) == manifest.num_samples
        lost = set(truth) - set(rows)
        lines = (folder / "index_rejects.jsonl").read_text().splitlines() if lost else []
        assert bool(lines) == bool(lost), seed
        for i, entry in enumerate(manifest.shards):
            table = dataset.table(i)
            assert len(table) == entry.num_samples
            assert len(table) + entry.num_rejected <= 4
            if entry.name != target.name:
                assert (entry.num_samples, entry.num_rejected) == (4, 0)
        shutil.rmtree(folder)
