"""Which clips of a data set are trained on: not those of held-out sources, and only the media asked for."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sora_train.config.data import Media
from sora_train.data.shard_table import ShardTable

# Sources are told apart by the first 13 hexadecimal digits (52 bits) of their hashes: exact as floats.
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
    first = np.zeros((len(table), 8), dtype=np.uint8)
    first[:, 1:] = table.source[:, :7]
    digits = first.view(">u8")[:, 0] >> 4
    return digits.astype(np.float64) < fraction * 16**HELD_OUT_DIGITS
