"""The captions of a sample, from whichever member holds them: one reading for the index and for training.

The index writes down the captions that are found here, and training reads them here again, so that caption i means the
same to both. Text is made safe to tokenize where it is read: control characters and lone surrogates become spaces, and
what has more than MAX_CAPTION_BYTES counts as empty, for a caption of a megabyte is never one.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sora_train.data.schema import Caption, CaptionsIn, ClipRecord, Origin, Style

MAX_CAPTION_BYTES = 1 << 16
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000)} - {ord("\t"), ord("\n")}, " ")


class CaptionError(ValueError):
    """A member that holds no captions. `reason` is one word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_captions(data: bytes, captions_in: CaptionsIn, caption_fields: Sequence[str] = ()) -> tuple[Caption, ...]:
    """The captions of a sample, in the order of its index row; those of no use have an empty text.

    Args:
        data: the member at the row's record_offset; not looked at when the sample has no captions.
        captions_in: of the row.
        caption_fields: of dataset.json, for a foreign KEY.json.

    Raises:
        CaptionError: `not_utf8`, `malformed_json`, `malformed_record` or `no_caption_field`.
    """
    if captions_in is CaptionsIn.nowhere:
        return ()
    if captions_in is CaptionsIn.text:
        return (_foreign(usable_text(decode_text(data))),)
    if captions_in is CaptionsIn.record:
        return tuple(replace(caption, text=usable_text(caption.text)) for caption in read_record(data).captions)
    return (_foreign(usable_text(foreign_text(read_json(data), caption_fields))),)


def read_json(data: bytes) -> dict[str, Any]:
    """A KEY.json. Raises CaptionError (`not_utf8`, `malformed_json`)."""
    text = decode_text(data)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaptionError("malformed_json", str(error) or repr(error)) from error
    if not isinstance(values, dict):
        raise CaptionError("malformed_json", f"a {type(values).__name__}, expected an object")
    return values


def is_record(values: dict[str, Any], caption_fields: Sequence[str]) -> bool:
    """Whether a KEY.json means to be a ClipRecord: it has `captions`, and that is not the name of a foreign field."""
    return "captions" in values and "captions" not in caption_fields


def read_record(data: bytes) -> ClipRecord:
    """A KEY.json that is ours. Raises CaptionError (`malformed_record`)."""
    try:
        return ClipRecord.from_json(data.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise CaptionError("malformed_record", str(error)) from error


def foreign_text(values: dict[str, Any], caption_fields: Sequence[str]) -> str:
    """The first caption field of a foreign KEY.json; null is an empty text.

    Raises:
        CaptionError: `no_caption_field`: none of them is there, or the first that is holds no text.
    """
    found = next((name for name in caption_fields if name in values), None)
    if found is None:
        names, wanted = ", ".join(sorted(values)[:20]), ",".join(caption_fields)
        raise CaptionError("no_caption_field", f"its fields are {names}; caption_fields=[{wanted}]")
    value = values[found]
    if value is not None and not isinstance(value, str):
        raise CaptionError("no_caption_field", f"{found} is a {type(value).__name__}, expected a text")
    return value or ""


def decode_text(data: bytes) -> str:
    """Raises CaptionError (`not_utf8`)."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError("not_utf8", str(error)) from error


def clean_text(text: str) -> str:
    """Without control characters (tabs and line ends stay), surrogates, and space at both ends."""
    return text.translate(_CONTROLS).strip()


def usable_text(text: str) -> str:
    """The text, clean; empty when it is too long."""
    text = clean_text(text)
    return text if len(text.encode()) <= MAX_CAPTION_BYTES else ""


def _foreign(text: str) -> Caption:
    return Caption(text, Origin.original, Style.short)
