"""What did not become part of a data set, by reason: from what curation and index leave beside the shards."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sora_train.data.index import Dataset
from sora_train.data.schema import REJECTS_NAME

CURATION_REJECTS = "rejects.jsonl"  # of data_pipelines.curate
_MOST_CHARACTERS = 200


@dataclass(frozen=True)
class RejectCount:
    """Lines of one stage and one reason."""

    stage: str
    reason: str
    is_note: bool  # on what is in the index all the same
    count: int
    example: str


# Stage, reason, whether a note.
Kind = tuple[str, str, bool]


def count_rejects(dataset: Dataset) -> list[RejectCount]:
    """The most frequent first; none where there is no list. A line that is no reject counts as `unreadable line`."""
    counts: Counter[Kind] = Counter()
    examples: dict[Kind, str] = {}
    for name, read in ((CURATION_REJECTS, _of_curation), (REJECTS_NAME, _of_index)):
        for line in _lines(dataset, name):
            try:
                kind, example = read(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                kind, example = (name, "unreadable line", False), line.decode(errors="replace")
            counts[kind] += 1
            examples.setdefault(kind, example[:_MOST_CHARACTERS])
    return [RejectCount(*kind, count, examples[kind]) for kind, count in counts.most_common()]


def _of_curation(values: dict[str, Any]) -> tuple[Kind, str]:
    # "too small: 20x30 under min_side=32" counts as "too small".
    return (values["stage"], values["reason"].partition(":")[0], False), f"{values['path']}: {values['reason']}"


def _of_index(values: dict[str, Any]) -> tuple[Kind, str]:
    where = f"{values['key']} of {values['shard']}" if values["key"] else values["shard"]
    return ("index", values["reason"], not values["is_sample"]), f"{where}: {values['detail']}"


def _lines(dataset: Dataset, name: str) -> Iterator[bytes]:
    try:
        with dataset.files.open(f"{dataset.folder}/{name}", "rb") as file:
            yield from (line for line in file if line.strip())
    except FileNotFoundError:
        return
