"""Packs of what was made in advance: latents and text rows of any numbers, beside videos; captions of any origin."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import CODEC, MODEL, data_config, encode, moving_square, record, write_tar
from torch import Tensor

from sora_train.config.data import DatasetConfig, SizeConfig
from sora_train.config.diffusion import TimestepConfig
from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.root import ConfigError
from sora_train.data.index_writer import write_index
from sora_train.data.loader import Loader, Pack, build_loader
from sora_train.data.precomputed import latents_member, text_member

VAE, T5 = "wavelet-1", "t5-1"
ROWS = replace(MODEL, text=TextConfig(kind=TextKind.encoder, width=16))
NUMBERS = (torch.float32, torch.bfloat16, torch.float16)


def latents_of(i: int) -> Tensor:
    """Of 9 frames of 64 x 80, stored longer for some."""
    generator = torch.Generator().manual_seed(i)
    frames = 5 if i % 4 else 9
    return torch.randn(96, frames, 16, 20, generator=generator).to(NUMBERS[i % 3])


def rows_of(i: int, caption: int) -> Tensor:
    return torch.randn(3 + caption, 16, generator=torch.Generator().manual_seed(100 + 2 * i + caption))


def shifted_by_one(member: bytes) -> bytes:
    """As a writer who does not align: the tensors begin at an odd byte."""
    size = int.from_bytes(member[:8], "little")
    return (size + 1).to_bytes(8, "little") + member[8 : 8 + size] + b" " + member[8 + size :]


def write_mixed(folder: Path, with_text: bool = True) -> Path:
    """clip0 to clip11: latents, every third a video; text rows for all."""
    members = {}
    for i in range(12):
        frames = moving_square(9, 64, 80, seed=i)
        if i % 3 == 2:
            members[f"clip{i}.mp4"] = encode(frames, folder)
        else:
            stored = latents_of(i)
            pixels = 1 + (stored.shape[1] - 1) * CODEC.temporal_ratio
            member = latents_member(stored, VAE, pixels, 64, 80, 8.0)
            members[f"clip{i}.latents.safetensors"] = shifted_by_one(member) if i % 2 else member
            frames = moving_square(pixels, 64, 80, seed=i)
        members[f"clip{i}.json"] = record(frames, f"source{i}").to_json().encode()
        if with_text:
            rows = text_member([rows_of(i, 0), rows_of(i, 1)], T5, torch.zeros(1, 16) if i % 4 else None)
            members[f"clip{i}.text.safetensors"] = shifted_by_one(rows) if i % 2 else rows
    shards = folder / "shards"
    shards.mkdir()
    write_tar(shards / "shard-000000.tar", members)
    write_index(shards)
    return shards


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed(tmp_path_factory.mktemp("mixed"))


def loader_of(
    folder: Path, model: ModelConfig = ROWS, codec: str | None = VAE, text: str | None = T5, **changes: Any
) -> Loader:
    # Clips that are stored longer are planned shorter.
    size = SizeConfig(max_pixels=8960, max_frames=9, sampling_fps=8.0)
    config = replace(data_config(folder), **{"size": size, "held_out_fraction": 0.0, **changes})
    return build_loader(
        config, model, CODEC, TimestepConfig(), 3, 0, 1, codec_identity=codec, text_identity=text
    )


@pytest.fixture(params=[0, 1])
def packs(request: pytest.FixtureRequest, mixed: Path) -> Iterator[list[Pack]]:
    loader = loader_of(mixed, workers=request.param)
    yield [pack for step in range(6) for pack in loader.packs(step)]
    loader.close()


def test_latents_and_rows_come_as_they_are_stored(packs: list[Pack]) -> None:
    seen = set()
    for pack in packs:
        assert not pack.failures
        for n, sample in enumerate(pack.samples):
            i = int(sample.row.key.removeprefix("clip"))
            frames, latents, text = pack.frames[n], pack.latents[n], pack.text[n]
            if i % 3 == 2:
                assert latents is None
                assert frames is not None
                assert frames.shape == (9, 64, 80, 3)
            else:
                assert frames is None
                assert latents is not None
                assert latents.dtype == NUMBERS[i % 3]
                assert latents.shape == sample.latent_shape == (96, 5, 16, 20)
                assert torch.equal(latents, latents_of(i)[:, :5])
            if sample.caption is not None:
                assert isinstance(text, Tensor)
                assert torch.equal(text, rows_of(i, sample.caption))
            elif i % 4:
                assert isinstance(text, Tensor)
                assert torch.equal(text, torch.zeros(1, 16))
            else:
                assert text == ""
            assert pack.noise[n].shape == sample.latent_shape
            seen.add((i % 3, sample.caption is None))
    assert len(seen) == 6


def test_what_was_made_by_another_encoder_is_refused(mixed: Path) -> None:
    with pytest.raises(ConfigError, match=r"latents made by wavelet-1, the run's codec is wavelet-2"):
        loader_of(mixed, codec="wavelet-2")
    with pytest.raises(ConfigError, match=r"text rows made by t5-1, the run's text_encoder is None"):
        loader_of(mixed, text=None)
    with pytest.raises(ConfigError, match=r"model\.text\.kind=bytes reads captions"):
        loader_of(mixed, model=MODEL)


def overwrite(shards: Path, key: str, what: str, data: bytes) -> None:
    """Puts other bytes where a member begins."""
    table = loader_of(shards).order.datasets[0].table(0)
    row = next(row for row in table.rows() if row.key == key)
    offset = {"medium": row.medium_offset, "record": row.record_offset, "text": row.text_offset}[what]
    with (shards / "shard-000000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("key", "what", "data", "reason"),
    [
        ("clip0", "medium", b"x", "hash"),
        ("clip1", "text", b"\xff" * 8, "record"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_member_costs_its_sample(
    tmp_path: Path, key: str, what: str, data: bytes, reason: str, workers: int
) -> None:
    shards = write_mixed(tmp_path)
    overwrite(shards, key, what, data)
    loader = loader_of(shards, workers=workers, tokens_per_step=4800)  # all of them
    packs = list(loader.packs(0))
    loader.close()
    failures = {failure.key: failure.reason for pack in packs for failure in pack.failures}
    assert failures == {key: reason}
    (pack,) = [pack for pack in packs if pack.failures]
    number = [sample.row.key for sample in pack.samples].index(key)
    lost = pack.latents[number]
    assert lost is not None
    assert lost.shape == (96, 5, 16, 20)
    assert not lost.any()
    assert not pack.noise[number].any()
    assert pack.text[number] == ""
    assert pack.weight.sum() == len(pack.samples) - 1


def test_a_record_that_changed_since_it_was_indexed_is_told_by_its_own_word(tmp_path: Path) -> None:
    shards = write_mixed(tmp_path, with_text=False)
    model = replace(MODEL, text=TextConfig())
    for key, data in (("clip0", b"\xff\xfe"), ("clip1", b"{]"), ("clip3", b'{"x": 1}')):
        overwrite_without_text(shards, key, data)
    captions = replace(data_config(shards).captions, dropout=0.0)
    loader = loader_of(shards, model=model, captions=captions, tokens_per_step=4800)
    failures = {f.key: f.reason for pack in loader.packs(0) for f in pack.failures}
    assert failures == dict.fromkeys(("clip0", "clip1", "clip3"), "malformed_record")


def overwrite_without_text(shards: Path, key: str, data: bytes) -> None:
    table = loader_of(shards, model=MODEL).order.datasets[0].table(0)
    row = next(row for row in table.rows() if row.key == key)
    with (shards / "shard-000000.tar").open("r+b") as file:
        file.seek(row.record_offset)
        file.write(data.ljust(row.record_size) if data[:1] == b"{" else data)


def test_captions_of_shards_made_elsewhere(tmp_path: Path) -> None:
    frames = moving_square(9, 64, 80)
    shards = tmp_path / "shards"
    shards.mkdir()
    video = encode(frames, tmp_path)
    write_tar(shards / "x.tar", {"a.mp4": video, "a.txt": b"a kite\x00\x1b"})
    foreign = json.dumps({"caption": "a boat\nat sea", "url": "x"}).encode()
    write_tar(shards / "y.tar", {"b.mp4": video, "b.json": foreign})
    write_tar(shards / "z.tar", {"c.mp4": video})
    write_index(shards)
    captions = replace(data_config(shards).captions, dropout=0.0)
    loader = loader_of(shards, model=MODEL, captions=captions)
    packs = [pack for step in range(3) for pack in loader.packs(step)]
    assert not [failure for pack in packs for failure in pack.failures]
    texts = {s.row.key: text for pack in packs for s, text in zip(pack.samples, pack.text, strict=True)}
    assert texts == {"a": "a kite", "b": "a boat\nat sea", "c": ""}


def test_shards_of_one_name_in_two_data_sets_are_told_apart(tmp_path: Path) -> None:
    sets = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sets[name] = DatasetConfig(str(write_mixed(tmp_path / name, with_text=False)))
    (tmp_path / "two" / "shards" / "shard-000000.tar").unlink()
    loader = loader_of(Path(), model=MODEL, shards="", datasets=sets)
    failures = {f.shard: f.reason for step in range(2) for pack in loader.packs(step) for f in pack.failures}
    assert failures == {"two/shard-000000.tar": "missing_shard"}
    masked = {0: frozenset((failure.shard, failure.key) for pack in loader.packs(0) for failure in pack.failures)}
    loader.masked = masked
    assert not [failure for pack in loader.packs(0) for failure in pack.failures]
    weights = [float(weight) for pack in loader.packs(0) for weight in pack.weight]
    assert weights.count(0.0) == len(masked[0])
    assert weights.count(1.0) > 0
