"""Settings of checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    # Steps between checkpoints; the last step is always saved.
    save_every: int = 500
    # Where they go: a folder, of this run alone, or an fsspec URL (s3://…), that all ranks reach. Empty:
    # RUN_DIR/checkpoints.
    folder: str = ""
    # Newest checkpoints kept; older ones are removed after a newer one is complete. 0 keeps all.
    keep: int = 3
    # Of the older ones, those that stay all the same: of the last so many hours, and of every so many steps (0: none).
    keep_hours: float = 0
    keep_every: int = 0
