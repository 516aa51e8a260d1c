"""The words of the procedural world: colors, shapes and motions, the prompts made of them, and the triples held out.

Part of world/, the ground truth on which the demo trains and by which its samples are judged.
"""

import itertools
import re

# sRGB, 8 bit. Far apart in hue, so that a color is still the same color after 4:2:0 video coding.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (35, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 205, 35),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down", "still")

Triple = tuple[str, str, str]  # color, shape, motion
TRIPLES: tuple[Triple, ...] = tuple(itertools.product(COLORS, SHAPES, MOTIONS))

# A sixth of the triples. Each motion is in two of them, each color in two or three, each shape in three or four, and
# no color-shape pair in more than one: what generation must combine anew has been seen apart.
HELD_OUT: frozenset[Triple] = frozenset(
    {
        ("red", "circle", "left"),
        ("red", "triangle", "up"),
        ("red", "square", "still"),
        ("green", "square", "right"),
        ("green", "triangle", "down"),
        ("blue", "square", "up"),
        ("blue", "circle", "down"),
        ("blue", "triangle", "left"),
        ("yellow", "circle", "right"),
        ("yellow", "triangle", "still"),
    }
)

_PROMPT = re.compile(
    rf"(?:an? |the )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
    rf"(?: moving ({'|'.join(motion for motion in MOTIONS if motion != 'still')})| standing (still))?\.?"
)


def prompt(color: str, shape: str, motion: str | None) -> str:
    """The short caption of one object: "a red circle moving left", "a red circle standing still", and for an image,
    whose motion is unknowable (None), "a red circle"."""
    if motion is None:
        return f"a {color} {shape}"
    return f"a {color} {shape} standing still" if motion == "still" else f"a {color} {shape} moving {motion}"


def parse_prompt(text: str) -> tuple[str, str, str | None] | None:
    """The (color, shape, motion) a prompt asks for; None when the text is not of the form `prompt` writes."""
    match = _PROMPT.fullmatch(" ".join(text.lower().split()))
    if match is None:
        return None
    color, shape, direction, still = match.groups()
    return color, shape, direction or still
