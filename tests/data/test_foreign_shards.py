"""Shards made elsewhere: every form of them, and everything that can be wrong with a sample."""

import json
import shutil
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import xxhash
from corpus import moving_square, record, tar_bytes, write_tar
from media import audio, clip, image

from sora_train.config.root import ConfigError
from sora_train.data.caption_text import read_captions
from sora_train.data.index import Dataset, open_dataset
from sora_train.data.index_writer import write_index
from sora_train.data.precomputed import latents_member, read_latents, read_text, text_member
from sora_train.data.scan import split_name
from sora_train.data.schema import CaptionsIn, IndexRow

VIDEO = clip(5, 64, 80)
OTHER = clip(5, 64, 80, seed=1)
LATENTS = latents_member(torch.ones(16, 2, 8, 10), "vae-1", 5, 64, 80, 8.0)
LATENTS_OF_NONE = latents_member(torch.full((16, 2, 8, 10), torch.nan), "vae-1", 5, 64, 80, 8.0)
Members = Mapping[str, bytes] | Sequence[tuple[str, bytes]]


def index(folder: Path, members: Members, caption_fields: Sequence[str] = ("caption", "text")) -> Dataset:
    """Two whole samples of their own beside the members in question."""
    write_tar(folder / "a.tar", members)
    write_tar(folder / "b.tar", {"x.mp4": VIDEO, "x.txt": b"a", "y.mp4": OTHER, "y.txt": b"b"})
    write_index(folder, caption_fields, allow_rejects=True)
    return open_dataset(folder)


def rejects(folder: Path, *, samples: bool = True) -> list[tuple[str, str]]:
    path = folder / "index_rejects.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert all(line["shard"] == "a.tar" and line["detail"] for line in lines)
    return [(line["key"], line["reason"]) for line in lines if line["is_sample"] == samples]


def texts(dataset: Dataset, row: IndexRow) -> list[str]:
    member = dataset.read(0, row.record_offset, row.record_size)
    return [item.text for item in read_captions(member, row.captions_in, dataset.manifest.caption_fields)]


def check_reconciles(dataset: Dataset, folder: Path, num_samples: int) -> None:
    entry = dataset.manifest.shards[0]
    assert entry.num_samples == len(dataset.table(0))
    assert entry.num_rejected == len(rejects(folder))
    assert entry.num_samples + entry.num_rejected == num_samples
    for row in dataset.table(0).rows():
        assert xxhash.xxh3_64_intdigest(dataset.read(0, row.medium_offset, row.medium_size)) == row.medium_xxh3


