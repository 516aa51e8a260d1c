"""Where metrics go: always RUN_DIR/metrics.jsonl, W&B beside it, a progress bar or plain lines on the terminal.

Everything carries our own step: W&B's counter restarts at 0 when an offline run is resumed.
"""

import json
import logging
import math
import os
import secrets
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sora_train.config.root import ConfigError, TrainConfig
from sora_train.config.tracking import WandbMode
from sora_train.training.metrics import Means

METRICS = "metrics.jsonl"
_RUN_ID = "wandb_run_id"

log = logging.getLogger(__name__)


class Tracker:
    """Takes metrics on rank 0; on other ranks it does nothing."""

    def __init__(self, config: TrainConfig, resolved: dict[str, Any], *, enabled: bool, start_step: int) -> None:
        """`resolved` is the config as plain values. Lines after `start_step` steps, left by a run that was killed after
        its last checkpoint, are dropped: the same steps come again."""
        self.enabled = enabled
        if not enabled:
            return
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        drop_after(run_dir / METRICS, start_step)
        self._file = (run_dir / METRICS).open("a")
        self._wandb = _start_wandb(config, resolved, run_dir)
        console = Console(stderr=True)
        self._quiet_since = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.fields[name]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            "train", total=config.steps, completed=start_step, name=config.name, shown=""
        )
        self._steps = config.steps

    def log(self, step: int, means: Means, more: dict[str, float]) -> None:
        """After `step` steps: a line for each step since the last call with its loss; the last has all means too."""
        if not self.enabled:
            return
        numbers = range(step - len(means.step_losses) + 1, step + 1)
        for number, loss in zip(numbers, means.step_losses, strict=True):
            row = {"step": number, "loss": loss}
            self._write(row | means.values | more if number == step else row)
        if self._wandb is not None:
            self._wandb.log({"step": step, "loss": means.loss, **means.values, **more})
        shown = f"loss {means.loss:.4f}  {means.values['tokens_per_second']:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, shown=shown)
        if self._progress.disable:
            self._print_line(step, shown, means.values["step_seconds"])

    def _write(self, row: dict[str, Any]) -> None:
        # JSON has no NaN: a gradient norm that overflowed is null.
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def _print_line(self, step: int, shown: str, step_seconds: float) -> None:
        """Into a log file, a line every ten seconds at most."""
        if time.monotonic() - self._quiet_since >= 10 or step == self._steps:
            self._quiet_since = time.monotonic()
            left = (self._steps - step) * step_seconds
            log.info("step %d/%d  %s  %.0f s left", step, self._steps, shown, left)

    def log_validation(self, step: int, values: dict[str, float], videos: dict[str, Path]) -> None:
        """Held-out losses and sampled videos (prompt -> mp4) after `step` steps."""
        if not self.enabled:
            return
        named = {str(path.name): prompt for prompt, path in videos.items()}
        self._write({"step": step, **values, **({"samples": named} if named else {})})
        if self._wandb is not None:
            import wandb

            media = {f"samples/{prompt}": wandb.Video(str(path)) for prompt, path in videos.items()}
            self._wandb.log({"step": step, **values, **media})

    def close(self, exit_code: int = 0) -> None:
        """Flushes and ends the W&B run."""
        if not self.enabled:
            return
        self._progress.stop()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)


def _start_wandb(config: TrainConfig, resolved: dict[str, Any], run_dir: Path) -> Any:
    if config.tracking.wandb is WandbMode.disabled:
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    id_file = run_dir / _RUN_ID  # one W&B run per run directory, however often it is resumed
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    try:
        run = wandb.init(
            project=config.tracking.project,
            name=config.name,
            group=config.tracking.group,
            id=id_file.read_text().strip(),
            resume="allow",
            mode=config.tracking.wandb.value,
            dir=str(run_dir),
            config=resolved,
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"tracking.wandb={config.tracking.wandb.value}: {reason}; or use offline") from error
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def drop_after(path: Path, step: int) -> None:
    """Keeps the lines of a metrics file up to `step` steps; a line cut off by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]
