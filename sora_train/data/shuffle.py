"""One data set as an endless stream of tokens: all its clips in a shuffled order, then all in another, and so on.

The shuffle has two levels: shards are dealt into windows, then the clips of a window are permuted. Where the tokens of
each shard are known, any place of the stream is found by reading one window.

A window must look like the whole data set, or a data set that was sorted (by length, as folders often are) would give
steps of long clips for hours. So shards are not dealt at random: they are laid out by the extent of their clips, cut
into as many strata as a window has shards, and each window gets one shard of each stratum, at random.

The order itself depends on no size rule. A stream under another rule has the same clips in the same order, each of
other tokens: a `Place` holds in both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sora_train.config.root import ConfigError
from sora_train.data.draws import Purpose, dataset_stream, generator
from sora_train.data.index import Dataset
from sora_train.data.schema import DatasetManifest, IndexRow
from sora_train.data.shard_table import Numbers, ShardTable
from sora_train.data.size import ClipSize, SourceSizes, clip_sizes
from sora_train.data.totals import Rule, Totals

# Shards whose clips are shuffled together: enough for this many clips, which bounds the rows in memory (60 MB), within
# bounds of their own: each shard is an index to read, and with few strata a sorted data set shows. With 256, the steps
# of a million clips sorted by length cannot be told from those of a random order; with 64 they can
# (benchmarks/data_order.py).
WINDOW_CLIPS = 2**18
WINDOW_SHARDS = (16, 256)


@dataclass(frozen=True)
class Place:
    """A clip of the stream: its number in the shuffled window, and which window of which epoch."""

    epoch: int
    window: int
    clip: int


@dataclass(frozen=True)
class ShuffledClip:
    """A clip as it comes out of the stream."""

    shard: int  # number in the manifest
    row: IndexRow
    size: ClipSize
    num_tokens: int


@dataclass(frozen=True)
class Epoch:
    """The shards in the order of an epoch, window after window."""

    shards: Numbers
    window_ends: Numbers  # in `shards`
    starts: Numbers  # where the tokens of each window begin in the epoch, and its end


@dataclass(frozen=True)
class Window:
    """The clips of some shards, shuffled together."""

    shards: Numbers
    tables: tuple[ShardTable, ...]
    ends: Numbers  # of the clips of each shard, in `rows`
    rows: Numbers  # in the tables
    clips: Numbers  # the shuffled order: places in `rows`
    starts: Numbers  # in that order, where the tokens of each clip begin in the window, and its end


class Shuffle:
    """The stream of one data set under one size rule. Holds totals and a cache, no position."""

    def __init__(self, dataset: Dataset, name: str, rule: Rule, totals: Totals, seed: int) -> None:
        self.dataset, self.rule, self.totals, self.seed = dataset, rule, totals, seed
        self.stream = dataset_stream(name)
        self.epoch_tokens = int(totals.tokens.sum())
        self._strata = strata(totals, window_shards(dataset.manifest))
        self._window = lru_cache(maxsize=2)(self._load_window)
        self._epoch = lru_cache(maxsize=2)(self._load_epoch)

    def clips(self, position: int, end: int) -> Iterator[ShuffledClip]:
        """The clips whose first token lies in [position, end)."""
        while position < end:
            place, start = self._first_from(position)
            window = self._window(place.epoch, place.window)
            last = int(np.searchsorted(window.starts[:-1], end - start))
            yield from self._clips(place.epoch, window, place.clip, last)
            position = start + int(window.starts[-1])

    def place(self, position: int) -> Place:
        """The first clip that begins at `position` or later; one past the last of a window is the next window's."""
        return self._first_from(position)[0]

    def position(self, place: Place) -> int:
        """Where the tokens of a clip begin."""
        within = int(self._window(place.epoch, place.window).starts[place.clip]) if place.clip else 0
        return place.epoch * self.epoch_tokens + int(self._epoch(place.epoch).starts[place.window]) + within

    def _first_from(self, position: int) -> tuple[Place, int]:
        """The first clip from a position on, and where the tokens of its window begin."""
        epoch, offset = divmod(position, self.epoch_tokens)
        starts = self._epoch(epoch).starts
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        clip = int(np.searchsorted(self._window(epoch, window).starts[:-1], offset - int(starts[window])))
        return Place(epoch, window, clip), epoch * self.epoch_tokens + int(starts[window])

    def _clips(self, epoch: int, window: Window, first: int, last: int) -> Iterator[ShuffledClip]:
        clips = window.clips[first:last]
        numbers = np.searchsorted(window.ends, clips, side="right")
        rows_in = [int(row) for row in window.rows[clips]]
        rows = [window.tables[number].row(row) for number, row in zip(numbers, rows_in, strict=True)]
        sizes = clip_sizes(SourceSizes.of(rows), self.rule.size, self.rule.stride)
        for i, (shard, row_in) in enumerate(zip(window.shards[numbers], rows_in, strict=True)):
            part = 0.0
            if sizes.spare_frames[i] > 0:
                # Both numbers fit into half of the word.
                place = int(shard) << 32 | row_in
                part = generator(self.seed, epoch, place, Purpose.clip_part, self.stream).random()
            yield ShuffledClip(int(shard), rows[i], sizes.clip(i, part), int(sizes.num_tokens[i]))

    def _load_epoch(self, epoch: int) -> Epoch:
        draw = generator(self.seed, epoch, 0, Purpose.shard_order, self.stream)
        columns = draw.permuted(self._strata, axis=1).T
        shards = columns[columns >= 0]
        window_ends = np.cumsum((columns >= 0).sum(axis=1))
        token_ends = np.cumsum(self.totals.tokens[shards])[window_ends - 1]
        return Epoch(shards, window_ends, np.concatenate([[0], token_ends]))

    def _load_window(self, epoch: int, number: int) -> Window:
        ends = self._epoch(epoch).window_ends
        shards = self._epoch(epoch).shards[int(ends[number - 1]) if number else 0 : int(ends[number])]
        tables = tuple(self.dataset.tables(int(shard) for shard in shards))
        rows, tokens = [], []
        for shard, table in zip(shards, tables, strict=True):
            trained = self.rule.selection.trained(table)
            lengths = clip_sizes(table, self.rule.size, self.rule.stride).num_tokens[trained]
            if lengths.sum() != self.totals.tokens[shard]:
                raise ConfigError(
                    f"the index of {self.dataset.manifest.shards[shard].name} is not the one that its totals were "
                    "computed from: remove totals-*.safetensors in data.cache_dir (by default ~/.cache/sora_train)"
                )
            rows.append(trained)
            tokens.append(lengths)
        ends = np.cumsum([len(trained) for trained in rows])
        clips = generator(self.seed, epoch, number, Purpose.clip_order, self.stream).permutation(int(ends[-1]))
        starts = np.concatenate([[0], np.cumsum(np.concatenate(tokens)[clips])])
        return Window(shards, tables, ends, np.concatenate(rows), clips, starts)


def strata(totals: Totals, most: int) -> Numbers:
    """Shards by the extent of their clips, laid out in rows of like extent; as many columns as windows of at most so
    many shards need. -1 where the last row is short."""
    num_shards = len(totals.tokens)
    num_windows = -(-num_shards // most)
    grid = np.full((-(-num_shards // num_windows), num_windows), -1, dtype=np.int64)
    grid.ravel()[:num_shards] = np.argsort(totals.extent, kind="stable")
    return grid


def window_shards(manifest: DatasetManifest) -> int:
    """How many shards are shuffled together."""
    least, most = WINDOW_SHARDS
    return min(max(WINDOW_CLIPS * len(manifest.shards) // manifest.num_samples, least), most)
