"""What every stage of curation is: a datatrove step that maps one record to records or rejects, and keeps count.

A reject goes to a ledger of the task, which is written anew when an interrupted task runs again. The counts go to
datatrove's statistics of the task, from which the closing table is made: in + new = out + rejected at every stage.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from data_pipelines.media import MediaError
from data_pipelines.record import Record, Reject


class Stage(PipelineStep):
    """Base of the stages. `name` is what the ledger and the table call it."""

    type = "curation"

    def __init__(self, ledgers: Path) -> None:
        """`ledgers`: folder of the rejects, one file a task and stage."""
        super().__init__()
        self.ledgers = ledgers

    @abstractmethod
    def apply(self, record: Record) -> Iterable[Record | Reject]:
        """What becomes of one record. A MediaError raised here rejects the rest of the record with its message."""

    def reject(self, record: Record, reason: str) -> Reject:
        """Drops a record."""
        return Reject(record.key, record.path, self.name, reason)

    def run(self, data: Iterable[Record], rank: int = 0, world_size: int = 1) -> Iterator[Record]:
        """The generator that datatrove chains."""
        self.ledgers.mkdir(parents=True, exist_ok=True)
        with (self.ledgers / f"{rank:06d}-{self.name}.jsonl").open("w", encoding="utf-8") as ledger:
            for record in data:
                self.stat_update("in")
                results = 0
                for result in self._results(record):
                    results += 1
                    if isinstance(result, Reject):
                        self.stat_update("rejected")
                        ledger.write(result.to_json() + "\n")
                    else:
                        self.stat_update("out")
                        yield result
                self.stat_update("new", value=results - 1)

    def _results(self, record: Record) -> Iterator[Record | Reject]:
        results = iter(self.apply(record))
        while True:
            with self.track_time():
                try:
                    result = next(results, None)
                except MediaError as error:
                    result = self.reject(record, str(error))
                    results = iter(())
            if result is None:
                return
            yield result


class Filter(Stage):
    """A stage that keeps a record or rejects it."""

    def apply(self, record: Record) -> Iterator[Record | Reject]:
        """Keeps what `judge` returns, rejects with the reason it gives."""
        result, reason = self.judge(record)
        yield self.reject(record, reason) if result is None else result

    @abstractmethod
    def judge(self, record: Record) -> tuple[Record | None, str]:
        """(the record, "") to keep it, (None, reason) to reject it."""
