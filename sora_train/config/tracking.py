"""Settings of metrics and where they go."""

from dataclasses import dataclass
from enum import Enum


class WandbMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass(frozen=True)
class TrackingConfig:
    # metrics.jsonl in the run directory is always written; W&B beside it.
    wandb: WandbMode = WandbMode.offline
    project: str = "sora_train"
    # W&B group; the jobs of a sweep share one.
    group: str | None = None
    log_every: int = 10
