"""Which clips of a data set are trained on: not those of held-out sources, and only the media asked for."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sora_train.config.data import Media
from sora_train.data.shard_table import ShardTable

# The first 52 bits of a source's hash decide: exact as a float.
HELD_OUT_DIGITS = 13


@dataclass(frozen=True)
class Selection:
    """What is taken of a data set."""

    held_out_fraction: float
    media: Media = Media.any

    def trained(self, table: ShardTable) -> NDArray[np.int64]:
        """The rows that are trained on, ascending."""
        return np.flatnonzero(self._is_taken(table) & ~are_held_out(table, self.held_out_fraction))

    def held_out(self, table: ShardTable) -> NDArray[np.int64]:
        """The rows that are kept for validation, ascending."""
        return np.flatnonzero(self._is_taken(table) & are_held_out(table, self.held_out_fraction))

    def _is_taken(self, table: ShardTable) -> NDArray[np.bool_]:
        if self.media is Media.any:
            return np.ones(len(table), dtype=np.bool_)
        return table.is_image if self.media is Media.image else ~table.is_image


def is_held_out(source_sha256: str, fraction: float) -> bool:
    """Whether a source is kept for validation: by the hash of the source, so that its clips stay together."""
    return int(source_sha256[:HELD_OUT_DIGITS], 16) < fraction * 16**HELD_OUT_DIGITS


def are_held_out(table: ShardTable, fraction: float) -> NDArray[np.bool_]:
    """`is_held_out` of every row's source."""
    digits = np.ascontiguousarray(table.source[:, :8]).view(">u8")[:, 0] >> (64 - 4 * HELD_OUT_DIGITS)
    return digits < np.uint64(math.ceil(fraction * 16**HELD_OUT_DIGITS))
