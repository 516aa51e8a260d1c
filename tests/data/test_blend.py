"""Several data sets and several stages: shares are kept, and nobody's position is lost when something changes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from corpus import CODEC, MODEL, data_config
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Simulated

from sora_train.config.data import DataConfig, DatasetConfig, Media, SizeChange, SizeConfig, StageConfig
from sora_train.config.root import ConfigError
from sora_train.data.order import Order, PlannedSample
from sora_train.data.stages import build_stages

FULL = SizeConfig(max_pixels=64 * 64, max_frames=17, sampling_fps=8.0)
SMALL = SizeConfig(max_pixels=32 * 32, max_frames=17, sampling_fps=8.0)
SETS = {name: Simulated(shards, 12, name=f"blend-{name}") for name, shards in (("a", 40), ("b", 30), ("c", 20))}
LONGEST = 9 * 64


def blended(
    stages: Sequence[StageConfig] = (),
    sizes: SizeConfig = FULL,
    media: Media = Media.any,
    tokens_per_step: int = 4800,
    **weights: float,
) -> DataConfig:
    datasets = {name: DatasetConfig("unused", weight, media) for name, weight in weights.items()}
    return replace(
        data_config(Path("unused")),
        shards="",
        datasets=datasets,
        stages=list(stages),
        size=sizes,
        tokens_per_step=tokens_per_step,
    )


def build(config: DataConfig, seed: int = 0) -> Order:
    return Order(SETS, config, MODEL, CODEC, seed)  # type: ignore[arg-type]


def clips_of(order: Order, name: str, steps: int) -> list[PlannedSample]:
    """What a data set gives in the first steps, in its order."""
    number = order.names.index(name)
    return [sample for step in range(steps) for sample in order.batch(step).samples if sample.dataset == number]


def keys_of(order: Order, name: str, steps: int) -> list[str]:
    return [sample.row.key for sample in clips_of(order, name, steps)]


def is_stream(keys: list[str], plain: Order, name: str) -> bool:
    """Whether these are the first clips of a data set's stream, as an order without stages has it."""
    shuffle = plain.shuffles[plain.names.index(name), plain.config.size]
    stream = islice(shuffle.clips(0, 10**12), len(keys))
    return len(keys) > 0 and keys == [clip.row.key for clip in stream]


@given(
    st.lists(st.floats(0, 10).map(lambda x: round(x, 3)), min_size=1, max_size=5).filter(lambda x: min(x) > 0.01),
    st.integers(10**4, 10**7),
    st.integers(0, 10**9),
)
@settings(max_examples=200, deadline=None)
def test_shares_are_exact_integers_that_never_drift(weights: list[float], tokens: int, step: int) -> None:
    names = {f"d{i}": DatasetConfig("x", weight) for i, weight in enumerate(weights)}
    (stage,) = build_stages(DataConfig(datasets=names, tokens_per_step=tokens))
    before, after = stage.tokens_after(step), stage.tokens_after(step + 1)
    assert sum(before) == step * tokens
    assert sum(after) == (step + 1) * tokens
    for number, weight in enumerate(weights):
        share = weight / sum(weights) * tokens
        assert abs(after[number] - before[number] - share) < 2
        assert abs(after[number] - share * (step + 1)) < 1 + 1e-9 * after[number]


def test_tokens_are_shared_by_weight_to_within_a_clip() -> None:
    order = build(blended(a=3, b=1))
    given = np.zeros(2)
    for step in range(120):
        batch = order.batch(step)
        for sample in batch.samples:
            given[sample.dataset] += sample.num_tokens
        assert np.abs(given - np.array([0.75, 0.25]) * 4800 * (step + 1)).max() <= LONGEST
        assert abs(batch.num_tokens - 4800) <= 2 * LONGEST
        assert [sample.index for sample in batch.samples] == list(range(len(batch.samples)))