FORMS: dict[str, tuple[Members, CaptionsIn, list[str]]] = {
    "mp4 and txt": ({"a.mp4": VIDEO, "a.txt": b"a cube\n"}, CaptionsIn.text, ["a cube"]),
    "mp4 and json": ({"a.json": b'{"caption": "a cube", "n": 1}', "a.mp4": VIDEO}, CaptionsIn.field, ["a cube"]),
    "the second caption field": ({"a.mp4": VIDEO, "a.json": b'{"text": "a cube"}'}, CaptionsIn.field, ["a cube"]),
    "json without caption, txt": ({"a.mp4": VIDEO, "a.json": b'{"n": 1}', "a.txt": b"b"}, CaptionsIn.text, ["b"]),
    "json with caption, and txt": (
        {"a.mp4": VIDEO, "a.json": b'{"caption": "c"}', "a.txt": b"b"},
        CaptionsIn.field,
        ["c"],
    ),
    "jpg and txt": ({"a.jpg": image(48, 64, "jpg"), "a.txt": b"a"}, CaptionsIn.text, ["a"]),
    "png, in capitals": ({"a.PNG": image(48, 64, "png"), "a.TXT": b"a"}, CaptionsIn.text, ["a"]),
    "webp": ({"a.webp": image(48, 64, "webp")}, CaptionsIn.nowhere, []),
    "a medium alone": ({"a.mp4": VIDEO}, CaptionsIn.nowhere, []),
    "in a folder": ({"./a.v1/b": b"", "./d/a.mp4": VIDEO, "./d/a.txt": b"a"}, CaptionsIn.text, ["a"]),
    "ours": (
        {"a.mp4": VIDEO, "a.json": record(np.zeros((5, 64, 80, 3)), "s").to_json().encode()},
        CaptionsIn.record,
        ["weak tag s", "a square s"],
    ),
    "latents": ({"a.latents.safetensors": LATENTS, "a.txt": b"a"}, CaptionsIn.text, ["a"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_shard_is_read(form: str, tmp_path: Path) -> None:
    members, captions_in, captions = FORMS[form]
    dataset = index(tmp_path, members)
    row = dataset.table(0).row(0)
    assert row.key in ("a", "d/a")
    assert row.captions_in is captions_in
    assert texts(dataset, row) == captions
    assert [entry.num_bytes for entry in row.captions] == [len(text) for text in captions]
    check_reconciles(dataset, tmp_path, 2 if form == "in a folder" else 1)


def test_facts_come_from_the_medium(tmp_path: Path) -> None:
    members = {"v.mp4": VIDEO, "p.jpg": image(48, 64, "jpg"), "l.latents.safetensors": LATENTS}
    video, picture, latents = index(tmp_path, members).table(0).rows()
    assert (video.num_frames, video.height, video.width, video.latent_shape) == (5, 64, 80, None)
    assert video.duration_seconds == pytest.approx(5 / video.fps)
    assert (picture.num_frames, picture.fps, picture.height, picture.width) == (1, 0.0, 48, 64)
    assert (latents.num_frames, latents.fps, latents.height, latents.width) == (5, 8.0, 64, 80)
    assert (latents.latent_shape, latents.duration_seconds) == ((16, 2, 8, 10), 5 / 8)


def test_a_medium_without_known_source_is_its_own(tmp_path: Path) -> None:
    """So that copies of a file are held out together."""
    members = {"a.mp4": VIDEO, "copy.mp4": VIDEO, "b.mp4": OTHER}
    first, copy, other = (row.source_sha256 for row in index(tmp_path, members).table(0).rows())
    assert first == copy == sha256(VIDEO).hexdigest() != other
    ours = record(np.zeros((5, 64, 80, 3)), "s")
    (row,) = index(tmp_path, {"a.mp4": VIDEO, "a.json": ours.to_json().encode()}).table(0).rows()
    assert row.source_sha256 == ours.source.sha256


def test_rows_of_text_and_encoders_are_found(tmp_path: Path) -> None:
    rows = text_member([torch.ones(3, 8)], "t5-1", empty=torch.zeros(1, 8))
    members = {"a.latents.safetensors": LATENTS, "a.txt": b"a", "a.text.safetensors": rows}
    dataset = index(tmp_path, members)
    assert (dataset.manifest.encoders, dataset.manifest.text_encoders) == (("vae-1",), ("t5-1",))
    row = dataset.table(0).row(0)
    assert read_latents(dataset.read(0, row.medium_offset, row.medium_size)).shape == row.latent_shape
    found = read_text(dataset.read(0, row.text_offset, row.text_size))
    assert torch.equal(found.captions[0], torch.ones(3, 8))
    plain = index(tmp_path, {"a.mp4": VIDEO}).manifest
    assert (plain.encoders, plain.text_encoders) == ((), ())


RECORD = record(moving_square(5, 64, 80), "s").to_json().encode()
# Members of a sample with trouble, its key and the reason.
BAD: dict[str, tuple[Members, str, str]] = {
    "duplicate key": ([("a.mp4", OTHER), ("a.txt", b"a"), ("a.mp4", OTHER), ("a.txt", b"b")], "a", "duplicate_key"),
    "key with a dot": ({"clip.v2.mp4": OTHER, "clip.v2.txt": b"a"}, "clip.v2", "dotted_key"),
    "malformed key": ({"ä ö.mp4": OTHER, "ä ö.txt": b"a"}, "ä ö", "malformed_key"),
    "a key without end": ({f"{'k' * 3000}.mp4": OTHER}, "k" * 600, "malformed_key"),
    "no medium": ({"bad.txt": b"a"}, "bad", "no_medium"),
    "two media": ({"bad.mp4": OTHER, "bad.jpg": image(48, 64, "jpg"), "bad.txt": b"a"}, "bad", "two_media"),
    "zero bytes": ({"bad.mp4": b"", "bad.txt": b"a"}, "bad", "zero_bytes"),
    "sound alone": ({"bad.mp4": audio(), "bad.txt": b"a"}, "bad", "no_video"),
    "no moov": ({"bad.mp4": OTHER.replace(b"moov", b"junk"), "bad.txt": b"a"}, "bad", "decode"),
    "not a video": ({"bad.mp4": b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n", "bad.txt": b"a"}, "bad", "decode"),
    "an image of nothing": ({"bad.jpg": b"\xff\xd8\xff", "bad.txt": b"a"}, "bad", "decode"),
    "missing txt": ({"bad.mp4": OTHER}, "bad", "missing_text"),
    "malformed json": ({"bad.mp4": OTHER, "bad.json": b"{'caption': 1}"}, "bad", "malformed_json"),
    "json of another kind": ({"bad.mp4": OTHER, "bad.json": b"[]"}, "bad", "malformed_json"),
    "json without end": ({"bad.mp4": OTHER, "bad.json": b"[" * 10**6}, "bad", "malformed_json"),
    "json without caption": ({"bad.mp4": OTHER, "bad.json": b'{"title": "a"}'}, "bad", "no_caption_field"),
    "malformed record": ({"bad.mp4": OTHER, "bad.json": b'{"captions": 3}'}, "bad", "malformed_record"),
    "a record of another clip": (
        {"bad.mp4": OTHER, "bad.json": RECORD.replace(b'"num_frames": 5', b'"num_frames": 6')},
        "bad",
        "frame_count",
    ),
    "a record of another size": (
        {"bad.mp4": OTHER, "bad.json": RECORD.replace(b'"width": 80', b'"width": 82')},
        "bad",
        "frame_size",
    ),
    "txt not in UTF-8": ({"bad.mp4": OTHER, "bad.txt": b"caf\xe9"}, "bad", "not_utf8"),
    "json not in UTF-8": ({"bad.mp4": OTHER, "bad.json": b'{"caption": "caf\xe9"}'}, "bad", "not_utf8"),
    "a text of 5 MB": ({"bad.mp4": OTHER, "bad.txt": b"a" * (5 << 20)}, "bad", "too_large"),
    "latents of nothing": ({"bad.latents.safetensors": LATENTS[:100], "bad.txt": b"a"}, "bad", "malformed_latents"),
    "latents of no numbers": (
        {"bad.latents.safetensors": LATENTS_OF_NONE, "bad.txt": b"a"},
        "bad",
        "not_finite",
    ),
    "rows of no numbers": (
        {"bad.mp4": OTHER, "bad.txt": b"a", "bad.text.safetensors": text_member([torch.full((1, 2), torch.inf)], "t")},
        "bad",
        "not_finite",
    ),
    "rows for other captions": (
        {"bad.mp4": OTHER, "bad.txt": b"a", "bad.text.safetensors": text_member([torch.ones(1, 2)] * 2, "t")},
        "bad",
        "malformed_text_rows",
    ),
    "code": ({"bad.pyd": b"import os; os.abort()", "bad.txt": b"a"}, "bad", "no_medium"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_named_and_move_nobody(case: str, tmp_path: Path) -> None:
    members, key, reason = BAD[case]
    pairs = list(members.items()) if isinstance(members, Mapping) else list(members)
    good = [("good.mp4", VIDEO), ("good.txt", b"a"), ("other.mp4", OTHER), ("other.txt", b"b")]
    dataset = index(tmp_path, [*good[:2], *pairs, *good[2:]])
    assert rejects(tmp_path) == [(key, reason)]
    kept = ["good", "a", "other"] if case == "duplicate key" else ["good", "other"]
    assert [row.key for row in dataset.table(0).rows()] == kept
    check_reconciles(dataset, tmp_path, len(kept) + 1)
    alone = index(tmp_path, good).table(0)
    assert rejects(tmp_path) == []  # the ledger of the run before is gone
    for row in alone.rows():
        i = kept.index(row.key)
        found = dataset.table(0).row(i) if i >= 0 else row
        assert (found.medium_xxh3, found.captions) == (row.medium_xxh3, row.captions)


def test_a_json_that_others_have_is_missed(tmp_path: Path) -> None:
    dataset = index(tmp_path, {"a.mp4": VIDEO, "a.json": RECORD, "bad.mp4": OTHER})
    assert rejects(tmp_path) == [("bad", "missing_json")]
    check_reconciles(dataset, tmp_path, 2)


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pt", "npy", "cls", "seg.npz"])
def test_members_of_other_kinds_are_counted_and_never_opened(suffix: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."  # runs when it is unpickled
    members = {"a.mp4": VIDEO, "a.txt": b"a", f"a.{suffix}": code, "b.mp4": OTHER, "b.txt": b"b", f"b.{suffix}": code}
    dataset = index(tmp_path, members)
    check_reconciles(dataset, tmp_path, 2)
    assert rejects(tmp_path) == []
    assert rejects(tmp_path, samples=False) == [("", "ignored_member")]
    assert "2 members" in (tmp_path / "index_rejects.jsonl").read_text()
    assert not mark.exists()


def test_an_annotation_beside_a_sample_is_no_sample_with_a_dot(tmp_path: Path) -> None:
    members = {"a.mp4": VIDEO, "a.txt": b"a", "a.mask.png": image(48, 64, "png"), "._a.mp4": b"of a Mac"}
    dataset = index(tmp_path, members)
    check_reconciles(dataset, tmp_path, 1)
    assert rejects(tmp_path, samples=False) == [("", "ignored_member")] * 2


@pytest.mark.parametrize(
    ("text", "size", "notes"),
    [(b"", 0, 0), (b" \n\x00", 0, 0), (b"a\x00\x1b[2J", 6, 0), (b"a" * 2**20, 0, 1), (b"a" * 2**16, 2**16, 0)],
)
def test_odd_captions_keep_their_clip(text: bytes, size: int, notes: int, tmp_path: Path) -> None:
    dataset = index(tmp_path, {"a.mp4": VIDEO, "a.txt": text})
    (row,) = dataset.table(0).rows()
    assert [entry.num_bytes for entry in row.captions] == [size]
    assert [len(text) for text in texts(dataset, row)] == [size]
    assert rejects(tmp_path, samples=False) == [("a", "caption_too_long")] * notes
    check_reconciles(dataset, tmp_path, 1)


def test_what_stands_before_a_cut_is_kept(tmp_path: Path) -> None:
    samples = [(f"{key}.{suffix}", data) for key in "abc" for suffix, data in (("mp4", VIDEO), ("txt", b"t"))]
    whole = tar_bytes(samples)
    (tmp_path / "whole").mkdir()
    rows = index(tmp_path / "whole", samples).table(0).rows()
    shutil.rmtree(tmp_path / "whole")
    ends = rows[2].record_offset + 512
    cuts = {
        rows[1].medium_offset + 100: ["a"],  # in the medium of b
        rows[1].record_offset: ["a"],  # in the text of b
        rows[1].record_offset - 512: ["a"],  # between them: b would pass for one without a caption
        rows[2].medium_offset - 200: ["a", "b"],  # in the header of c
        ends: ["a", "b", "c"],  # before the end-of-archive mark
    }
    for cut, kept in cuts.items():
        write_tar(tmp_path / "a.tar", [])
        dataset = index_bytes(tmp_path, whole[:cut])
        assert [row.key for row in dataset.table(0).rows()] == kept, cut
        assert {reason for _, reason in rejects(tmp_path)} <= {"truncated_tar"}
        assert rejects(tmp_path, samples=False) == [("", "truncated_tar")]
        check_reconciles(dataset, tmp_path, len(kept) + len(rejects(tmp_path)))
    broken = whole[: rows[1].medium_offset - 400] + b"\xff" + whole[rows[1].medium_offset - 399 :]
    dataset = index_bytes(tmp_path, broken)
    assert [row.key for row in dataset.table(0).rows()] == []
    assert rejects(tmp_path, samples=False) == [("", "damaged_tar")]
    zeroed = whole[: rows[1].medium_offset - 512] + bytes(512) + whole[rows[1].medium_offset :]
    index_bytes(tmp_path, zeroed)
    assert rejects(tmp_path, samples=False) == [("", "damaged_tar")]  # looks like an end, and more follows


def index_bytes(folder: Path, data: bytes) -> Dataset:
    (folder / "a.tar").write_bytes(data)
    write_tar(folder / "b.tar", {"x.mp4": VIDEO, "x.txt": b"a"})
    write_index(folder, allow_rejects=True)
    return open_dataset(folder)


@pytest.mark.parametrize("data", [b"", b"x" * 5000, b"\x1f\x8b" + bytes(3000), bytes(10240), bytes(100)])
def test_a_file_that_is_no_tar_is_noted(data: bytes, tmp_path: Path) -> None:
    dataset = index_bytes(tmp_path, data)
    assert len(dataset.table(0)) == 0
    assert len(dataset.table(1)) == 1
    assert rejects(tmp_path) == []
    assert len(rejects(tmp_path, samples=False)) == (data != bytes(10240))  # which is an empty tar


def test_a_data_set_without_a_good_sample_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.mp4": b"", "b.mp4": b"x"})
    with pytest.raises(ConfigError, match=r"none of 2 samples in 1 tars can be indexed, the first for zero_bytes"):
        write_index(tmp_path, allow_rejects=True)
    assert not (tmp_path / "dataset.json").exists()
    assert len(rejects(tmp_path)) == 2


def test_links_are_not_followed(tmp_path: Path) -> None:
    import io
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.mp4")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    index_bytes(tmp_path, file.getvalue())
    assert rejects(tmp_path) == [("link2", "no_medium"), ("link1", "no_medium")]


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_urls_are_read_and_written(protocol: str, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}" if protocol == "memory" else f"file://{tmp_path}"
    with fsspec.open(f"{url}/sub/deep/a.tar", "wb", auto_mkdir=True) as file:
        file.write(tar_bytes({"a.mp4": VIDEO, "a.txt": b"a", "b.mp4": b"", "b.txt": b"b"}))
    with fsspec.open(f"{url}/.hidden/b.tar", "wb", auto_mkdir=True) as file:
        file.write(b"of unfinished work")
    manifest = write_index(url, allow_rejects=True)
    assert [(entry.name, entry.num_samples, entry.num_rejected) for entry in manifest.shards] == [
        ("sub/deep/a.tar", 1, 1)
    ]
    dataset = open_dataset(url)
    (row,) = dataset.table(0).rows()
    assert dataset.read(0, row.medium_offset, row.medium_size) == VIDEO
    with fsspec.open(f"{url}/index_rejects.jsonl") as file:
        assert json.loads(file.read())["reason"] == "zero_bytes"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.mp4", ("a", "mp4", False)),
        ("a/b.json", ("a/b", "json", False)),
        ("a.b/c.mp4", ("a.b/c", "mp4", False)),
        ("./a.latents.safetensors", ("a", "latents.safetensors", False)),
        ("a.b.latents.safetensors", ("a.b", "latents.safetensors", True)),
        ("a.b.MP4", ("a.b", "mp4", True)),
        ("a.tar.gz", ("a", "tar.gz", False)),
        ("a", ("a", "", False)),
        (".a.mp4", ("", "a.mp4", False)),
    ],
)
def test_names_are_split_at_the_first_dot_of_the_last_part(name: str, parts: tuple[str, str, bool]) -> None:
    assert split_name(name) == parts
