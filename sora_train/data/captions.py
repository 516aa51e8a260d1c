"""Which caption of a clip is trained on, if any, and the text that is made of it. Pure."""

import json
import math
from collections.abc import Mapping
from itertools import accumulate, pairwise

import numpy as np

from sora_train.config.data import CaptionConfig
from sora_train.config.root import ConfigError
from sora_train.data.caption_text import MAX_CAPTION_BYTES, clean_text
from sora_train.data.schema import Caption, IndexRow, Style
from sora_train.data.shard_table import KINDS


def check_captions(config: CaptionConfig) -> None:
    """Raises ConfigError for unknown kinds, negative weights, points out of order or shares outside [0, 1]."""
    _check_weights("data.captions.weights", config.weights)
    for number, point in enumerate(config.schedule):
        name = f"data.captions.schedule[{number}]"
        _check_weights(f"{name}.weights", point.weights)
        if point.step < 0 or (number > 0 and point.step <= config.schedule[number - 1].step):
            raise ConfigError(f"{name}.step={point.step}: choose 0 or more, and more than the point before it has")
    for name in ("dropout", "field_dropout"):
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"data.captions.{name}={value} is no share: choose a number from 0 to 1")


def _check_weights(name: str, weights: Mapping[str, float]) -> None:
    for kind, weight in weights.items():
        if kind not in KINDS:
            raise ConfigError(f"{name} names {kind!r}: the kinds are {', '.join(KINDS)}")
        if not 0 <= weight < math.inf:
            raise ConfigError(f"{name} gives {kind} {weight}: choose a weight >= 0")


def weights_at(config: CaptionConfig, step: int) -> Mapping[str, float]:
    """The weight of each kind at a step: `weights`, or on the straight lines between the points of `schedule`."""
    points = config.schedule
    if not points:
        return config.weights
    for before, after in pairwise(points):
        if before.step <= step < after.step:
            share = (step - before.step) / (after.step - before.step)
            kinds = before.weights | after.weights
            return {
                kind: (1 - share) * before.weights.get(kind, 0.0) + share * after.weights.get(kind, 0.0)
                for kind in kinds
            }
    return points[0].weights if step < points[0].step else points[-1].weights


def choose_caption(
    row: IndexRow, weights: Mapping[str, float], dropout: float, rng: np.random.Generator
) -> int | None:
    """Index into `row.captions`, or None for training without caption.

    A kind's weight is shared by the captions of that kind; kinds that a clip lacks are left out. A clip none of whose
    captions has weight takes any of them rather than none: dropout alone decides how often there is no caption.
    """
    drop, pick = rng.random(2)
    # An empty text is none: the index lists one that is too long to be kept as empty, to leave the numbers as they are.
    has_text = [float(caption.num_bytes > 0) for caption in row.captions]
    if drop < dropout or not any(has_text):
        return None
    kinds = [caption.kind if caption.num_bytes > 0 else None for caption in row.captions]
    shares = [weights.get(kind, 0.0) / kinds.count(kind) if kind is not None else 0.0 for kind in kinds]
    ends = list(accumulate(shares if sum(shares) > 0 else has_text))
    # The first whose end lies beyond the draw; captions of weight 0 end where they begin and are never taken.
    return next(i for i, end in enumerate(ends) if pick * ends[-1] < end)


def spoken(caption: Caption, config: CaptionConfig, rng: np.random.Generator) -> str:
    """The text that is trained on: without control characters, at most MAX_CAPTION_BYTES characters.

    A structured caption loses each of its fields with probability `field_dropout` (`rng` is that of
    Purpose.caption_field); the rest is written as JSON again, in its order. One that is no JSON object is taken as it
    is.
    """
    text = caption.text
    if caption.style is Style.structured:
        text = _without_some_fields(text, config.field_dropout, rng)
    return clean_text(text[:MAX_CAPTION_BYTES])


def _without_some_fields(text: str, dropout: float, rng: np.random.Generator) -> str:
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or not values:
            return text
        keep, stays = rng.random(len(values)) >= dropout, int(rng.integers(len(values)))
        kept = {
            name: value for i, (name, value) in enumerate(values.items()) if keep[i] or (i == stays and not keep.any())
        }
        return json.dumps(kept, ensure_ascii=False)
    except (ValueError, RecursionError):  # not JSON, or nested deeper than Python goes
        return text