def test_each_data_set_of_a_blend_is_seen_once_an_epoch() -> None:
    order = build(blended(a=1, b=0.75, c=0.5))
    seen = [sample for step in range(130) for sample in order.batch(step).samples]
    for number in range(3):
        clips = int(order.shuffles[number, order.config.size].totals.clips.sum())
        keys = [sample.row.key for sample in seen if sample.dataset == number]
        assert len(keys) > 2 * clips
        for epoch in (keys[:clips], keys[clips : 2 * clips]):
            assert set(Counter(epoch).values()) == {1}


def test_data_sets_are_shuffled_apart_and_by_name() -> None:
    twins = {name: Simulated(40, 12, name="blend-twin") for name in "ab"}
    orders = [Order(twins, blended(**weights), MODEL, CODEC, 0) for weights in ({"a": 1, "b": 1}, {"b": 1, "a": 1})]  # type: ignore[arg-type]
    assert orders[0].batch(7) == orders[1].batch(7)
    assert keys_of(orders[0], "a", 10) != keys_of(orders[0], "b", 10)
    single = Order({"main": twins["a"]}, data_config(Path("x")), MODEL, CODEC, 0)  # type: ignore[dict-item]
    named = replace(data_config(Path("x")), shards="", datasets={"main": DatasetConfig("x")})
    assert Order({"main": twins["a"]}, named, MODEL, CODEC, 0).batch(5) == single.batch(5)  # type: ignore[dict-item]


@pytest.mark.parametrize("new", ["c", "A"])  # before and after the others in the order of names
def test_a_data_set_is_added_and_moves_nobody(new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "A", SETS["c"])
    plain = build(blended(a=3, b=1))
    stages = [StageConfig(20, weights={new: 2.0})]
    grown = build(blended(stages, a=3, b=1, **{new: 0}))
    # Steps before are the same to the last draw.
    for step in range(20):
        for one, other in zip(plain.batch(step).samples, grown.batch(step).samples, strict=True):
            assert replace(one, dataset=0) == replace(other, dataset=0)
            assert plain.names[one.dataset] == grown.names[other.dataset]
    # The others go on where they were; the new one begins at its beginning.
    assert is_stream(keys_of(grown, "a", 60), plain, "a")
    assert is_stream(keys_of(grown, "b", 60), plain, "b")
    assert keys_of(grown, new, 20) == []
    alone = build(blended(**{new: 1.0}))
    assert is_stream(keys_of(grown, new, 60), alone, new)
    shares = Counter(dict.fromkeys(grown.names, 0))
    for step in range(20, 60):
        for sample in grown.batch(step).samples:
            shares[grown.names[sample.dataset]] += sample.num_tokens
    assert shares["a"] / shares.total() == pytest.approx(0.5, abs=0.01)
    assert shares[new] / shares.total() == pytest.approx(1 / 3, abs=0.01)


def test_weights_and_tokens_change_without_losing_a_place() -> None:
    plain = build(blended(a=1, b=1))
    stages = [
        StageConfig(15, weights={"a": 5.0}, tokens_per_step=7200),
        StageConfig(30, weights={"a": 0.0}),
        StageConfig(45, weights={"a": 1.0, "b": 0.25}),
    ]
    staged = build(blended(stages, a=1, b=1))
    for name in "ab":
        assert is_stream(keys_of(staged, name, 70), plain, name)
    assert not [sample for step in range(30, 45) for sample in staged.batch(step).samples if sample.dataset == 0]
    assert np.mean([staged.batch(step).num_tokens for step in range(15, 70)]) == pytest.approx(7200, rel=0.02)


STAGES = (range(13), range(13, 29), range(29, 45))


