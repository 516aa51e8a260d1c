import tarfile
from pathlib import Path

import pytest
from corpus import encode, moving_square, record, write_tar

from sora_train.config.root import ConfigError
from sora_train.data.index import open_dataset
from sora_train.data.index_writer import write_index
from sora_train.data.schema import ClipRecord


def clip(folder: Path, source: str = "a") -> tuple[bytes, bytes]:
    frames = moving_square(3, 64, 64)
    return encode(frames, folder), record(frames, source).to_json().encode()


def test_rows_lead_to_the_bytes_of_each_member(shards: Path) -> None:
    dataset = open_dataset(shards)
    assert dataset.manifest.num_samples == 24
    row = dataset.table(2).row(1)
    found = ClipRecord.from_json(dataset.read(2, row.record_offset, row.record_size))
    assert row.key == "clip009"
    assert (row.num_frames, row.height, row.width) == (found.num_frames, found.height, found.width)
    assert dataset.read(2, row.medium_offset, row.medium_size)[4:8] == b"ftyp"
    assert [entry.num_bytes for entry in row.captions] == [len(item.text.encode()) for item in found.captions]


def test_the_index_is_reproducible(shards: Path) -> None:
    before = (shards / "dataset.json").read_bytes()
    write_index(shards)
    assert (shards / "dataset.json").read_bytes() == before


def test_a_folder_without_manifest_is_named_with_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no dataset.json: build it with `python -m data_pipelines.index"):
        open_dataset(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no \*.tar"):
        write_index(tmp_path)


def test_places_that_hold_no_data_set_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, message in ((tmp_path / "file", "holds no dataset.json"), ("nosuch://bucket/x", "Protocol not known")):
        with pytest.raises(ConfigError, match=f"data.shards={place}.*{message}"):
            open_dataset(place)


def test_a_truncated_tar_is_refused(tmp_path: Path) -> None:
    data, text = clip(tmp_path)
    shard = tmp_path / "shard-000000.tar"
    write_tar(shard, {"a.mp4": data, "a.json": text, "b.mp4": data, "b.json": text})
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        between = tar.getmember("b.mp4").offset  # where tarfile sees nothing amiss
    for size in (between, len(whole) // 2, 1024, 0):
        shard.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="truncated"):
            write_index(tmp_path)


def test_broken_samples_are_named(tmp_path: Path) -> None:
    data, text = clip(tmp_path)
    cases = {
        "one medium": {"a.mp4": data},
        "malformed or repeated key": {"a b.mp4": data, "a b.json": text},
        "a.json is": {"a.mp4": data, "a.json": b'{"captions": 3}'},
    }
    for message, members in cases.items():
        write_tar(tmp_path / "shard-000000.tar", members)
        with pytest.raises(ConfigError, match=message):
            write_index(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"height": 64', '"height": 0'),
        ('"height": 64', '"height": "64"'),
        ('"num_frames": 3', '"num_frames": 0'),
        ('"sha256": "', '"sha256": "x'),
        ('"text": "weak tag a"', '"text": null'),
    ],
)
def test_records_that_would_stop_training_are_named_by_the_index(old: str, new: str, tmp_path: Path) -> None:
    data, text = clip(tmp_path)
    broken = text.replace(old.encode(), new.encode(), 1)
    assert broken != text
    write_tar(tmp_path / "shard-000000.tar", {"a.mp4": data, "a.json": broken})
    with pytest.raises(ConfigError, match=r"a\.json is .*write the shard with"):
        write_index(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 9}'])
def test_a_manifest_that_is_none_is_refused_with_the_command_that_builds_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ConfigError, match=r"dataset\.json (is damaged|has format_version 9).*data_pipelines.index"):
        open_dataset(tmp_path)


def test_a_shard_that_changed_after_indexing_is_refused(tmp_path: Path) -> None:
    data, text = clip(tmp_path)
    write_tar(tmp_path / "shard-000000.tar", {"a.mp4": data, "a.json": text})
    write_index(tmp_path)
    write_tar(tmp_path / "shard-000000.tar", {"a.mp4": data * 30, "a.json": text})
    with pytest.raises(ConfigError, match="copy the shard again or rebuild the index"):
        open_dataset(tmp_path).table(0)
