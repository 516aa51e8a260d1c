import json
from dataclasses import replace

import numpy as np
import pytest
from corpus import record

from sora_train.data.caption_text import MAX_CAPTION_BYTES, CaptionError, read_captions, usable_text
from sora_train.data.schema import Caption, CaptionsIn, Origin, Style

FIELDS = ("caption", "text")


def texts(data: bytes, captions_in: CaptionsIn) -> list[str]:
    return [caption.text for caption in read_captions(data, captions_in, FIELDS)]


def test_every_form_of_captions_is_read() -> None:
    ours = record(np.zeros((3, 64, 64, 3), np.uint8), "a")
    assert read_captions(ours.to_json().encode(), CaptionsIn.record, FIELDS) == ours.captions
    assert texts("ein Würfel\n".encode(), CaptionsIn.text) == ["ein Würfel"]
    assert texts(b'\xef\xbb\xbf{"text": "no", "caption": "a cube"}', CaptionsIn.field) == ["a cube"]
    assert texts(b'{"caption": null}', CaptionsIn.field) == [""]
    assert texts(b"never looked at", CaptionsIn.nowhere) == []
    (foreign,) = read_captions(b"x", CaptionsIn.text)
    assert foreign == Caption("x", Origin.original, Style.short)


def test_control_characters_and_surrogates_are_spaces_and_long_texts_empty() -> None:
    assert texts(b"\x00a\x1b[31mred\x7f\tb\nc\xc2\x85d ", CaptionsIn.text) == ["a [31mred \tb\nc d"]
    assert texts(rb'{"caption": "a\ud800b\u0000"}', CaptionsIn.field) == ["a b"]
    assert usable_text("a" * MAX_CAPTION_BYTES) == "a" * MAX_CAPTION_BYTES
    assert usable_text("ä" * (MAX_CAPTION_BYTES // 2 + 1)) == ""
    assert texts(b"a" * 2**20, CaptionsIn.text) == [""]
    # In a record, the others keep their numbers.
    ours = record(np.zeros((3, 64, 64, 3), np.uint8), "a")
    long = replace(ours, captions=(replace(ours.captions[0], text="b" * 2**20), *ours.captions[1:]))
    assert texts(long.to_json().encode(), CaptionsIn.record) == ["", ours.captions[1].text]


@pytest.mark.parametrize(
    ("data", "captions_in", "reason"),
    [
        (b"caf\xe9", CaptionsIn.text, "not_utf8"),
        (b'{"caption": "caf\xe9"}', CaptionsIn.field, "not_utf8"),
        ('{"caption": "a"}'.encode("utf-16"), CaptionsIn.field, "not_utf8"),
        (b"{", CaptionsIn.field, "malformed_json"),
        (b"[1]", CaptionsIn.field, "malformed_json"),
        (b"[" * 10**5, CaptionsIn.field, "malformed_json"),
        (b'{"title": "a"}', CaptionsIn.field, "no_caption_field"),
        (b'{"caption": 3, "text": "a"}', CaptionsIn.field, "no_caption_field"),
        (b'{"captions": 3}', CaptionsIn.record, "malformed_record"),
        (json.dumps({"captions": [], "source": {"sha256": "ab"}}).encode(), CaptionsIn.record, "malformed_record"),
    ],
)
def test_what_holds_no_captions_is_told_by_one_word(data: bytes, captions_in: CaptionsIn, reason: str) -> None:
    with pytest.raises(CaptionError) as caught:
        read_captions(data, captions_in, FIELDS)
    assert caught.value.reason == reason
    assert caught.value.detail
