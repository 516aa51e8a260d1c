from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from safetensors.numpy import load, save

from sora_train.data.schema import CaptionEntry, CaptionsIn, IndexRow
from sora_train.data.shard_table import COLUMNS, KINDS, ShardTable

VIDEO = IndexRow(
    key="a/clip-1",
    medium="mp4",
    medium_offset=512,
    medium_size=2**40,
    num_frames=241,
    fps=23.976,
    height=1080,
    width=1920,
    duration_seconds=10.05,
    source_sha256=sha256(b"a").hexdigest(),
    captions=(CaptionEntry("original/short", 7), CaptionEntry("recaption/structured", 0)),
    medium_xxh3=2**64 - 1,
    captions_in=CaptionsIn.field,
    record_offset=3,
    record_size=4,
    text_offset=5,
    text_size=6,
    rotation=270,
    is_variable_rate=True,
)
IMAGE = replace(VIDEO, key="b", medium="jpg", num_frames=1, fps=0.0, captions=(), captions_in=CaptionsIn.nowhere)
LATENTS = replace(VIDEO, key="c", medium="latents.safetensors", latent_shape=(16, 5, 8, 9))
ROWS = (VIDEO, IMAGE, LATENTS, replace(IMAGE, key="d"))


def test_rows_come_back_as_they_were() -> None:
    table = ShardTable.from_bytes(ShardTable.from_rows(ROWS).to_bytes())
    assert table.rows() == ROWS
    assert [table.key(i) for i in range(4)] == ["a/clip-1", "b", "c", "d"]
    assert table.is_image.tolist() == [False, True, False, True]
    assert table.is_latent.tolist() == [False, False, True, False]


def test_equal_tables_are_equal_bytes() -> None:
    assert ShardTable.from_rows(ROWS).to_bytes() == ShardTable.from_rows(list(ROWS)).to_bytes()


def test_a_shard_of_which_nothing_is_left_has_an_index_too() -> None:
    table = ShardTable.from_bytes(ShardTable.from_rows([]).to_bytes())
    assert len(table) == 0
    assert table.rows() == ()
    assert table.source.shape == (0, 32)


def test_what_no_column_holds_is_not_written() -> None:
    with pytest.raises(ValueError, match="is no SHA-256"):
        ShardTable.from_rows([replace(VIDEO, source_sha256="ab")])


def test_bytes_that_are_no_index_are_refused() -> None:
    data = ShardTable.from_rows(ROWS).to_bytes()
    for damaged in (b"", data[:100], data[:-1], b"\xff" * 200, save({"keys": np.zeros(3)})):
        with pytest.raises(ValueError, match="not an index"):
            ShardTable.from_bytes(damaged)


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_do_not_fit_together_are_refused(name: str) -> None:
    columns = load(ShardTable.from_rows(ROWS).to_bytes())
    for wrong in (columns[name][:-1], columns[name].astype(np.float32), columns[name][:, None]):
        with pytest.raises(ValueError, match="not an index"):
            ShardTable.from_bytes(save({**columns, name: np.ascontiguousarray(wrong)}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_frames", 0), ("height", -1), ("fps", np.nan), ("medium", 99), ("caption_kind", len(KINDS)), ("key_ends", -1),
     ("medium_offset", -1), ("caption_ends", 5)],
)  # fmt: skip
def test_values_that_no_sample_has_are_refused(name: str, value: float) -> None:
    columns = load(ShardTable.from_rows(ROWS).to_bytes())
    column = columns[name].copy()
    column[0] = value
    with pytest.raises(ValueError, match="not an index"):
        ShardTable.from_bytes(save({**columns, name: column}))
