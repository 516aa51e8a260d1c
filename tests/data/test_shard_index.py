import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
from corpus import encode, moving_square, record, write_tar

from sora_train.config.root import ConfigError
from sora_train.data.index import open_dataset
from sora_train.data.index_writer import write_index
from sora_train.data.schema import ClipRecord, DatasetManifest, ShardEntry


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


def test_what_curation_could_not_have_written_is_refused_by_name(tmp_path: Path) -> None:
    data, text = clip(tmp_path)
    shard = tmp_path / "shard-000000.tar"
    write_tar(shard, {"a.mp4": data, "a.json": text, "b.mp4": data, "b.json": text})
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        between = tar.getmember("b.mp4").offset  # where tarfile sees nothing amiss
    for size in (between, len(whole) // 2, 1024, 0):
        shard.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"shard-000000\.tar: .* is rejected, truncated_tar"):
            write_index(tmp_path)
        assert not (tmp_path / "dataset.json").exists()
    cases: dict[str, dict[str, bytes]] = {
        "b is rejected, missing_json": {"a.mp4": data, "a.json": text, "b.mp4": data},
        "a is rejected, no_medium": {"a.json": text},
        "a b is rejected, malformed_key": {"a b.mp4": data, "a b.json": text},
        "a is rejected, malformed_record": {"a.mp4": data, "a.json": b'{"captions": 3}'},
        "a is rejected, frame_count": {"a.mp4": data, "a.json": text.replace(b'"num_frames": 3', b'"num_frames": 4')},
        "a is rejected, frame_size": {"a.mp4": data, "a.json": text.replace(b'"height": 64', b'"height": 66')},
        "the tar is rejected, ignored_member": {"a.mp4": data, "a.json": text, "a.npy": b"x"},
    }
    for message, members in cases.items():
        write_tar(shard, members)
        with pytest.raises(ConfigError, match=message):
            write_index(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"height": 64', '"height": 0'),
        ('"height": 64', '"height": "64"'),
        ('"num_frames": 3', '"num_frames": 0'),
        ('"sha256": "', '"sha256": "x'),
        ('"sha256": "', '"sha256": "00'),
        ('"text": "weak tag a"', '"text": null'),
    ],
)
def test_records_that_would_stop_training_are_named_by_the_index(old: str, new: str, tmp_path: Path) -> None:
    data, text = clip(tmp_path)
    broken = text.replace(old.encode(), new.encode(), 1)
    assert broken != text
    write_tar(tmp_path / "shard-000000.tar", {"a.mp4": data, "a.json": broken})
    with pytest.raises(ConfigError, match=r"a is rejected, malformed_record"):
        write_index(tmp_path)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/a.tar", "a/./b.tar", "a.tar/../b.tar", "passwd", "pipe:cat a"])
def test_a_manifest_cannot_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    text = DatasetManifest((ShardEntry("a.tar", 10, "ab" * 32, 1),)).to_json()
    (tmp_path / "dataset.json").write_text(text.replace("a.tar", name))
    with pytest.raises(ConfigError, match=r"dataset\.json is damaged.*is no name of a tar"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ab" * 32, "../../etc/passwd"),
        ('"num_bytes": 10', '"num_bytes": -1'),
        ('"num_bytes": 10', '"num_bytes": "10"'),
        ('"num_samples": 1', '"num_samples": 1.0'),
        ('"name": "a.tar"', '"name": 5'),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_damaged(old: str, new: str, tmp_path: Path) -> None:
    text = DatasetManifest((ShardEntry("a.tar", 10, "ab" * 32, 1),)).to_json()
    assert old in text
    (tmp_path / "dataset.json").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=r"dataset\.json is damaged"):
        open_dataset(tmp_path)


def test_a_shard_stands_in_a_manifest_once(tmp_path: Path) -> None:
    entry = ShardEntry("a.tar", 10, "ab" * 32, 1)
    (tmp_path / "dataset.json").write_text(DatasetManifest((entry, entry)).to_json())
    with pytest.raises(ConfigError, match="names a shard twice"):
        open_dataset(tmp_path)


def test_a_data_set_inside_another_folder_is_not_written_over(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "inner")
    with pytest.raises(ConfigError, match="holds a data set of its own in inner"):
        write_index(tmp_path)


def test_a_manifest_whose_totals_are_not_its_sums_is_damaged(tmp_path: Path) -> None:
    text = DatasetManifest((ShardEntry("a.tar", 10, "ab" * 32, 7),)).to_json()
    (tmp_path / "dataset.json").write_text(text.replace('"num_samples": 7', '"num_samples": 8'))
    with pytest.raises(ConfigError, match="not the sums"):
        open_dataset(tmp_path)


def test_commands_are_never_run() -> None:
    for call in (open_dataset, write_index):
        with pytest.raises(ConfigError, match="commands are not run"):
            call("pipe:touch /tmp/never")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 9}'])
def test_a_manifest_that_is_none_is_refused_with_the_command_that_builds_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ConfigError, match=r"dataset\.json (is damaged|has format_version 9).*data_pipelines.index"):
        open_dataset(tmp_path)


def test_a_lost_tar_fails_its_clips_and_not_the_run(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    dataset = open_dataset(tmp_path / "shards")
    (tmp_path / "shards" / "shard-000001.tar").unlink()
    cut = tmp_path / "shards" / "shard-000002.tar"
    cut.write_bytes(cut.read_bytes()[: dataset.table(2).row(2).medium_offset + 5])
    for shard, error in ((1, FileNotFoundError), (2, OSError)):
        row = dataset.table(shard).row(2)
        with pytest.raises(error, match=f"shard-00000{shard}"):
            dataset.read(shard, row.medium_offset, row.medium_size)
    row = dataset.table(2).row(0)
    assert len(dataset.read(2, row.medium_offset, row.medium_size)) == row.medium_size


def test_an_index_of_another_shard_or_time_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    first, second = (folder / f"shard-00000{i}.index.safetensors" for i in range(2))
    good = first.read_bytes()
    for damaged in (second.read_bytes(), good[:-1], bytes([good[0] ^ 1]) + good[1:], good[:-9] + b"\x01" + good[-8:]):
        first.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"shard-000000\.index\.safetensors is damaged or not the one"):
            open_dataset(folder).table(0)
    first.unlink()
    with pytest.raises(ConfigError, match=r"shard-000000\.index\.safetensors cannot be read \(No such file"):
        open_dataset(folder).table(0)
    with pytest.raises(ConfigError, match="cannot be read"):
        list(open_dataset(folder).tables(range(6)))


def test_opening_reads_no_shard(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_bytes((shards / "dataset.json").read_bytes())
    assert open_dataset(tmp_path).manifest.num_samples == 24


def test_many_tables_come_in_the_order_asked_for(shards: Path) -> None:
    dataset = open_dataset(shards)
    wanted = [5, 0, 3, 3, *[i % 6 for i in range(200)]]
    found = [table.rows() for table in dataset.tables(wanted)]
    assert found == [dataset.table(i).rows() for i in wanted]


def test_a_data_set_travels_to_processes_without_its_tables(shards: Path) -> None:
    dataset = open_dataset(shards)
    before = len(pickle.dumps(dataset))
    rows = dataset.table(0).rows()
    assert len(pickle.dumps(dataset)) == before
    assert pickle.loads(pickle.dumps(dataset)).table(0).rows() == rows
