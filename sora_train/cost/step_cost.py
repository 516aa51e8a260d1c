"""What a micro-step costs each rank when clips may be shared by a sequence group: what packs are balanced by. Pure.

A clip that sits whole on one rank costs it everything. A clip shared by a group of g ranks (Ulysses: every rank holds
a share of the tokens, all-to-all trades tokens for heads around attention) costs a rank, s being its tokens of n:

    linear layers, cross-attention   in proportion to s        they work on the tokens a rank holds
    self-attention, ~ n^2            1/g, whatever s is        each rank has 1/g of the heads for all n tokens
    rows of the text, the sample     as much as a whole clip   every rank makes them for itself
    all-to-all                       (s (g - 1) / g + (n - s) / g) / 2    tokens sent and received, links being duplex

The unit is FLOPs as counted from the model's config (`of_model`), or seconds after `fit` to measured times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sora_train.config.model import ModelConfig
from sora_train.cost.flops import step_flops, text_tokens

# Features of a rank's micro-step, in the order of StepCost's coefficients.
NUM_FEATURES = 6


class ClipCost(NamedTuple):
    """Cost of one clip by how it is divided in a group. Numbers, or arrays over clips."""

    by_tokens: Any
    by_heads: Any
    repeated: Any

    @property
    def whole(self) -> Any:
        """Of a clip that one rank holds alone."""
        return self.by_tokens + self.by_heads + self.repeated


@dataclass(frozen=True)
class StepCost:
    """Forward and backward cost, never negative, in one unit: FLOPs or seconds."""

    model: ModelConfig  # for the rows of text that it makes of a caption
    token: float  # a video token, in linear layers
    pair: float  # a pair of video tokens of one clip, or a video token and a text row, in attention
    text_row: float
    sample: float
    travelling_token: float  # a token through the all-to-alls of all layers, one way
    micro_step: float = 0.0  # whatever the pack

    def __post_init__(self) -> None:
        if min(self.coefficients) < 0:
            raise ValueError(f"costs are not negative: {self.coefficients}")

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The prices, in the order of `features`."""
        return (self.token, self.pair, self.text_row, self.sample, self.travelling_token, self.micro_step)

    def text_rows(self, num_bytes: int) -> int:
        """Rows of text that enter the model for a caption of so many bytes."""
        return text_tokens(self.model, num_bytes)

    def of_clip(self, num_tokens: Any, num_text_rows: Any) -> ClipCost:
        """Numbers or arrays of them."""
        return ClipCost(
            by_tokens=num_tokens * (self.token + self.pair * num_text_rows),
            by_heads=self.pair * num_tokens * num_tokens,
            repeated=self.text_row * num_text_rows + self.sample,
        )

    def of_features(self, features: Sequence[float]) -> float:
        """Cost of one rank's micro-step; see `features`."""
        return float(sum(cost * count for cost, count in zip(self.coefficients, features, strict=True)))


def features(
    whole: Sequence[tuple[int, int]], shared: Sequence[tuple[int, int]], share: int = 0, group_size: int = 1
) -> list[float]:
    """What one rank has to do in a micro-step, counted in the units that StepCost prices.

    Args:
        whole: (video tokens, text rows) of the clips that sit on the rank alone.
        shared: the same of the clips of its group; they are laid end to end and cut.
        share: tokens of that sequence on this rank.
        group_size: ranks in the group.
    """
    shared_tokens = sum(n for n, _ in shared)
    part = share / shared_tokens if shared_tokens else 0.0
    pairs = sum(n * (n + text) for n, text in whole) + sum(n * (n / group_size + part * text) for n, text in shared)
    travelling = (share * (group_size - 1) + shared_tokens - share) / (2 * group_size) if shared else 0.0
    rows = sum(text for _, text in whole) + sum(text for _, text in shared)
    return [sum(n for n, _ in whole) + share, pairs, rows, len(whole) + len(shared), travelling, 1.0]


