"""What the safetensors header of a pre-encoded member says: all that the index reads of latents and text rows.

The form is told in data.schema. Nothing is unpickled, and torch is not needed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LATENTS = "latents"
EMPTY = "empty"
CAPTION = "caption_{}"
# safetensors' names of the numbers that latents and text rows may have, and their bytes.
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
# The bits of their exponents: all of them set in what is infinite or not a number.
EXPONENTS = {"F32": 0x7F80_0000, "BF16": 0x7F80, "F16": 0x7C00}
MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in its member."""

    number: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    offset: int  # of its bytes, from the beginning of the member


@dataclass(frozen=True)
class LatentsHeader:
    """Of KEY.latents.safetensors."""

    encoder: str
    place: Place
    # Of the pixels that the latents stand for.
    num_frames: int
    height: int
    width: int
    fps: float  # 0 for an image

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """C T H W."""
        c, t, h, w = self.place.shape
        return c, t, h, w


@dataclass(frozen=True)
class TextHeader:
    """Of KEY.text.safetensors."""

    encoder: str
    captions: tuple[Place, ...]
    empty: Place | None


def latents_header(data: bytes | memoryview) -> LatentsHeader:
    """Raises ValueError for bytes that are no such member."""
    places, metadata = _places(data)
    if places.keys() != {LATENTS}:
        raise ValueError(f"holds tensors {sorted(places)}, expected `{LATENTS}` alone")
    place = places[LATENTS]
    if len(place.shape) != 4 or min(place.shape) < 1:
        raise ValueError(f"latents of shape {list(place.shape)}, expected [C, T, H, W]")
    try:
        header = LatentsHeader(
            encoder=metadata["encoder"],
            place=place,
            num_frames=int(metadata["num_frames"]),
            height=int(metadata["height"]),
            width=int(metadata["width"]),
            fps=float(metadata["fps"]),
        )
    except KeyError as error:
        raise ValueError(f"its metadata lacks {error}") from error
    is_possible = min(header.num_frames, header.height, header.width) >= 1 and 0 <= header.fps < math.inf
    if not header.encoder or not is_possible:
        raise ValueError(f"latents that no clip has: {metadata}")
    return header


def text_header(data: bytes | memoryview) -> TextHeader:
    """Raises ValueError for bytes that are no such member."""
    places, metadata = _places(data)
    if not metadata.get("encoder"):
        raise ValueError("its metadata lacks 'encoder'")
    empty = places.pop(EMPTY, None)
    names = [CAPTION.format(i) for i in range(len(places))]
    if places.keys() != set(names):
        raise ValueError(f"holds tensors {sorted(places)}, expected {', '.join(names)}")
    rows = [places[name] for name in names]
    every = rows + ([empty] if empty else [])
    if not every or any(len(place.shape) != 2 or min(place.shape) < 1 for place in every):
        raise ValueError(f"rows of shapes {[list(place.shape) for place in every]}, expected [M, D] each")
    if len({place.shape[1] for place in every}) > 1:
        raise ValueError(f"rows of different widths: {sorted({place.shape[1] for place in every})}")
    return TextHeader(metadata["encoder"], tuple(rows), empty)


def has_only_finite(data: bytes | memoryview, place: Place) -> bool:
    """Whether none of a tensor's numbers is infinite or not a number: one would end the run that trains on it."""
    size = ITEM_BYTES[place.number] * math.prod(place.shape)
    words = np.frombuffer(memoryview(data)[place.offset : place.offset + size], dtype=f"<u{ITEM_BYTES[place.number]}")
    exponent = EXPONENTS[place.number]
    return not bool(((words & exponent) == exponent).any())


def _places(data: bytes | memoryview) -> tuple[dict[str, Place], Mapping[str, str]]:
    """The tensors of a safetensors file and its metadata; every tensor lies within the file and fits its shape."""
    size = int.from_bytes(data[:8], "little")
    start = 8 + size
    if len(data) < 8 or size > MAX_HEADER_BYTES or start > len(data):
        raise ValueError("not a safetensors file, or one that is cut")
    try:
        header: dict[str, Any] = json.loads(bytes(data[8:start]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: {error!r}") from error
    try:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no table of texts")
        places = {name: _place(item, start, len(data)) for name, item in header.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a safetensors file: {error!r}") from error
    return places, metadata


def _place(item: Mapping[str, Any], start: int, end: int) -> Place:
    first, last = item["data_offsets"]
    number, shape = item["dtype"], tuple(item["shape"])
    if number not in ITEM_BYTES:
        raise ValueError(f"numbers of type {number}, expected {', '.join(ITEM_BYTES)}")
    if not all(isinstance(size, int) and size >= 0 for size in (first, last, *shape)):
        raise ValueError(f"a tensor of shape {shape} at {first} to {last}")
    if last - first != ITEM_BYTES[number] * math.prod(shape) or start + last > end:
        raise ValueError(f"a tensor of shape {shape} does not fit its {last - first} bytes, or the file is cut")
    return Place(number, shape, start + first)
