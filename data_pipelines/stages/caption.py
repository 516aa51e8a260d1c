"""Fifth stage: captions. The original is kept; the built-in captioner adds a short and a dense one from the pixels."""

from dataclasses import replace
from pathlib import Path

from data_pipelines.record import Record
from data_pipelines.stages.describe import MODEL, describe
from data_pipelines.stages.stage import Filter
from sora_train.data.schema import Caption, Origin, Style


class CaptionPixels(Filter):
    """Adds the captions; rejects nothing."""

    name = "caption"

    def __init__(self, ledgers: Path) -> None:
        super().__init__(ledgers)
        self.model = MODEL

    def judge(self, record: Record) -> tuple[Record | None, str]:
        """See Filter."""
        assert record.view is not None
        short, dense = describe(record.view)
        captions = [
            Caption(short, Origin.recaption, Style.short, self.model),
            Caption(dense, Origin.recaption, Style.dense, self.model),
        ]
        if record.original_caption:
            captions.insert(0, Caption(record.original_caption, Origin.original, Style.short))
        return replace(record, captions=tuple(captions), view=None), ""
