"""A measured figure beside its bar: what every benchmark returns, prints as a table and writes as JSON.

Benchmarks run from the root of the repository as modules: `python -m benchmarks.data_balance --json FILE`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One number and what it was measured on. `holds` is None where there is no bar: printed for comparison."""

    name: str
    value: float
    unit: str
    bar: str  # as a person would write it: ">= 0.99"; empty without one
    holds: bool | None
    conditions: str


def print_table(figures: Sequence[Figure]) -> None:
    """One line a figure; the last lines name those that miss their bar."""
    width = max((len(figure.name) for figure in figures), default=0)
    for figure in figures:
        verdict = {True: "holds", False: "MISSES", None: ""}[figure.holds]
        value = f"{figure.value:.5g} {figure.unit}".rstrip()
        print(f"{figure.name:{width}}  {value:24} {figure.bar:14} {verdict:7} {figure.conditions}".rstrip())
    missed = [figure.name for figure in figures if figure.holds is False]
    print(f"{len(figures)} figures, {len(missed)} miss their bar{': ' if missed else ''}{', '.join(missed)}")


def write_json(figures: Sequence[Figure], path: Path) -> None:
    """A list of objects, keys as the fields of Figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")
