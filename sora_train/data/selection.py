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
        return self._taken(table, ~are_held_out(table, self.held_out_fraction))

    def held_out(self, table: ShardTable) -> NDArray[np.int64]:
        """The rows that are kept for validation, ascending."""
        return self._taken(table, are_held_out(table, self.held_out_fraction))

    def _taken(self, table: ShardTable, rows: NDArray[np.bool_]) -> NDArray[np.int64]:
        if self.media is not Media.any:
            rows = rows & (table.is_image if self.media is Media.image else ~table.is_image)
        return np.flatnonzero(rows)


def is_held_out(source_sha256: str, fraction: float) -> bool:
    """Whether a source is kept for validation: by the hash of the source, so that its clips stay together."""
    return int(source_sha256[:HELD_OUT_DIGITS], 16) < fraction * 16**HELD_OUT_DIGITS


def are_held_out(table: ShardTable, fraction: float) -> NDArray[np.bool_]:
    """`is_held_out` of every row's source."""
    end = math.ceil(fraction * 16**HELD_OUT_DIGITS)
    # The first byte tells most of them apart; the others are few.
    held_out = table.source[:, 0] <= end >> 4 * HELD_OUT_DIGITS - 8
    unsure = np.flatnonzero(held_out)
    digits = np.ascontiguousarray(table.source[unsure, :8]).view(">u8")[:, 0] >> (64 - 4 * HELD_OUT_DIGITS)
    held_out[unsure] = digits < np.uint64(end)
    return held_out
