"""Checkpoints: a directory per step, complete or absent, safetensors only, readable at any world size.

    RUN_DIR/checkpoints/step-00000500/
        rank-00000.safetensors  …   "master/NAME@START", "exp_avg/NAME@START", "exp_avg_sq/…", "ema/…": flat fp32 pieces
        manifest.json               sizes and SHA-256 of the files, shapes of the parameters, step, seed, config, …
        quarantine.jsonl            what could not be decoded up to here

A save copies this rank's part of the state into host memory, which is all that training waits for. A thread on each
rank then writes it; once all have, rank 0's makes the checkpoint complete in one instant (`checkpoint_folders`), so a
kill at any moment leaves those that were. A load takes the newest one whose every byte is as its manifest says.

    python -m sora_train.training.checkpoint list|verify|inspect DIR
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.root import ConfigError
from sora_train.distributed.collectives import barrier, gather_facts
from sora_train.distributed.partitions import Fragment, apply_loaded, optimizer_steps, reset_optimizer
from sora_train.distributed.topology import World
from sora_train.training.checkpoint_folders import (
    apply_retention,
    complete_checkpoints,
    folder_of,
    reading,
    store_at,
)
from sora_train.training.checkpoint_reading import check_same_model
from sora_train.training.ema import Ema
from sora_train.training.fragment_files import (
    FORMAT_VERSION,
    LEDGER,
    DamagedCheckpointError,
    PieceReader,
    digest,
    read_manifest,
    verify,
)
from sora_train.training.host_copy import HostCopy
from sora_train.training.places import Folder, new_file
from sora_train.training.writers import SaveError, Writers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """All of a run that is not a tensor."""

    step: int = 0  # optimizer steps done: the next step's number

    def next(self) -> "TrainState":
        """After one more optimizer step."""
        return TrainState(self.step + 1)


class Checkpoints:
    """Saves and restores one run's engine, moving average and state."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        world: World,
        *,
        engine: Any,
        held: list[Fragment],
        ema: Ema,
        facts: dict[str, Any],
    ) -> None:
        """`facts` go into every manifest: the resolved config, fingerprints of code and data. Every rank must build it
        at the same point."""
        self.folder = folder_of(run_dir, config)
        self.ledger = run_dir / LEDGER
        self.config = config
        self.world = world
        self.engine, self.held, self.ema = engine, held, ema
        self.facts = facts
        self._store = store_at(self.folder)
        self._shapes = _shapes_of(engine.module)
        self._copy = HostCopy(self._written(), world.device)
        self._writers = Writers(world)
        self._blocked_seconds = 0.0
        self._is_told = True  # whether the figures of the last save were

    # --- saving

    def save(self, state: TrainState) -> Folder:
        """Copies the state and begins to write it; training may go on. Returns where the checkpoint will be. Every rank
        must call it; a save that is still being written is waited for first.

        Raises:
            FloatingPointError, SaveError: the save before has failed, see `wait`.
        """
        began = time.perf_counter()
        if self._writers.is_busy:
            log.info("%s is still being written: the next one waits for it", self._writers.what)
        self.wait()
        self._copy.take(self._written())
        steps = optimizer_steps(self.engine)
        self._writers.start(f"the checkpoint of step {state.step}", lambda: self._write(state, steps))
        self._blocked_seconds, self._is_told = time.perf_counter() - began, False
        return self.folder / f"step-{state.step:08d}"

    def wait(self) -> None:
        """Until nothing is being written. Every rank must call it.

        Raises:
            FloatingPointError: something of the state was not finite; on all ranks alike, and nothing was saved.
            SaveError: a disk or a store did not take it; on all ranks alike, and nothing is left of it.
        """
        self._writers.wait()

    @property
    def has_failed(self) -> bool:
        """Whether a save is known to have failed, which `wait` or `save` will raise: training should end."""
        return self._writers.has_failed

    def figures(self) -> dict[str, float]:
        """Of the last save, once after it has ended: seconds that training waited for it, and that it took in all."""
        if self._is_told or self._writers.is_busy:
            return {}
        self._is_told = True
        return {
            "checkpoint_blocked_seconds": self._blocked_seconds,
            "checkpoint_seconds": self._blocked_seconds + self._writers.seconds,
        }

    def _kept(self) -> Iterator[tuple[Fragment, dict[str, Tensor]]]:
        """Each piece, and what a checkpoint keeps of it by kind."""
        for fragment, averages in zip(self.held, self.ema.kept, strict=True):
            yield fragment, {"master": fragment.master, **averages, **fragment.states}

    def _written(self) -> list[tuple[str, Tensor]]:
        """What this rank writes, live, in the order of its file."""
        tensors = []
        for fragment, kinds in self._kept():
            first, last = fragment.written
            for kind, values in kinds.items() if first < last else ():
                tensors.append((f"{kind}/{fragment.name}@{fragment.start + first}", values.detach()[first:last]))
        return tensors

    # The rest of saving runs on the writers' threads and reads no tensor of the training's.

    def _write(self, state: TrainState, steps: int) -> None:
        try:
            self._writers.together(lambda: self._store.prepare(state.step) if self.world.is_main else None)
            try:
                parts = self._writers.together(lambda: self._write_part(state))
                self._writers.together(lambda: self._commit(state, steps, parts) if self.world.is_main else None)
            except (FloatingPointError, SaveError):  # all ranks have stopped writing
                if self.world.is_main:
                    with suppress(OSError):  # what went wrong first is what is told
                        self._store.discard(state.step)
                raise
            self._writers.together(lambda: self._remove_old() if self.world.is_main else None)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error} is not finite after step {state.step}, which is not saved: run the command again to go on "
                "from the checkpoint before, with a lower optim.learning_rate"
            ) from error
        except SaveError as error:
            kept = complete_checkpoints(self.folder)[:1]
            before = f"{kept[0]} is the last good one" if kept else "there is none before it"
            raise SaveError(
                f"the checkpoint of step {state.step} could not be written: {error}; {before}: mend that, then run the "
                "same command again"
            ) from error

    def _write_part(self, state: TrainState) -> dict[str, Any]:
        name = f"rank-{self.world.global_rank:05d}.safetensors"
        with new_file(self._store.writing(state.step) / name) as file:
            entry = {"name": name, **self._copy.write(file)}
        pieces = [(f.name, f.start + f.written[0], f.start + f.written[1]) for f in self.held]
        return {"entry": entry, "pieces": pieces}

    def _commit(self, state: TrainState, steps: int, parts: list[dict[str, Any]]) -> None:
        entries = [part["entry"] for part in parts]
        if self.ledger.exists():
            entries.append(self._write_ledger(state))
        manifest = {
            "format_version": FORMAT_VERSION,
            "saved_at": time.time(),
            "step": state.step,
            "world_size": self.world.world_size,
            "optimizer_steps": steps,
            "files": entries,
            "parameters": self._shapes,
            "pieces": [part["pieces"] for part in parts],
            **self.facts,
        }
        manifest["sha256"] = digest(manifest)
        self._store.commit(state.step, json.dumps(manifest, sort_keys=True))

    def _remove_old(self) -> None:
        try:
            apply_retention(self._store, self.config)
        except OSError as error:
            log.warning("an old checkpoint in %s could not be removed: %s", self.folder, error)

    def _write_ledger(self, state: TrainState) -> dict[str, Any]:
        """The ledger as it was at the step: all ranks have added what failed before it, some may be ahead."""
        lines = [line for line in self.ledger.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        text = "".join(line + "\n" for line in lines if json.loads(line)["step"] < state.step).encode()
        with new_file(self._store.writing(state.step) / LEDGER) as file:
            file.write(text)
        return {"name": LEDGER, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}

    # --- loading

    def load_latest(self) -> TrainState:
        """Restores the newest checkpoint that is whole; without one, a fresh start. Every rank must call it.

        Raises:
            ConfigError: the checkpoint is of another model, optimizer or average, or all there are are damaged.
        """
        names = gather_facts([path.name for path in complete_checkpoints(self.folder)])[0]  # what rank 0 sees counts
        found = [self.folder / name for name in names]
        for folder in found:
            if problem := self._agreed_problem(folder):
                if self.world.is_main:
                    log.warning("%s is damaged (%s): trying the one before", folder, problem)
                continue
            return self._load(folder)
        if found:
            raise ConfigError(
                f"all {len(found)} checkpoints in {self.folder} are damaged: move them away to start from nothing, or "
                "choose another run_dir"
            )
        reset_optimizer(self.engine)
        return TrainState()

    def _agreed_problem(self, folder: Folder) -> str | None:
        """What is wrong with a checkpoint; each rank reads a share of the files and all come to one answer."""
        problem = None
        try:
            verify(folder, self.world.global_rank, self.world.world_size)
        except DamagedCheckpointError as error:
            problem = str(error)
        return next((found for found in gather_facts(problem) if found), None)

    def _load(self, folder: Folder) -> TrainState:
        manifest = read_manifest(folder)
        shapes = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
        check_same_model(shapes, self._shapes, folder)
        with reading(folder):
            reader = PieceReader(folder, manifest)
            wanted = ((kind, fragment.name) for fragment, kinds in self._kept() for kind in kinds)
            try:
                absent = next((f"{kind}/{name}" for kind, name in wanted if not reader.has(kind, name)), None)
                if absent := next(filter(None, gather_facts(absent)), None):
                    raise ConfigError(
                        f"{folder} holds no {absent}: it was trained with another optim.kind, or other ema.profile or "
                        "ema.lengths; go on with those, or choose another run_dir"
                    )
                for fragment, kinds in self._kept():
                    for kind, into in kinds.items():
                        reader.fill(kind, fragment.name, fragment.start, into)
            except DamagedCheckpointError as error:  # every byte is as it was written
                raise ConfigError(f"{folder} does not hold what its manifest says ({error}): move it away") from error
            reader.close()
        apply_loaded(self.engine, manifest["optimizer_steps"])
        barrier()
        return TrainState(step=manifest["step"])


def _shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained}


if __name__ == "__main__":
    from sora_train.training.checkpoint_command import app

    app()
