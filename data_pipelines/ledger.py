"""The books of a curation run: how many records each stage saw, and that none was lost.

Stages count in datatrove's statistics, one file a task; the rejects of a task lie in one file a stage. Here they are
added up, held against each other, and shown.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table


@dataclass(frozen=True)
class StageCount:
    """One line of the closing table; `new` are clips beyond the first of each source."""

    stage: str
    num_in: int
    num_new: int
    num_out: int
    num_rejected: int


def read_counts(statistics: Path, stages: tuple[str, ...]) -> tuple[StageCount, ...]:
    """Adds up datatrove's stats of every task (statistics/00000.json, ...), stage by stage."""
    totals = {stage: dict.fromkeys(("in", "new", "out", "rejected"), 0) for stage in stages}
    for path in sorted(statistics.glob("*.json")):
        for entry in json.loads(path.read_bytes()):
            stage = entry["name"].rpartition(": ")[2]
            for label, value in entry["stats"].items():
                # datatrove writes a bare number where every update added one.
                totals[stage][label] += round(value["total"] if isinstance(value, dict) else value)
    return tuple(StageCount(stage, t["in"], t["new"], t["out"], t["rejected"]) for stage, t in totals.items())


def check_counts(counts: tuple[StageCount, ...], num_sources: int, num_rejects: int) -> None:
    """Raises RuntimeError when a record was lost: between stages, within one, or on the way to rejects.jsonl."""
    before = num_sources
    for count in counts:
        if count.num_in != before or count.num_in + count.num_new != count.num_out + count.num_rejected:
            raise RuntimeError(f"records were lost at {count.stage}: {before} came, {count}")
        before = count.num_out
    rejected = sum(count.num_rejected for count in counts)
    if rejected != num_rejects:
        raise RuntimeError(f"{rejected} rejects were counted, {num_rejects} were written")


def merge_rejects(ledgers: Path, stages: tuple[str, ...]) -> list[str]:
    """The lines of every task's ledgers, by task, then stage."""
    lines: list[str] = []
    for path in sorted(ledgers.glob("*.jsonl"), key=lambda path: _task_and_stage(path, stages)):
        lines += path.read_text(encoding="utf-8").splitlines()
    return lines


def _task_and_stage(path: Path, stages: tuple[str, ...]) -> tuple[str, int]:
    task, _, stage = path.stem.partition("-")
    return task, stages.index(stage)


def counts_table(counts: tuple[StageCount, ...]) -> Table:
    """The closing table."""
    table = Table(caption="in + new = out + rejected; a source of several scenes gives new clips")
    table.add_column("stage")
    for name in ("in", "new", "out", "rejected"):
        table.add_column(name, justify="right")
    for count in counts:
        numbers = (count.num_in, count.num_new, count.num_out, count.num_rejected)
        table.add_row(count.stage, *(str(number) for number in numbers))
    return table
