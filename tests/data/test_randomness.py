"""Long clips are spread over steps as a random order would spread them, also where the data set was sorted."""

import numpy as np
import pytest
from numpy.typing import NDArray
from simulated import Simulated
from spread import unevenness

from sora_train.config.data import SizeConfig
from sora_train.data import shuffle
from sora_train.data.selection import Selection
from sora_train.data.size import Stride
from sora_train.data.totals import Rule, Totals, compute_totals

SHARDS, CLIPS = 1000, 20
RULE = Rule(SizeConfig(64 * 64, 81, 8.0), Stride(2, 8, 8), Selection(0.0))
Numbers = NDArray[np.int64]


def lengths(is_sorted: bool) -> Numbers:
    """Frames as a web corpus has them: some images, clips of 1 to 10 seconds, few of them long."""
    draw = np.random.default_rng(0)
    seconds = np.exp(draw.normal(1.0, 0.7, SHARDS * CLIPS)).clip(1, 10)
    frames = np.where(draw.random(SHARDS * CLIPS) < 0.3, 1, seconds * 8).astype(np.int64)
    return np.sort(frames) if is_sorted else frames


def epoch(is_sorted: bool) -> tuple[Numbers, Totals]:
    """Tokens of the clips of an epoch, in its order."""
    frames = lengths(is_sorted)
    dataset = Simulated(SHARDS, CLIPS, lambda numbers: frames[numbers])
    totals = compute_totals(dataset, RULE)  # type: ignore[arg-type]
    stream = shuffle.Shuffle(dataset, "main", RULE, totals, seed=0)  # type: ignore[arg-type]
    return np.array([clip.num_tokens for clip in stream.clips(0, stream.epoch_tokens)]), totals


def uneven(tokens: Numbers) -> list[float]:
    """Of single steps of about 50 clips, and of eight together, where drifts show."""
    return [unevenness(tokens, 50 * int(tokens.mean()), together) for together in (1, 8)]


@pytest.mark.parametrize("is_sorted", [False, True])
def test_long_clips_are_spread_as_at_random(is_sorted: bool) -> None:
    tokens, totals = epoch(is_sorted)
    assert len(tokens) == totals.clips.sum() == SHARDS * CLIPS
    single, together = uneven(tokens)
    assert abs(single) < 3
    assert together < 3


def test_windows_that_are_not_shuffled_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unshuffled:
        def permutation(self, count: int) -> Numbers:
            return np.arange(count)

        def permuted(self, grid: Numbers, axis: int) -> Numbers:
            return np.random.default_rng(0).permuted(grid, axis=axis)

        def random(self) -> float:
            return 0.5

    monkeypatch.setattr(shuffle, "generator", lambda *key: Unshuffled())
    assert min(uneven(epoch(is_sorted=True)[0])) > 10


def test_windows_of_few_shards_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "WINDOW_SHARDS", (16, 16))
    assert min(uneven(epoch(is_sorted=True)[0])) > 5


def test_shards_dealt_without_strata_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    dealt = shuffle.strata

    def at_random(totals: Totals, most: int) -> Numbers:
        grid = dealt(totals, most)
        return np.random.default_rng(1).permutation(grid.ravel()).reshape(grid.shape)

    monkeypatch.setattr(shuffle, "strata", at_random)
    assert uneven(epoch(is_sorted=True)[0])[1] > 4


@pytest.mark.parametrize("num_shards", [1, 2, 17, 255, 256, 257, 600])
def test_every_shard_is_in_one_window_of_each_epoch(num_shards: int) -> None:
    dataset = Simulated(num_shards, 3)
    totals = compute_totals(dataset, RULE)  # type: ignore[arg-type]
    stream = shuffle.Shuffle(dataset, "main", RULE, totals, seed=0)  # type: ignore[arg-type]
    for number in (0, 1):
        keys = [
            clip.row.key
            for clip in stream.clips(number * stream.epoch_tokens, (number + 1) * stream.epoch_tokens)
        ]
        assert len(keys) == len(set(keys)) == 3 * num_shards
    windows = -(-num_shards // 256)
    grid = shuffle.strata(totals, 256)
    assert grid.shape[1] == windows
    assert sorted(grid[grid >= 0]) == list(range(num_shards))