def of_model(config: ModelConfig, flops_per_byte: float = 2000.0) -> StepCost:
    """Coefficients in FLOPs, forward and backward, from the model's sizes alone.

    Args:
        config: sizes of the model.
        flops_per_byte: what the device computes while its link to a neighbour moves a byte one way; the default stands
            for 400 TFLOP/s reached and 200 GB/s.
    """
    nothing, one, two = (step_flops(config, num_tokens, 0) for num_tokens in (0, 1, 2))
    pair = (two - 2 * one + nothing) / 2
    # Queries, keys, values and the result, in 2 bytes a number, forward and backward.
    travelling_bytes = 2 * 2 * 4 * config.depth * config.width
    return StepCost(
        config,
        token=one - nothing - pair,
        pair=pair,
        text_row=step_flops(config, 0, 1) - nothing,
        sample=nothing,
        travelling_token=travelling_bytes * flops_per_byte,
    )


def fit(
    config: ModelConfig, micro_steps: Sequence[Sequence[Sequence[float]]], seconds: Sequence[float], rounds: int = 20
) -> StepCost:
    """Costs in seconds from measured times of micro-steps, each as long as its slowest rank takes.

    Which rank is slowest depends on the costs, so the two are found in turn: with costs given, each micro-step is
    represented by the features of its costliest rank; with these, the costs are the least squares that are not
    negative. The rounds end when no micro-step changes its rank. Errors count relative to each time, so that short
    micro-steps say as much as long ones.

    Args:
        config: the model that was measured.
        micro_steps: of each micro-step, the `features` of every rank.
        seconds: measured time of each, positive.
        rounds: at most; the costs with the least error among them are returned.

    Raises:
        ValueError: nothing was measured.
    """
    if not micro_steps or len(micro_steps) != len(seconds) or min(seconds) <= 0:
        raise ValueError(f"{len(micro_steps)} micro-steps and {len(seconds)} positive times cannot be fitted")
    ranks = [np.asarray(rank_features, dtype=np.float64) for rank_features in micro_steps]
    times = np.asarray(seconds, dtype=np.float64)
    # At first the rank with most work by every measure.
    scale = np.maximum(np.max(np.concatenate(ranks), axis=0), 1e-300)
    slowest = [int(np.argmax((features_RF / scale).sum(axis=1))) for features_RF in ranks]
    seen, best, least = set(), np.zeros(NUM_FEATURES), np.inf
    for _ in range(rounds):
        seen.add(tuple(slowest))
        rows = np.stack([features_RF[rank] for features_RF, rank in zip(ranks, slowest, strict=True)])
        costs = _least_squares_not_negative(rows / times[:, None])
        predicted = np.array([float(np.max(features_RF @ costs)) for features_RF in ranks])
        error = float(np.sum((predicted / times - 1) ** 2))
        if error < least:
            best, least = costs, error
        slowest = [int(np.argmax(features_RF @ costs)) for features_RF in ranks]
        if tuple(slowest) in seen:
            break
    return StepCost(config, *(float(cost) for cost in best))


def _least_squares_not_negative(rows: Any) -> Any:
    """The x >= 0 with rows @ x nearest to 1. Six columns have 64 subsets: the best that comes out positive is it."""
    scale = np.maximum(np.max(rows, axis=0), 1e-300)
    scaled = rows / scale
    best, least = np.zeros(NUM_FEATURES), float(len(rows))
    for subset in range(1, 1 << NUM_FEATURES):
        columns = [column for column in range(NUM_FEATURES) if subset >> column & 1]
        x = np.linalg.lstsq(scaled[:, columns], np.ones(len(rows)), rcond=None)[0]
        if np.min(x) >= 0 and (error := float(np.sum((scaled[:, columns] @ x - 1) ** 2))) < least:
            best, least = np.zeros(NUM_FEATURES), error
            best[columns] = x
    return best / scale
