from collections import Counter

import pytest

from sora_train.world.words import HELD_OUT, TRIPLES, parse_prompt, prompt


def test_prompt_is_the_captioners_short_form():
    assert prompt("red", "circle", "left") == "a red circle moving left"
    assert prompt("blue", "square", "still") == "a blue square standing still"
    assert prompt("yellow", "triangle", None) == "a yellow triangle"


def test_parse_prompt_undoes_prompt():
    for color, shape, motion in TRIPLES:
        assert parse_prompt(prompt(color, shape, motion)) == (color, shape, motion)
    assert parse_prompt("a green square") == ("green", "square", None)
    assert parse_prompt("  The RED circle  moving left. ") == ("red", "circle", "left")


@pytest.mark.parametrize(
    "text", ["", "a dog", "a red dog moving left", "a red circle moving", "two red circles", "a red circle and more"]
)
def test_parse_prompt_does_not_guess(text):
    assert parse_prompt(text) is None


def test_held_out_sixth_leaves_every_word_and_every_pair_of_color_and_shape_to_training():
    assert len(TRIPLES) == 60
    assert len(HELD_OUT) == 10
    assert set(TRIPLES) >= HELD_OUT
    colors, shapes, motions = (Counter(words) for words in zip(*HELD_OUT, strict=True))
    assert set(motions.values()) == {2}
    assert set(colors.values()) <= {2, 3}
    assert set(shapes.values()) <= {3, 4}
    assert len({triple[:2] for triple in HELD_OUT}) == 10  # each pair keeps at least four of its five motions
