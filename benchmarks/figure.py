"""A measured figure beside its bar: what every benchmark returns, prints as a table and writes as JSON.

Benchmarks run from the root of the repository as modules: `python -m benchmarks.data_balance --json FILE`.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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


def run_parts(
    parser: ArgumentParser, arguments: Namespace, parts: Mapping[str, Callable[[], list[Figure]]], place: str = ""
) -> None:
    """Measures the parts that `--parts` names, prints each and writes what there is so far to `--json`.

    Args:
        parser: says what is wrong with the arguments.
        arguments: `parts`, separated by commas, and `json`.
        parts: what measures each.
        place: added to the conditions of every figure.

    Ends the program: exit code 1 when a figure misses its bar, 2 for a part that there is not.
    """
    names = arguments.parts.split(",")
    if unknown := set(names) - set(parts):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: the parts are {', '.join(parts)}")
    found: list[Figure] = []
    for name in names:
        print(f"\n{name}", flush=True)
        measured = parts[name]()
        figures = [replace(each, conditions="; ".join(filter(None, (each.conditions, place)))) for each in measured]
        print_table(figures)
        found += figures
        if arguments.json:
            write_json(found, arguments.json)  # after each part: what has been measured is kept
    raise SystemExit(any(figure.holds is False for figure in found))
