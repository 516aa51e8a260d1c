"""Which caption of a clip is trained on, if any."""

from itertools import accumulate

import numpy as np

from sora_train.config.data import CaptionConfig
from sora_train.config.root import ConfigError
from sora_train.data.schema import IndexRow
from sora_train.data.shard_table import KINDS


def check_captions(config: CaptionConfig) -> None:
    """Raises ConfigError for unknown kinds, negative weights or a dropout outside [0, 1]."""
    for kind, weight in config.weights.items():
        if kind not in KINDS:
            raise ConfigError(f"data.captions.weights names {kind!r}: the kinds are {', '.join(KINDS)}")
        if weight < 0:
            raise ConfigError(f"data.captions.weights gives {kind} {weight}: choose a weight >= 0")
    if not 0 <= config.dropout <= 1:
        raise ConfigError(f"data.captions.dropout={config.dropout} is no share: choose a number from 0 to 1")


def choose_caption(row: IndexRow, config: CaptionConfig, rng: np.random.Generator) -> int | None:
    """Index into `row.captions`, or None for training without caption.

    A kind's weight is shared by the captions of that kind; kinds that a clip lacks are left out. A clip none of whose
    captions has weight takes any of them rather than none: dropout alone decides how often there is no caption.
    """
    drop, pick = rng.random(2)
    if drop < config.dropout or not row.captions:
        return None
    kinds = [caption.kind for caption in row.captions]
    weights = [config.weights.get(kind, 0.0) / kinds.count(kind) for kind in kinds]
    ends = list(accumulate(weights if sum(weights) > 0 else [1.0] * len(kinds)))
    # The first whose end lies beyond the draw; captions of weight 0 end where they begin and are never taken.
    return next(i for i, end in enumerate(ends) if pick * ends[-1] < end)