@pytest.mark.parametrize("media", list(Media))
def test_another_size_goes_on_from_the_same_clip(media: Media) -> None:
    """Over three sizes every clip is seen in the order of the unstaged run: none lost, none repeated."""
    plain = build(blended(media=media, a=2, b=1))
    stages = [
        StageConfig(13, size=SizeChange(max_frames=17, max_pixels=64 * 64)),
        StageConfig(29, size=SizeChange(sampling_fps=4.0), tokens_per_step=9600),
    ]
    first = replace(SMALL, max_frames=1)
    staged = build(blended(stages, first, media=media, tokens_per_step=1200, a=2, b=1))
    for name in "ab":
        assert is_stream(keys_of(staged, name, 45), plain, name)
    parts = [[sample.size for step in steps for sample in staged.batch(step).samples] for steps in STAGES]
    images = media is Media.image
    assert [max(size.num_frames for size in part) for part in parts] == ([1, 1, 1] if images else [1, 17, 9])
    assert [max(size.frame_step for size in part) for part in parts] == [1, 1, 2]
    # From any step, as if it had never run before.
    assert build(blended(stages, first, media=media, tokens_per_step=1200, a=2, b=1)).batch(35) == staged.batch(35)


def test_a_data_set_that_rests_is_taken_up_under_another_size() -> None:
    plain = build(blended(a=1, b=1))
    stages = [
        StageConfig(10, weights={"a": 0.0}),
        StageConfig(20, size=SizeChange(max_pixels=32 * 32)),
        StageConfig(30, weights={"a": 1.0}, size=SizeChange(max_frames=5)),
    ]
    staged = build(blended(stages, a=1, b=1))
    for name in "ab":
        assert is_stream(keys_of(staged, name, 50), plain, name)
    # It was never asked for at the size that it sat out.
    assert (0, SMALL) not in staged.shuffles


def test_a_stage_boundary_costs_a_window_each() -> None:
    stages = [StageConfig(10**6 * i, size=SizeChange(max_frames=frames)) for i, frames in ((1, 9), (2, 5))]
    order = build(blended(stages, a=1, b=1))
    for dataset in SETS.values():
        dataset.loads.clear()
    assert order.batch(2 * 10**6 + 5).samples
    # All 40 shards of `a` make one window: one for the step, and two at each of two boundaries.
    assert len(SETS["a"].loads) <= 40 * 5


def test_media_are_taken_apart() -> None:
    images, videos = (build(blended(media=media, a=1)) for media in (Media.image, Media.video))
    assert {sample.row.num_frames for step in range(20) for sample in images.batch(step).samples} == {1}
    assert {sample.row.num_frames for step in range(20) for sample in videos.batch(step).samples} == {5, 9, 17}
    assert {sample.row.num_frames for sample in images.validation_samples(10)} == {1}


def test_held_out_sources_are_held_out_of_every_data_set_and_stage() -> None:
    stages = [StageConfig(20, weights={"c": 1.0}, size=SizeChange(max_frames=9))]
    order = build(blended(stages, a=1, b=1, c=0))
    held = order.validation_samples(10**6)
    trained = {sample.row.source_sha256 for step in range(150) for sample in order.batch(step).samples}
    assert not trained & {sample.row.source_sha256 for sample in held}
    totals = [order.shuffles[number, order.stages[-1].size].totals for number in range(3)]
    assert len(held) == sum(int(total.held_out.sum()) for total in totals)
    assert len({(sample.dataset, sample.row.key) for sample in held}) == len(held)
    # In turn, at the size that the run comes to, the middle of each.
    assert [sample.dataset for sample in held[:6]] == [0, 1, 2, 0, 1, 2]
    assert max(sample.size.num_frames for sample in held) == 9
    assert {sample.size.first_frame for sample in held if sample.row.num_frames == 17} == {4}
    assert order.validation_samples(7) == held[:7]


def test_validation_reads_no_more_shards_than_it_needs() -> None:
    order = build(blended(a=1))
    SETS["a"].loads.clear()
    assert len(order.validation_samples(3)) == 3
    assert len(SETS["a"].loads) <= 3


