"""Which clips make the global batch of a step: a pure function of (data sets, config, seed, step).

Each data set is an endless stream of tokens (shuffle.py) and gives its share of tokens_per_step: step k takes the
clips whose first token lies between what was given before it and what is given by its end. World size is no argument
and nothing is remembered, so any number of ranks, at any time, sees the same batches.

A stage (stages.py) changes shares or sizes from a step on. Every stream goes on from the clip it has come to, so that
over all stages each clip is seen once an epoch.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from sora_train.config.data import DataConfig, Media, SizeConfig, dataset_configs
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.data.captions import check_captions, choose_caption, weights_at
from sora_train.data.draws import VALIDATION_STEP, Purpose, generator
from sora_train.data.index import Dataset, open_dataset
from sora_train.data.schema import IndexRow
from sora_train.data.selection import Selection
from sora_train.data.shuffle import Shuffle, ShuffledClip
from sora_train.data.size import ClipSize, clip_sizes, token_stride
from sora_train.data.stages import Stage, build_stages
from sora_train.data.totals import LongestClip, Rule, load_totals
from sora_train.encoders.codec_shape import CodecShape


@dataclass(frozen=True)
class PlannedSample:
    """One clip of a global batch, and all that was decided about it."""

    step: int
    index: int  # in the global batch: with seed and step the key of its draws
    dataset: int  # number in Order.datasets
    shard: int  # number in the manifest
    row: IndexRow
    size: ClipSize
    latent_shape: tuple[int, int, int, int]  # C T H W
    num_tokens: int
    caption: int | None  # in row.captions; None: trained without

    @property
    def text_bytes(self) -> int:
        """Length of its caption in bytes, 0 without."""
        return 0 if self.caption is None else self.row.captions[self.caption].num_bytes


@dataclass(frozen=True)
class GlobalBatch:
    """The clips of a step, on all ranks together."""

    step: int
    samples: tuple[PlannedSample, ...]

    @property
    def num_tokens(self) -> int:
        """Video tokens of the step."""
        return sum(sample.num_tokens for sample in self.samples)


def open_datasets(config: DataConfig) -> dict[str, Dataset]:
    """The data sets of a run by name, in the order of the names. Raises ConfigError as `open_dataset` does."""
    return {name: open_dataset(item.shards) for name, item in dataset_configs(config).items()}


class Order:
    """Global batches by step. Holds totals and caches, no position.

    Args:
        datasets: those of the config, by name; see `open_datasets`.

    Raises:
        ConfigError: nothing to train on, a clip that no step can hold, by name, or settings that cannot work.
    """

    def __init__(
        self, datasets: Mapping[str, Dataset], config: DataConfig, model: ModelConfig, codec: CodecShape, seed: int
    ) -> None:
        check_captions(config.captions)
        if not 0 <= config.held_out_fraction <= 1:
            raise ConfigError(
                f"data.held_out_fraction={config.held_out_fraction} is no share: choose a number from 0 to 1"
            )
        self.stages = build_stages(config)
        self.config, self.model, self.codec, self.seed = config, model, codec, seed
        self.stride = token_stride(model, codec)
        items = dataset_configs(config)
        self.names = tuple(items)
        # A sample's `dataset` is a number in here.
        self.datasets = tuple(datasets[name] for name in items)
        self._selections = tuple(Selection(config.held_out_fraction, item.media) for item in items.values())
        # By data set and size rule.
        self.shuffles: dict[tuple[int, SizeConfig], Shuffle] = {}
        for stage in self.stages:
            for number in stage.used:
                if (number, stage.size) not in self.shuffles:
                    self.shuffles[number, stage.size] = self._build_shuffle(number, stage.size)
        self.longest = tuple(self._longest(stage) for stage in self.stages)
        self._check_steps()
        self._positions = lru_cache(maxsize=None)(self._start_positions)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step; never empty. Data set after data set, each in its own order."""
        number = bisect_right(self.stages, step, key=lambda stage: stage.start_step) - 1
        stage, positions = self.stages[number], self._positions(number)
        begins = stage.tokens_after(step - stage.start_step)
        ends = stage.tokens_after(step + 1 - stage.start_step)
        weights = weights_at(self.config.captions, step)
        samples: list[PlannedSample] = []
        for dataset in stage.used:
            _, start = positions[dataset]
            shuffle = self.shuffles[dataset, stage.size]
            for clip in shuffle.clips(start + begins[dataset], start + ends[dataset]):
                samples.append(self._plan(step, len(samples), dataset, clip, weights))
        return GlobalBatch(step, tuple(samples))

    def validation_samples(self, count: int) -> tuple[PlannedSample, ...]:
        """The first `count` held-out clips, of the data sets in turn, fewer if there are fewer.

        Their draws and sizes never change: the middle of each clip, at the size of the last stage that takes its data
        set, which is what the run comes to.
        """
        weights = weights_at(self.config.captions, VALIDATION_STEP)
        streams = [(number, self._held_out(number)) for number in range(len(self.datasets))]
        samples: list[PlannedSample] = []
        while streams and len(samples) < count:
            number, stream = streams.pop(0)
            clip = next(stream, None)
            if clip is not None:
                samples.append(self._plan(VALIDATION_STEP, len(samples), number, clip, weights))
                streams.append((number, stream))
        return tuple(samples)

    def refuse_over(self, limit: int, setting: str, ranks: int = 1) -> None:
        """Raises ConfigError when a clip of any stage has more tokens than `limit`, which `setting` names, on each of
        the ranks that may share it."""
        for stage, longest in zip(self.stages, self.longest, strict=True):
            _refuse_over(longest, limit, setting, stage, ranks)

    def _plan(
        self, step: int, index: int, dataset: int, clip: ShuffledClip, weights: Mapping[str, float]
    ) -> PlannedSample:
        size = clip.size
        return PlannedSample(
            step=step,
            index=index,
            dataset=dataset,
            shard=clip.shard,
            row=clip.row,
            size=size,
            latent_shape=self.codec.latent_shape(size.num_frames, size.height, size.width),
            num_tokens=clip.num_tokens,
            caption=choose_caption(
                clip.row, weights, self.config.captions.dropout, generator(self.seed, step, index, Purpose.caption)
            ),
        )

    def _held_out(self, number: int) -> Iterator[ShuffledClip]:
        sizes = [stage.size for stage in self.stages if number in stage.used]
        if not sizes:
            return
        shuffle = self.shuffles[number, sizes[-1]]
        for shard in shuffle.totals.held_out.nonzero()[0]:
            table = self.datasets[number].table(int(shard))
            columns = clip_sizes(table, shuffle.rule.size, shuffle.rule.stride)
            for i in shuffle.rule.selection.held_out(table):
                yield ShuffledClip(int(shard), table.row(int(i)), columns.clip(i), int(columns.num_tokens[i]))

    def _start_positions(self, stage_number: int) -> tuple[tuple[SizeConfig | None, int], ...]:
        """How far each data set has come when a stage begins, in tokens under the size rule that it was last used by.

        One that goes on under another rule goes on from the same clip.
        """
        stage = self.stages[stage_number]
        if stage_number == 0:
            before: tuple[tuple[SizeConfig | None, int], ...] = ((None, 0),) * len(self.datasets)
        else:
            previous = self.stages[stage_number - 1]
            given = previous.tokens_after(stage.start_step - previous.start_step)
            before = tuple(
                (size, start + given[number])
                for number, (size, start) in enumerate(self._positions(stage_number - 1))
            )
        positions = list(before)
        for number in stage.used:
            size, position = before[number]
            if size not in (None, stage.size):
                place = self.shuffles[number, size].place(position)
                position = self.shuffles[number, stage.size].position(place)
            positions[number] = (stage.size, position)
        return tuple(positions)

    def _build_shuffle(self, number: int, size: SizeConfig) -> Shuffle:
        dataset, name, selection = self.datasets[number], self.names[number], self._selections[number]
        rule = Rule(size, self.stride, selection)
        shuffle = Shuffle(dataset, name, rule, load_totals(dataset, rule, self.config.cache_dir), self.seed)
        if shuffle.epoch_tokens == 0:
            where = f"data.shards={self.config.shards}" if self.config.shards else f"data.datasets.{name}"
            what = "clip" if selection.media is Media.any else selection.media.value
            raise ConfigError(
                f"{where} holds no {what} outside the held-out sources: "
                f"lower data.held_out_fraction={self.config.held_out_fraction} or curate more clips"
            )
        return shuffle

    def _longest(self, stage: Stage) -> LongestClip:
        clips = [self.shuffles[number, stage.size].totals.longest for number in stage.used]
        return max((clip for clip in clips if clip is not None), key=lambda clip: clip.num_tokens)

    def _check_steps(self) -> None:
        """No clip over a step; and one data set at least gives every step a clip, so that none is empty."""
        for stage, longest in zip(self.stages, self.longest, strict=True):
            _refuse_over(longest, stage.tokens_per_step, f"{stage.name}.tokens_per_step", stage)
            shares = [
                stage.tokens_per_step * weight // sum(stage.weights) - (len(stage.used) > 1)
                for weight in stage.weights
            ]
            clips = {number: self.shuffles[number, stage.size].totals.longest for number in stage.used}
            if not any(clip and clip.num_tokens <= shares[number] for number, clip in clips.items()):
                raise ConfigError(
                    f"{stage.name}.tokens_per_step={stage.tokens_per_step} gives no data set a share that holds its "
                    f"longest clip ({longest.num_tokens} tokens), so that steps could be empty: raise it"
                )


def _refuse_over(clip: LongestClip, limit: int, setting: str, stage: Stage, ranks: int = 1) -> None:
    if clip.num_tokens > limit * ranks:
        on_each = f" on each of the {ranks} ranks that may share it" if ranks > 1 else ""
        raise ConfigError(
            f"clip {clip.key} of {clip.shard} has {clip.num_tokens} tokens ({clip.num_frames} frames of "
            f"{clip.height}x{clip.width}), over {setting}={limit}{on_each}: raise it, or lower "
            f"{stage.name}.size.max_pixels or max_frames"
        )
