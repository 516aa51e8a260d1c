"""Totals are kept between starts, and a cache that is of no use costs time alone."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpus import CODEC, MODEL, data_config
from simulated import Simulated

from sora_train.config.data import Media, SizeConfig
from sora_train.config.root import ConfigError
from sora_train.data.order import Order
from sora_train.data.selection import Selection
from sora_train.data.size import Stride
from sora_train.data.totals import Rule, Totals, cache_path, load_totals

RULE = Rule(SizeConfig(64 * 64, 17, 8.0), Stride(2, 8, 8), Selection(0.1))


def load(dataset: Simulated, folder: Path | str, rule: Rule = RULE) -> Totals:
    return load_totals(dataset, rule, str(folder))  # type: ignore[arg-type]


def assert_same(one: Totals, other: Totals) -> None:
    assert one.longest == other.longest
    for name in ("tokens", "clips", "held_out", "extent"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


def test_totals_are_sums_over_the_clips() -> None:
    totals = load(Simulated(30, 12), "/nowhere")
    assert (totals.clips + totals.held_out == 12).all()
    assert totals.held_out.sum() > 0
    order = Order({"main": Simulated(30, 12)}, data_config(Path("x")), MODEL, CODEC, 0)  # type: ignore[dict-item]
    (shuffle,) = order.shuffles.values()
    clips = list(shuffle.clips(0, shuffle.epoch_tokens))
    for shard in range(30):
        mine = [clip for clip in clips if clip.shard == shard]
        assert (totals.tokens[shard], totals.clips[shard]) == (sum(clip.num_tokens for clip in mine), len(mine))
        extents = [clip.row.num_frames * clip.row.height * clip.row.width for clip in mine]
        assert totals.extent[shard] == pytest.approx(np.mean(extents))
    assert totals.longest is not None
    assert (totals.longest.num_tokens, totals.longest.num_frames) == (9 * 64, 17)


def test_a_second_start_opens_no_index_but_those_of_its_step(tmp_path: Path) -> None:
    config = data_config(Path("x"), cache_dir=str(tmp_path / "cache"))
    build = lambda dataset: Order({"main": dataset}, config, MODEL, CODEC, 0)  # noqa: E731
    first, second = Simulated(600, 12), Simulated(600, 12)
    batch = build(first).batch(3)
    assert len(first.loads) > 600
    order = build(second)
    assert second.loads == []
    assert order.batch(3) == batch
    assert len(second.loads) <= 256
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"], "nothing half-written"


@pytest.mark.parametrize(
    "other",
    [
        replace(RULE, size=SizeConfig(64 * 64, 9, 8.0)),
        replace(RULE, stride=Stride(2, 8, 16)),
        replace(RULE, selection=Selection(0.2)),
        replace(RULE, selection=Selection(0.1, Media.video)),
    ],
)
def test_another_rule_has_totals_of_its_own(tmp_path: Path, other: Rule) -> None:
    one, two = load(Simulated(30, 12), tmp_path), load(Simulated(30, 12), tmp_path, other)
    assert one.tokens.sum() != two.tokens.sum()
    assert len(list(tmp_path.iterdir())) == 2


def test_another_data_set_has_totals_of_its_own(tmp_path: Path) -> None:
    dataset = Simulated(30, 12)
    shards = dataset.manifest.shards
    digest = "a" * 64
    changes: list[dict[str, object]] = [{"sha256": digest}, {"index_sha256": digest}]
    changes += [{"num_bytes": 1}, {"name": "other.tar"}, {"num_samples": 11}]
    manifests = [
        dataset.manifest,
        *(replace(dataset.manifest, shards=(*shards[:-1], replace(shards[-1], **change))) for change in changes),  # type: ignore[arg-type]
    ]
    assert len({cache_path(manifest, RULE, "") for manifest in manifests}) == len(manifests)


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0[1, 2, 3", b"x" * 999, None])
def test_a_damaged_file_is_computed_again(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load(Simulated(30, 12), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        assert_same(load(Simulated(30, 12), tmp_path), whole)
    assert len(caplog.records) == 1
    assert "not readable" in caplog.text
    dataset = Simulated(30, 12)
    assert_same(load(dataset, tmp_path), whole)
    assert dataset.loads == [], "it was put right"


def test_of_another_number_of_shards_is_computed_again(tmp_path: Path) -> None:
    load(Simulated(20, 12), tmp_path)
    (path,) = tmp_path.iterdir()
    path.rename(cache_path(Simulated(30, 12).manifest, RULE, str(tmp_path)))
    assert len(load(Simulated(30, 12), tmp_path).tokens) == 30


def test_a_folder_that_cannot_be_written_is_not_fatal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        totals = load(Simulated(30, 12), tmp_path / "file" / "folder")
    assert totals.tokens.sum() > 0
    assert "not kept" in caplog.records[-1].getMessage()


def test_the_folder_is_that_of_the_users_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load(Simulated(30, 12), "")
    assert len(list((tmp_path / "sora_train").glob("totals-*.safetensors"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_path(Simulated(30, 12).manifest, RULE, "").parent == Path("/home/someone/.cache/sora_train")


def test_totals_of_another_index_are_noticed(tmp_path: Path) -> None:
    """An index without a hash in dataset.json was rebuilt, and reads otherwise now."""
    config = data_config(Path("x"), cache_dir=str(tmp_path))
    Order({"main": Simulated(30, 12)}, config, MODEL, CODEC, 0)  # type: ignore[dict-item]
    other = Simulated(30, 12, lambda numbers: np.full(len(numbers), 9))
    order = Order({"main": other}, config, MODEL, CODEC, 0)  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"the index of s\d+\.tar is not the one that its totals"):
        order.batch(0)
