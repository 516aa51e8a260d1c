"""What somebody could plant in a run's directory to be run, or to make a run write or delete elsewhere. For tests and
benchmarks/reliability.py: `PAYLOADS` plant, `Planted.walk` does what users do with a run and tells what happened."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from damage import NEW, build_model, save, two_ranks
from typer.testing import CliRunner

from sora_train.config.checkpoint import CheckpointConfig
from sora_train.config.root import TrainConfig, build_config, load_config, save_config
from sora_train.training import checkpoint
from sora_train.training.checkpoint_command import app
from sora_train.training.checkpoint_reading import latest_checkpoint, load_weights
from sora_train.training.fragment_files import LEDGER, MANIFEST, digest, read_manifest
from sora_train.training.quarantine import Quarantine, restore_ledger

RANK = "rank-00000.safetensors"


class Evil:
    """Runs a shell when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


class Planted:
    """A copy of a run, something outside of it that must stay as it is, and the file that shows that code ran."""

    def __init__(self, pristine: Path, place: Path) -> None:
        self.refused: list[Exception] = []
        self.run_dir, self.outside, self.ran = place / "run", place / "outside", place / "ran"
        shutil.copytree(pristine, self.run_dir, symlinks=True)
        self.outside.mkdir()
        (self.outside / "precious").write_text("as it was")
        shutil.copytree(pristine / "checkpoints" / f"step-{NEW:08d}", self.outside / "step-00000011")
        self.folder = self.run_dir / "checkpoints" / f"step-{NEW:08d}"
        self.command = f"touch {self.ran}"
        self.pickle = pickle.dumps(Evil(self.command))
        self.config = build_config(TrainConfig, {"data": {"shards": "x"}, "run_dir": str(self.run_dir)})
        save_config(self.config, self.run_dir / "config.yaml")

    def sign(self, **changes: Any) -> None:
        """Makes the manifest fit what is in the folder now."""
        manifest = json.loads((self.folder / MANIFEST).read_text())
        del manifest["sha256"]
        for entry in manifest["files"]:
            path = self.folder / entry["name"]
            if path.is_file():
                content = path.read_bytes()
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest |= changes
        (self.folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": digest(manifest)}))

    def put(self, name: str, content: bytes) -> None:
        """A file of the checkpoint, named rightly by the manifest."""
        (self.folder / name).write_bytes(content)
        self.sign()

    def files(self, name: str) -> None:
        """A manifest that names a file elsewhere as its first, with the right size and hash."""
        content = (self.outside / "precious").read_bytes()
        manifest = json.loads((self.folder / MANIFEST).read_text())
        entry = {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self.sign(files=[entry, *manifest["files"][1:]])

    def walk(self) -> str:
        """Lists, verifies, inspects, samples from, resumes and goes on saving. Each may refuse; none may run anything.
        "" when all is as it should be."""
        before = _tree(self.outside)
        checkpoints = self.run_dir / "checkpoints"
        for command in ("list", "verify", "inspect"):
            CliRunner().invoke(app, [command, str(self.run_dir)])

        def sample() -> None:
            newest = latest_checkpoint(self.run_dir)
            load_weights(newest, build_model())

        def resume() -> None:
            ranks = two_ranks(self.run_dir)
            with mock.patch.object(checkpoint, "apply_loaded"), mock.patch.object(checkpoint, "reset_optimizer"):
                ranks[0].load_latest()

        def go_on() -> None:
            ranks = two_ranks(self.run_dir, CheckpointConfig(keep=1))
            for step in (NEW + 5, NEW + 10):
                save(ranks, step)

        walks: list[Callable[[], Any]] = [
            sample,
            lambda: build_config(TrainConfig, read_manifest(self.folder)["config"]),
            lambda: load_config(TrainConfig, self.run_dir / "config.yaml"),
            lambda: restore_ledger(self.run_dir, checkpoints),
            lambda: Quarantine(self.run_dir, 0.1),
            resume,
            go_on,
        ]
        for step in walks:
            try:
                step()
            except Exception as error:  # a refusal, in whatever words
                self.refused.append(error)
        if self.ran.exists():
            return "something ran"
        return "" if _tree(self.outside) == before else f"outside has changed: {_tree(self.outside)}"


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _header(fields: dict[str, Any], length: int | None = None) -> bytes:
    text = json.dumps(fields).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64)


def _torch_file(planted: Planted) -> bytes:
    path = planted.run_dir / "evil.pt"
    torch.save({"weights": torch.zeros(2), "evil": Evil(planted.command)}, path)
    return path.read_bytes()


def _link(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _manifest_config(value: Any) -> Callable[[Planted], None]:
    return lambda planted: planted.sign(config=json.loads(json.dumps(value).replace("COMMAND", planted.command)))


def _yaml(text: str) -> Callable[[Planted], None]:
    return lambda planted: _append(planted.run_dir / "config.yaml", text.replace("COMMAND", planted.command))


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def _beside(name: str, content: Callable[[Planted], bytes]) -> Callable[[Planted], None]:
    return lambda planted: void((planted.folder / name).write_bytes(content(planted)))


def void(_: object) -> None:
    """So that a lambda returns nothing."""


def _program(planted: Planted) -> bytes:
    return f"import os; os.system({planted.command!r})".encode()


TARGET = {"_target_": "os.system", "command": "COMMAND", "_args_": ["COMMAND"]}
PAYLOADS: dict[str, Callable[[Planted], None]] = {
    # pickles in place of what is read
    "weights are a pickle": lambda p: p.put(RANK, p.pickle),
    "weights are torch's": lambda p: p.put(RANK, _torch_file(p)),
    "ledger is a pickle": lambda p: p.put(LEDGER, p.pickle),
    "manifest is a pickle": lambda p: void((p.folder / MANIFEST).write_bytes(p.pickle)),
    "pickle behind a header": lambda p: p.put(RANK, _header({}) + p.pickle),
    "pickle in the metadata": lambda p: p.put(RANK, _header({"__metadata__": {"x": p.pickle.decode("latin-1")}})),
    # what other loaders would open
    ".metadata of torch": _beside(".metadata", lambda p: p.pickle),
    "__0_0.distcp": _beside("__0_0.distcp", lambda p: p.pickle),
    "DeepSpeed's model": _beside("mp_rank_00_model_states.pt", _torch_file),
    "DeepSpeed's optimizer": _beside("zero_pp_rank_0_mp_rank_00_optim_states.pt", _torch_file),
    "pytorch_model.bin": _beside("pytorch_model.bin", _torch_file),
    "a module": _beside("__init__.py", _program),
    "sitecustomize": _beside("sitecustomize.py", _program),
    "conftest": _beside("conftest.py", _program),
    # configs
    "_target_ in the manifest": _manifest_config({"model": TARGET}),
    "_target_ at its root": _manifest_config(TARGET),
    "a resolver in the manifest": _manifest_config({"name": "${python:COMMAND}"}),
    "_target_ in the YAML": _yaml("zzz:\n  _target_: os.system\n  command: COMMAND\n"),
    "python/object/apply in the YAML": _yaml("zzz: !!python/object/apply:os.system ['COMMAND']\n"),
    "python/name in the YAML": _yaml("name: !!python/object/new:os.system ['COMMAND']\n"),
    "a resolver in the YAML": _yaml("zzz: ${eval:COMMAND}\n"),
    "hydra's callbacks in the YAML": _yaml("hydra:\n  callbacks:\n    x:\n      _target_: os.system\n"),
    # names and links that lead elsewhere
    "a file up and away": lambda p: p.files("../../../outside/precious"),
    "a file at the root": lambda p: p.files(str(p.outside / "precious")),
    "a file called ..": lambda p: p.files(".."),
    "a file without a name": lambda p: p.files(""),
    "weights are a link": lambda p: _link(p.folder / RANK, p.outside / "precious"),
    "the ledger is a link": lambda p: _link(p.folder / LEDGER, p.outside / "precious"),
    "the checkpoint is a link": lambda p: _link(p.folder, p.outside),
    "an older one is a link": lambda p: _link(p.folder.with_name("step-00000005"), p.outside / "step-00000011"),
    "a newer one is a link": lambda p: _link(p.folder.with_name("step-00000011"), p.outside / "step-00000011"),
    "the unfinished is a link": lambda p: _link(p.folder.with_name(".writing-step-00000015"), p.outside),
    "the removed is a link": lambda p: _link(p.folder.with_name(".removing-step-00000001"), p.outside),
    "latest is a link elsewhere": lambda p: _link(p.folder.with_name("latest"), p.outside),
    # numbers that are none, and too much of everything
    "a header without end": lambda p: p.put(RANK, _header({}, 2**63)),
    "offsets behind the file": lambda p: p.put(
        RANK, _header({"master/weight@0": {"dtype": "F32", "shape": [9**9], "data_offsets": [0, 4 * 9**9]}})
    ),
    "offsets before the file": lambda p: p.put(
        RANK, _header({"master/weight@0": {"dtype": "F32", "shape": [660], "data_offsets": [-2640, 0]}})
    ),
    "pieces out of bounds": lambda p: p.sign(pieces=[[["weight", -(10**12), 10**12]]] * 2),
    "parameters without bounds": lambda p: p.sign(parameters={"weight": [10**12, 10**12]}),
    "brackets without end": lambda p: void((p.folder / MANIFEST).write_text("[" * 200_000)),
    "files that are none": lambda p: p.sign(files=[None, 7, "x", {"name": {}}]),
    "a step that is none": lambda p: p.sign(step="; COMMAND".replace("COMMAND", p.command)),
    "a name for a shell": lambda p: void(p.folder.with_name(f"step-00000012;{p.ran.name}").mkdir()),
    "a pipe": lambda p: (void((p.folder / RANK).unlink()), os.mkfifo(p.folder / RANK))[1],
}  # fmt: skip