def test_the_part_of_a_long_clip_is_drawn_anew_each_epoch() -> None:
    short = SizeConfig(64 * 64, 5, 8.0)
    order = build(blended(sizes=short, a=1, b=1))
    long = [sample for sample in clips_of(order, "a", 300) if sample.row.num_frames == 17]
    starts = Counter(sample.size.first_frame for sample in long)
    assert set(starts) == set(range(13))  # 17 frames, 5 of them: 0 to 12
    assert max(starts.values()) < 2 * len(long) / 13
    by_clip: dict[str, list[int]] = {}
    for sample in long:
        by_clip.setdefault(sample.row.key, []).append(sample.size.first_frame)
    assert sum(len(set(places)) > 1 for places in by_clip.values()) > 0.8 * len(by_clip)
    # Keyed by epoch and clip alone: at another step, beside others, the same part.
    alone = build(blended(sizes=short, a=1))
    parts = {sample.row.key: sample.size for sample in reversed(clips_of(alone, "a", 20))}
    first = {sample.row.key: sample.size for sample in reversed(long)}
    both = parts.keys() & first.keys()
    assert len(both) > 30
    assert all(parts[key] == first[key] for key in both)


def test_settings_that_cannot_work_are_named() -> None:
    def stage(**changes: object) -> DataConfig:
        return blended([replace(StageConfig(10), **changes)], a=1, b=1)  # type: ignore[arg-type]

    cases = {
        r"data\.datasets gives a the weight -1": blended(a=-1, b=1),
        r"data\.datasets gives a the weight nan": blended(a=float("nan"), b=1),
        r"data\.datasets gives every data set the weight 0": blended(a=0),
        r"data\.datasets\.a holds no image outside": replace(blended(media=Media.image, a=1), held_out_fraction=1.0),
        r"data\.held_out_fraction=nan is no share": replace(blended(a=1), held_out_fraction=float("nan")),
        r"data gives b less than 2 of 4800 tokens per step": blended(a=1, b=1e-5),
        r"data\.stages\[0\]\.start_step=0: choose more than 0": stage(start_step=0),
        r"data\.stages\[0\]\.weights names x: the data sets are a, b": stage(weights={"x": 1.0}),
        r"data\.stages\[0\]\.weights gives a the weight -2": stage(weights={"a": -2.0}),
        r"data\.stages\[0\]\.weights gives every data set the weight 0": stage(weights={"a": 0.0, "b": 0.0}),
        r"data\.stages\[0\]\.size\.max_frames=0 fits no clip": stage(size=SizeChange(max_frames=0)),
        r"data\.stages\[0\]\.tokens_per_step=0: choose 1 or more": stage(tokens_per_step=0),
        r"over data\.stages\[0\]\.tokens_per_step=300: raise it, or lower data\.stages\[0\]\.size": stage(
            tokens_per_step=300
        ),
        r"data\.tokens_per_step=700 gives no data set a share that holds its longest clip \(576 tokens\)": blended(
            tokens_per_step=700, a=1, b=1
        ),
        r"data\.stages\[1\]\.start_step=10: choose more than 10": blended([StageConfig(10), StageConfig(10)], a=1),
    }
    for message, config in cases.items():
        with pytest.raises(ConfigError, match=message):
            build(config)


def test_no_step_is_empty_where_one_share_holds_every_clip() -> None:
    order = build(blended(tokens_per_step=1200, a=1, b=1))
    assert all(order.batch(step).samples for step in range(300))
    # That share need not be everyone's.
    order = build(blended(tokens_per_step=700, a=9, b=1))
    assert all(order.batch(step).samples for step in range(300))


def test_the_longest_clip_of_each_stage_is_known_by_name() -> None:
    stages = [StageConfig(10, size=SizeChange(max_frames=5))]
    order = build(blended(stages, a=1))
    assert [longest.num_tokens for longest in order.longest] == [9 * 64, 3 * 64]
    with pytest.raises(ConfigError, match=r"clip \w+ of blend-a\d+\.tar has 576 tokens \(17 frames of 64x64\), over"):
        order.refuse_over(500, "data.max_tokens_per_pack")
    order.refuse_over(576, "data.max_tokens_per_pack")


def test_steps_meet_without_gap_or_overlap() -> None:
    """Where one step ends the next begins, across windows, epochs and stages."""
    stages = [StageConfig(start, tokens_per_step=2400 + start) for start in (7, 19, 40)]
    order = build(blended(stages, a=1, b=2))
    assert is_stream(keys_of(order, "b", 100), build(blended(b=1)), "b")
