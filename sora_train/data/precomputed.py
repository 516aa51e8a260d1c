"""Writes and reads latents and text rows made in advance: members of a shard, in the form that data.schema tells.

Who encodes (data_pipelines) writes them; the loader reads them instead of decoding and encoding. Whether the encoder is
the one of the run is checked once, at the start, from the identities that dataset.json collects.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from sora_train.data.precomputed_header import CAPTION, EMPTY, LATENTS, Place, latents_header, text_header

NUMBERS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class TextRows:
    """The rows of each caption [M, D], and of an empty text if the encoder gives it any."""

    captions: tuple[Tensor, ...]
    empty: Tensor | None


def latents_member(latents: Tensor, encoder: str, num_frames: int, height: int, width: int, fps: float) -> bytes:
    """The bytes of KEY.latents.safetensors; equal arguments give equal bytes.

    Args:
        latents: [C, T, H, W], float32, bfloat16 or float16, as the model takes them.
        encoder: identity of the autoencoder that made them.
        num_frames, height, width, fps: of the pixels they stand for; fps 0 for an image.

    Raises:
        ValueError: latents that no clip has.
    """
    facts = {"num_frames": str(num_frames), "height": str(height), "width": str(width), "fps": repr(float(fps))}
    data = _save({LATENTS: latents}, {"encoder": encoder, **facts})
    latents_header(data)
    return data


def text_member(captions: Sequence[Tensor], encoder: str, empty: Tensor | None = None) -> bytes:
    """The bytes of KEY.text.safetensors; equal arguments give equal bytes.

    Args:
        captions: [M, D] each, in the order of the sample's captions; float32, bfloat16 or float16.
        encoder: identity of the text encoder.
        empty: [M, D] for a dropped caption, if the encoder gives rows to an empty text.

    Raises:
        ValueError: no rows, or rows of different widths.
    """
    rows = {CAPTION.format(i): part for i, part in enumerate(captions)}
    data = _save(rows if empty is None else {**rows, EMPTY: empty}, {"encoder": encoder})
    text_header(data)
    return data


def read_latents(data: bytes | memoryview) -> Tensor:
    """[C, T, H, W] in the numbers they are stored in: a view of `data`, not to be written to.

    Raises:
        ValueError: no such member.
    """
    return _view(data, latents_header(data).place)


def read_text(data: bytes | memoryview) -> TextRows:
    """Rows in the numbers they are stored in: views of `data`, not to be written to.

    Raises:
        ValueError: no such member.
    """
    header = text_header(data)
    return TextRows(
        captions=tuple(_view(data, place) for place in header.captions),
        empty=None if header.empty is None else _view(data, header.empty),
    )


def _save(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    # Cloned, since captions may share rows. safetensors does not order its metadata: the header is written here.
    data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8:start])}, sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[start:]


def _view(data: bytes | memoryview, place: Place) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(data, dtype=NUMBERS[place.number], count=math.prod(place.shape), offset=place.offset)
    return flat.view(place.shape)
