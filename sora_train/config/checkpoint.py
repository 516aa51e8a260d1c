"""Settings of checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    # Steps between checkpoints; the last step is always saved.
    save_every: int = 500
    # Newest checkpoints kept; older ones are removed after a newer one is complete. 0 keeps all.
    keep: int = 3
