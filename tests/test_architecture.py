"""The house stays as it was designed: imports flow downwards, the models know no ranks, no file grows without bound."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 500
# Lower floors first; a module may import its own floor and those below it. The longest matching prefix counts.
FLOORS: dict[str, int] = {
    "sora_train.configs": 1,
    "sora_train.config": 1,
    "sora_train.diffusion": 1,
    "sora_train.models": 2,
    "sora_train.encoders": 2,
    "sora_train.world": 2,
    "sora_train.cost": 2,
    "sora_train.data": 3,
    "sora_train.distributed": 3,
    "sora_train.generation": 3,
    "sora_train.training": 4,
    "sora_train.train": 5,
    "sora_train.sample": 5,
    "sora_train.evaluate": 5,
    "sora_train.export": 5,
    "data_pipelines": 5,
    "launch": 5,
}
# Rooms that must stay free of something: no process groups, no files, no frameworks that pull them in.
PURE: dict[str, set[str]] = {
    "sora_train.models": {"torch.distributed", "deepspeed", "hydra", "pathlib", "os", "io", "fsspec", "wandb"},
    "sora_train.diffusion": {"torch.distributed", "deepspeed", "hydra", "pathlib", "os", "fsspec", "wandb"},
    "sora_train.cost": {"torch", "deepspeed", "os", "pathlib", "fsspec"},
    "sora_train.world": {"torch", "av", "decord", "os", "pathlib", "fsspec"},
    "sora_train.config": {"torch", "deepspeed", "numpy", "fsspec", "wandb"},
    "sora_train.data": {"deepspeed", "wandb", "torch.distributed"},
}
# The one door to files in models/: it reads and writes folders of diffusers.
DOORS = {"sora_train.models.wan_weights": {"os", "pathlib"}}
MEANINGLESS = re.compile(r"(utils?|misc|common|helpers?|base|core|manager)")


def modules() -> dict[str, Path]:
    found = {}
    for top in ("sora_train", "data_pipelines", "launch"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = str(node.module)
            names.add(module)
            names |= {f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in MODULES}
    return names


def own_imports(name: str) -> set[str]:
    return {found for found in imports(MODULES[name]) if found in MODULES and found != name}


def floor(name: str) -> int:
    prefixes = [prefix for prefix in FLOORS if name == prefix or name.startswith(prefix + ".")]
    assert prefixes, f"{name} stands on no floor: give it one in FLOORS"
    return FLOORS[max(prefixes, key=len)]


def room(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("sora_train.") else name.split(".")[0]


def test_imports_flow_downwards() -> None:
    for name in MODULES:
        for used in own_imports(name):
            if name == "sora_train" or used == "sora_train":
                continue
            assert floor(used) <= floor(name), f"{name} (floor {floor(name)}) imports {used} (floor {floor(used)})"
            if name.startswith("sora_train."):
                assert room(used) not in ("data_pipelines", "launch"), f"{name} imports {used}"


def test_pipelines_use_only_their_part_of_the_library() -> None:
    allowed = {"data_pipelines", "sora_train.config", "sora_train.data", "sora_train.encoders", "sora_train.world"}
    for name in MODULES:
        if name.startswith("data_pipelines"):
            for used in own_imports(name):
                assert room(used) in allowed, f"{name} imports {used}"


def test_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for used in own_imports(name):
                visit(used, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("pure", sorted(PURE))
def test_pure_rooms(pure: str) -> None:
    for name, path in MODULES.items():
        if name.startswith(pure + "."):
            for used in imports(path):
                words = PURE[pure] - DOORS.get(name, set())
                bad = [word for word in words if used == word or used.startswith(word + ".")]
                # config/ owns the schema of files on disk and the command line.
                assert not bad, f"{name} imports {used}"


def test_captioner_and_scorer_share_no_code() -> None:
    for name in MODULES:
        if name.startswith("data_pipelines.stages"):
            assert "sora_train.world.score" not in own_imports(name), f"{name}: an error in both would be invisible"
        if name == "sora_train.world.score":
            assert not any(used.startswith("data_pipelines") for used in own_imports(name))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_are_small_named_and_said_what_for(name: str) -> None:
    path = MODULES[name]
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES, f"{path} has more than {MAX_LINES} lines"
    assert not MEANINGLESS.fullmatch(name.split(".")[-1]), f"{name} says nothing"
    if path.name == "__init__.py":
        assert not text.strip() or "import" in text, f"{path} holds code"
    else:
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring saying what it is for"


def test_the_loop_reads_on_one_screen() -> None:
    path = MODULES["sora_train.train"]
    assert len(path.read_text().splitlines()) <= 150
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.Lambda))]
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert not [node for node in ast.walk(main) if isinstance(node, ast.FunctionDef) and node is not main]

    def depth(node: ast.AST) -> int:
        deeper = isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try))
        return deeper + max((depth(child) for child in ast.iter_child_nodes(node)), default=0)

    assert depth(main) <= 4


def test_importing_does_nothing() -> None:
    """Every module in one fresh process: no folder, no environment variable, no thread appears."""
    names = [name for name in sorted(MODULES) if not name.startswith("data_pipelines.stages")]
    program = f"""
import os, threading, importlib, pathlib, tempfile
os.chdir(tempfile.mkdtemp())  # decord itself puts its folder on PATH
import torch, numpy, hydra, av, decord, rich, typer, PIL.Image, webdataset, fsspec, scenedetect, datatrove.pipeline.base
before = dict(os.environ), threading.active_count()
for name in {names!r}:
    importlib.import_module(name)
added = {{key for key in os.environ if os.environ[key] != before[0].get(key)}}
assert not added, added
assert threading.active_count() == before[1], threading.enumerate()
assert not list(pathlib.Path().iterdir())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
