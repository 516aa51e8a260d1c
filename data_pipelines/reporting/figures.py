"""The charts of the report: small SVGs that stand in the page and take their colors from it, light or dark."""

import io
import math
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

# Stand for the page's colors: matplotlib writes them, CSS variables replace them.
_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_SERIES = tuple(f"#0a0a0{number}" for number in range(1, 7))
_VARIABLES = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES, 1)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "report",  # the same figure gives the same bytes
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": _SOFT,
    "legend.handlelength": 0.9,
    "legend.handleheight": 0.9,
}
_MAGNITUDES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_INCHES = (4.3, 2.3)  # the page scales them
_BINS = 40
_ASPECTS = {"1:4": 0.25, "9:16": 9 / 16, "3:4": 0.75, "1:1": 1.0, "4:3": 4 / 3, "16:9": 16 / 9, "4:1": 4.0}

Values = NDArray[np.float64]


def histogram(
    series: Mapping[str, ArrayLike], label: str, log: bool = False, limit: tuple[float, str] | None = None
) -> str:
    """Counts of values, stacked by series, as an SVG element; empty when there are no values.

    Args:
        series: values by name, at most six names, whose order gives them their colors; a single one gets no legend.
        label: what is counted, with its unit.
        log: bins of equal ratio, for values over 0 that spread wide.
        limit: a value to draw a line at, and its name; left out where it lies far beyond all values.
    """
    named, values = _columns(series)
    if not len(values):
        return ""
    low, high = float(values.min()), float(values.max())
    with matplotlib.rc_context(_STYLE):
        figure, axes = _chart(label)
        if log and low > 0 and high > 3 * low:
            edges = np.geomspace(low, high, _BINS + 1)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            edges = np.linspace(low, high, _BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=bool((values % 1 == 0).all())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        _draw(axes, named, edges)
        if limit is not None and limit[0] <= 3 * high:
            axes.set_ylim(0, 1.18 * axes.get_ylim()[1])  # room for its name above the bars
            axes.axvline(limit[0], color=_INK, linewidth=1, linestyle=(0, (4, 3)))
            above = axes.get_xaxis_transform()
            axes.text(limit[0], 0.99, f"{limit[1]} ", transform=above, ha="right", va="top", color=_INK)
        return _svg(figure)


def aspects(series: Mapping[str, ArrayLike]) -> str:
    """Counts of width over height, on an axis on which 9:16 and 16:9 lie equally far from 1:1."""
    named, values = _columns(series)
    if not len(values):
        return ""
    low, high = min(0.5, float(values.min())), max(2.0, float(values.max()))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _chart("width : height")
        axes.set_xscale("log")
        _draw(axes, named, np.geomspace(low, high, _BINS + 1))
        marks = {name: value for name, value in _ASPECTS.items() if high < 5 * low or name not in ("3:4", "4:3")}
        axes.xaxis.set_major_locator(FixedLocator(list(marks.values())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _aspect_name(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        return _svg(figure)


def short(number: float) -> str:
    """1234567 -> 1.23M; numbers under 10,000 as they are."""
    if abs(number) < 10_000:
        return f"{number:,.6g}"
    size, letter = next((size, letter) for size, letter in _MAGNITUDES if abs(number) >= size)
    digits = 0 if abs(number) >= 100 * size else 2
    return f"{number / size:.{digits}f}".rstrip("0").rstrip(".") + letter if digits else f"{number / size:.0f}{letter}"


def _columns(series: Mapping[str, ArrayLike]) -> tuple[dict[str, Values], Values]:
    """By name, and all together."""
    named = {name: np.asarray(values, dtype=np.float64) for name, values in series.items()}
    return named, np.concatenate([*named.values(), np.zeros(0)])


def _chart(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_INCHES)
    figure.patch.set_visible(False)
    axes = figure.add_axes((0.09, 0.2, 0.87, 0.76))
    axes.patch.set_visible(False)
    axes.set_xlabel(label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure, axes


def _draw(axes: Axes, named: dict[str, Values], edges: Values) -> None:
    # A name has its color by its place in the series, in every chart the same, whether or not others have values.
    colors = {name: color for (name, values), color in zip(named.items(), _SERIES, strict=False) if len(values)}
    stacks = [named[name] for name in colors]
    axes.hist(stacks, edges.tolist(), stacked=True, color=list(colors.values()), label=list(colors), rwidth=0.92)
    if len(named) > 1:
        ncols = 3 if sum(map(len, colors)) <= 30 else 2
        axes.set_position((0.09, 0.2, 0.87, 0.76 - 0.09 * math.ceil(len(colors) / ncols)))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, borderaxespad=0.2, borderpad=0)


def _aspect_name(value: float) -> str:
    return min(_ASPECTS, key=lambda name: abs(_ASPECTS[name] - value))


def _svg(figure: Figure) -> str:
    """The SVG element, without what a document of its own would need and what would reach beyond it in a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    start, end, rest = text.partition(">")
    text = re.sub(r' (width|height|version|xmlns(:\w+)?)="[^"]*"', "", start) + end + rest
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)  # a style of all elements, remarks
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)  # names of parts, the same in every figure
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text
