"""What did not become part of a data set, by reason: from what curation and index leave beside the shards."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sora_train.data.index import Dataset
from sora_train.data.schema import REJECTS_NAME

CURATION_REJECTS = "rejects.jsonl"  # of data_pipelines.curate
_MOST_CHARACTERS = 200


@dataclass(frozen=True)
class RejectCount:
    """Rejects of one stage for one reason."""

    stage: str
    reason: str
    count: int
    example: str


def count_rejects(dataset: Dataset) -> list[RejectCount]:
    """The most frequent first; none where there is no list. A line that is no reject counts as `unreadable line`."""
    counts: dict[tuple[str, str], int] = {}
    examples: dict[tuple[str, str], str] = {}
    for name, read in ((CURATION_REJECTS, _of_curation), (REJECTS_NAME, _of_index)):
        for line in _lines(dataset, name):
            stage, reason, example = _read(line, read, name)
            counts[stage, reason] = counts.get((stage, reason), 0) + 1
            examples.setdefault((stage, reason), example[:_MOST_CHARACTERS])
    found = [RejectCount(stage, reason, count, examples[stage, reason]) for (stage, reason), count in counts.items()]
    return sorted(found, key=lambda item: (-item.count, item.stage, item.reason))


Reading = tuple[str, str, str]  # stage, reason, example


def _read(line: bytes, read: Callable[[dict[str, str]], Reading], name: str) -> Reading:
    try:
        return read(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return name, "unreadable line", line.decode(errors="replace")


def _of_curation(values: dict[str, str]) -> Reading:
    # "too small: 20x30 under min_side=32" counts as "too small".
    return values["stage"], values["reason"].partition(":")[0], f"{values['path']}: {values['reason']}"


def _of_index(values: dict[str, str]) -> Reading:
    return "index", values["reason"], f"{values['key']} of {values['shard']}: {values['detail']}"


def _lines(dataset: Dataset, name: str) -> Iterator[bytes]:
    try:
        with dataset.files.open(f"{dataset.folder}/{name}", "rb") as file:
            yield from (line for line in file if line.strip())
    except FileNotFoundError:
        return
