"""Which caption is taken, when, and what text is made of it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpus import CODEC, MODEL, data_config
from simulated import Simulated

from sora_train.config.data import CaptionConfig, CaptionPoint
from sora_train.config.root import ConfigError
from sora_train.data.caption_text import MAX_CAPTION_BYTES
from sora_train.data.captions import check_captions, choose_caption, spoken, weights_at
from sora_train.data.draws import Purpose, generator
from sora_train.data.order import Order
from sora_train.data.schema import Caption, CaptionEntry, IndexRow, Origin, Style

KINDS = ("original/short", "recaption/short", "recaption/short", "recaption/dense")
FIELDS = {"subject": "a fox", "camera": {"moves": ["pan", "tilt"]}, "light": "dusk", "count": 3}


def row(*kinds: str) -> IndexRow:
    return IndexRow("a", "mp4", 0, 0, 9, 8.0, 64, 64, 1.0, "0" * 64, tuple(CaptionEntry(kind, 9) for kind in kinds))


def shares(weights: dict[str, float], kinds: tuple[str, ...] = KINDS, dropout: float = 0.0) -> dict[int | None, float]:
    count = 3000
    picks = Counter(
        choose_caption(row(*kinds), weights, dropout, generator(0, 0, i, Purpose.caption)) for i in range(count)
    )
    return {pick: number / count for pick, number in picks.items()}


def test_a_kinds_weight_is_shared_by_its_captions() -> None:
    found = shares({"original/short": 0.2, "recaption/short": 0.6, "recaption/dense": 0.2, "original/dense": 5.0})
    assert found == pytest.approx({0: 0.2, 1: 0.3, 2: 0.3, 3: 0.2}, abs=0.03)


def test_dropout_alone_decides_how_often_there_is_none() -> None:
    assert shares({"recaption/dense": 1.0}, dropout=0.25) == pytest.approx({None: 0.25, 3: 0.75}, abs=0.03)
    assert set(shares({"original/dense": 1.0})) == {0, 1, 2, 3}, "none has weight: any"
    assert shares({"original/short": 1.0}, kinds=()) == {None: 1.0}


def test_weights_follow_the_schedule() -> None:
    points = [
        CaptionPoint(100, {"original/short": 1.0}),
        CaptionPoint(200, {"recaption/dense": 2.0}),
        CaptionPoint(300, {"recaption/dense": 2.0}),
    ]
    config = CaptionConfig(weights={"recaption/short": 1.0}, schedule=points)
    assert weights_at(config, 0) == {"original/short": 1.0}
    assert weights_at(config, 100) == {"original/short": 1.0, "recaption/dense": 0.0}
    assert weights_at(config, 125) == pytest.approx({"original/short": 0.75, "recaption/dense": 0.5})
    assert weights_at(config, 200) == weights_at(config, 10**9) == {"recaption/dense": 2.0}
    assert weights_at(CaptionConfig(weights={"recaption/short": 1.0}), 5) == {"recaption/short": 1.0}


def test_training_takes_the_captions_of_its_step() -> None:
    points = [CaptionPoint(10, {"original/short": 1.0}), CaptionPoint(30, {"recaption/short": 1.0})]
    config = data_config(Path("x"), captions=CaptionConfig(schedule=points, dropout=0.0))
    order = Order({"main": Simulated(40, 12)}, config, MODEL, CODEC, 0)  # type: ignore[dict-item]

    def share_of_second(steps: range) -> float:
        picks = [sample.caption for step in steps for sample in order.batch(step).samples]
        return sum(pick == 1 for pick in picks) / len(picks)

    assert share_of_second(range(10)) == 0
    assert share_of_second(range(12, 20)) == pytest.approx(0.28, abs=0.12)
    assert share_of_second(range(22, 29)) == pytest.approx(0.75, abs=0.12)
    assert share_of_second(range(30, 50)) == 1
    assert {sample.caption for sample in order.validation_samples(50)} == {1}, "those of the end of training"


def structured(text: str) -> Caption:
    return Caption(text, Origin.recaption, Style.structured)


def say(caption: Caption, field_dropout: float = 0.0, index: int = 0) -> str:
    return spoken(caption, CaptionConfig(field_dropout=field_dropout), generator(3, 5, index, Purpose.caption_field))


def test_fields_of_a_structured_caption_are_left_out() -> None:
    caption = structured(json.dumps(FIELDS, indent=2))
    assert say(caption) == json.dumps(FIELDS)
    texts = [json.loads(say(caption, 0.4, i)) for i in range(2000)]
    assert all(text == {name: FIELDS[name] for name in text} for text in texts)
    assert all(list(text) == [name for name in FIELDS if name in text] for text in texts)
    for name in FIELDS:
        # Each stays with 0.6, and a quarter of the 0.4^4 in which none would.
        assert np.mean([name in text for text in texts]) == pytest.approx(0.6 + 0.4**4 / 4, abs=0.03)
    assert say(caption, 0.4, 7) == say(caption, 0.4, 7)
    alone = Counter(tuple(json.loads(say(caption, 1.0, i))) for i in range(400))
    assert set(alone) == {(name,) for name in FIELDS}, "one field stays, and not always the same"
    assert min(alone.values()) > 60


@pytest.mark.parametrize(
    "text",
    ["not json", '{"a": 1', "[1, 2]", "{}", "3", "", "[" * 5000, '{"a": ' + "9" * 5000 + "}", '{"a":' * 5000],
)
def test_what_is_no_json_object_is_taken_as_it_is(text: str) -> None:
    assert say(structured(text), 0.9) == text


def test_other_captions_lose_nothing() -> None:
    caption = Caption(json.dumps(FIELDS), Origin.recaption, Style.dense)
    assert say(caption, 1.0) == caption.text


def test_text_is_safe_to_hand_on() -> None:
    assert say(Caption("a\x00b\x1b[31mc\x7f\x85d\ud800e", Origin.original, Style.short)) == "a b [31mc  d e"
    assert say(structured('{"a": "x\\ud800y\\u0000"}')) == '{"a": "x y\\u0000"}'
    assert len(say(Caption("x" * 10**6, Origin.original, Style.short))) == MAX_CAPTION_BYTES
    assert len(say(structured(json.dumps({"a": "x" * 10**6})))) == MAX_CAPTION_BYTES
    say(structured('{"a": "\\ud800"}')).encode()


def test_settings_that_cannot_work_are_named() -> None:
    cases = {
        "captions.weights names 'recaption/shrt': the kinds are": CaptionConfig(weights={"recaption/shrt": 1.0}),
        "captions.weights gives original/short -1": CaptionConfig(weights={"original/short": -1.0}),
        r"schedule\[1\].weights gives original/short nan": CaptionConfig(
            schedule=[CaptionPoint(0), CaptionPoint(1, {"original/short": float("nan")})]
        ),
        r"schedule\[0\].step=-1": CaptionConfig(schedule=[CaptionPoint(-1)]),
        r"schedule\[1\].step=5: choose 0 or more, and more": CaptionConfig(schedule=[CaptionPoint(5), CaptionPoint(5)]),
        "captions.dropout=1.5 is no share": CaptionConfig(dropout=1.5),
        "captions.field_dropout=nan is no share": CaptionConfig(field_dropout=float("nan")),
    }
    for message, config in cases.items():
        with pytest.raises(ConfigError, match=message):
            check_captions(config)


def test_an_empty_caption_is_never_chosen() -> None:
    full = row("recaption/short")
    empty = CaptionEntry("recaption/short", 0)
    mixed = replace(full, captions=(empty, *full.captions, empty))
    for weights in ({"recaption/short": 1.0}, {"original/short": 1.0}):
        picks = {choose_caption(mixed, weights, 0.0, generator(0, 0, i, Purpose.caption)) for i in range(50)}
        assert picks == {1}
    without = replace(full, captions=(empty,))
    assert choose_caption(without, {}, 0.0, generator(0, 0, 0, Purpose.caption)) is None
