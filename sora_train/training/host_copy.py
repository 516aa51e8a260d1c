"""This rank's part of the state in host memory, taken at a step while training waits, written while it goes on.

The memory is laid out as the file will be, so that writing it is one walk from its first byte to its last: a
safetensors file is the length of a JSON header (8 bytes, little-endian), the header, and the tensors back to back.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

# Hashed, checked and written at a time. Large enough that the interpreter's lock is let go for most of it.
CHUNK_BYTES = 2**23


class HostCopy:
    """Memory for named flat fp32 tensors, allocated once and used again for each save."""

    def __init__(self, tensors: Sequence[tuple[str, Tensor]], device: torch.device) -> None:
        """`tensors` give names and lengths; on CUDA the memory is pinned, which makes the copy as fast as the bus."""
        self._device = device
        self._names = [name for name, _ in tensors]
        self._ends = np.cumsum([values.numel() for _, values in tensors], dtype=np.int64)
        total = sum(values.numel() for _, values in tensors)
        self._memory = torch.empty(total, dtype=torch.float32, pin_memory=device.type == "cuda")
        self._memory.zero_()  # the system gives memory when it is first touched: now, not while a step waits
        self._parts = self._memory.split([values.numel() for _, values in tensors]) if tensors else ()
        self._header = _header(tensors)

    @torch.no_grad()
    def take(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Copies the values as they are now. On return the tensors may change."""
        if [name for name, _ in tensors] != self._names:
            raise ValueError("other tensors than this memory was laid out for")
        for part, (_, values) in zip(self._parts, tensors, strict=True):
            part.copy_(values, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def write(self, file: BinaryIO) -> dict[str, Any]:
        """Writes all of it; returns {"bytes", "sha256"} of the file.

        Raises:
            FloatingPointError: naming the first tensor that holds an infinity or a nan.
        """
        sha256 = hashlib.sha256(self._header)
        file.write(self._header)
        numbers = self._memory.numpy()
        step = CHUNK_BYTES // 4
        for first in range(0, len(numbers), step):
            chunk = numbers[first : first + step]
            is_finite = np.isfinite(chunk)
            if not is_finite.all():
                place = first + int(is_finite.argmin())
                raise FloatingPointError(self._names[int(np.searchsorted(self._ends, place, side="right"))])
            raw = chunk.view(np.uint8).data
            sha256.update(raw)
            file.write(raw)
        return {"bytes": len(self._header) + numbers.nbytes, "sha256": sha256.hexdigest()}


def _header(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    entries: dict[str, Any] = {}
    place = 0
    for name, values in tensors:
        if values.dtype is not torch.float32 or values.ndim != 1:
            raise TypeError(f"{name} is {values.dtype} with shape {tuple(values.shape)}, not flat fp32")
        end = place + 4 * values.numel()
        entries[name] = {"dtype": "F32", "shape": [values.numel()], "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text
