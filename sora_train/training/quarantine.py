"""The ledger of clips that could not be read: RUN_DIR/quarantine.jsonl, a line each: key, shard, reason, step.

A clip that failed at a step had weight 0 in it. The same step done again, after a kill or on other ranks, masks the
same clips without trying them: a file that fails by chance must not make a resumed run another run. At a later epoch
a clip is tried again.
"""

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sora_train.config.root import ConfigError
from sora_train.data.pack import Failure
from sora_train.training.checkpoint_folders import complete_checkpoints
from sora_train.training.fragment_files import LEDGER, DamagedCheckpointError, read_manifest, verify_file
from sora_train.training.places import Folder

# Fewer clips than this say nothing about a share.
ENOUGH_CLIPS = 100

log = logging.getLogger(__name__)


class Quarantine:
    """What this run's ranks could not read so far, and what failed when the run was here before."""

    def __init__(self, run_dir: Path, max_bad_share: float) -> None:
        self.path = run_dir / LEDGER
        self.max_bad_share = max_bad_share
        self._failed, self._clips = 0, 0
        steps: dict[int, set[tuple[str, str]]] = defaultdict(set)
        for row in read_ledger(self.path):
            steps[row["step"]].add((row["shard"], row["key"]))
        # Step -> (shard, key) of the clips that are masked in it.
        self.masked: Mapping[int, frozenset[tuple[str, str]]] = {step: frozenset(at) for step, at in steps.items()}

    def add(self, step: int, failures: Iterable[Failure]) -> None:
        """Clips that failed on this rank in a step; on disk before the step is saved."""
        for failure in failures:
            log.warning("quarantined %s of %s: %s", failure.key, failure.shard, failure.reason)
            _append(self.path, {**asdict(failure), "step": step})

    def check(self, failed: int, clips: int) -> None:
        """After a log step: adds its failed and its trained clips on all ranks. Every rank asks with the same numbers.

        Raises:
            ConfigError: more than the allowed share of clips failed since the run was started or resumed.
        """
        self._failed, self._clips = self._failed + failed, self._clips + failed + clips
        if self._clips >= ENOUGH_CLIPS and self._failed > self.max_bad_share * self._clips:
            # A clip that ranks share may have failed on several.
            reasons = Counter({_place(row): row["reason"] for row in read_ledger(self.path)}.values())
            summary = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            raise ConfigError(
                f"{self._failed} of {self._clips} clips could not be read (in {self.path}: {summary}), over "
                f"data.max_bad_share={self.max_bad_share}: mend the shards, or raise it"
            )


def restore_ledger(run_dir: Path, checkpoints: Folder) -> None:
    """Adds what the newest checkpoint's ledger holds and the run directory's has lost. For one rank, at the start. A
    damaged one is passed over, as `Checkpoints.load_latest` will."""
    known = {_place(row) for row in read_ledger(run_dir / LEDGER)}
    for folder in complete_checkpoints(checkpoints):
        try:
            for entry in (entry for entry in read_manifest(folder)["files"] if entry["name"] == LEDGER):
                verify_file(folder, entry)
                for row in read_ledger(folder / LEDGER):
                    if _place(row) not in known:
                        _append(run_dir / LEDGER, row)
            return
        except DamagedCheckpointError:
            continue


def read_ledger(path: Folder) -> list[dict[str, Any]]:
    """The whole lines of a ledger. One that a kill cut off is passed over: its clip fails and is written again."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]


def _place(row: dict[str, Any]) -> tuple[int, str, str]:
    return row["step"], row["shard"], row["key"]


def _append(path: Path, row: dict[str, Any]) -> None:
    # Several ranks write here: each line in one call, to where the file ends at that moment, away from a cut-off one.
    with path.open("a+b", buffering=0) as ledger:
        end = ledger.seek(0, os.SEEK_END)
        is_cut = end > 0 and os.pread(ledger.fileno(), 1, end - 1) != b"\n"
        ledger.write((b"\n" if is_cut else b"") + json.dumps(row).encode() + b"\n")
