"""The command that indexes any WebDataset: in parallel, gone on with after a kill, unharmed by what kills a process."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from PIL import Image
from rich.console import Console

from data_pipelines.index import Notebook, build_index, main, verify
from data_pipelines.shard_workers import Failed, ShardWorkers
from sora_train.config.curation import IndexConfig
from sora_train.config.root import ConfigError
from sora_train.data import scan
from sora_train.data.index import locate, open_dataset
from sora_train.data.index_writer import ShardFile, ShardReport, list_shards, write_index, write_whole
from sora_train.data.probe import MediaFacts

FIELDS = ("caption", "text")


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (seed % 256, 90, 40)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.tar", "b.tar", "sub/c.tar")):
        members = {f"{i}-{j}.png": picture(10 * i + j) for j in range(4)}
        texts = {f"{i}-{j}.txt": b"a plain picture" for j in range(4)}
        write_tar(folder / name, {**members, **texts, f"bad-{i}.png": b"", f"bad-{i}.txt": b"lost"})
    return folder


def build(folder: Path | str, **settings: object) -> tuple[Console, int]:
    console = Console(file=io.StringIO(), width=200)
    manifest, _ = build_index(IndexConfig(shards=str(folder), **settings), console)  # type: ignore[arg-type]
    return console, manifest.num_samples


def files_of(folder: Path) -> dict[str, bytes]:
    names = [path for path in folder.rglob("*") if path.is_file() and ".index" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.index.safetensors")}


def test_processes_write_what_one_process_writes(shards: Path) -> None:
    write_index(shards, allow_rejects=True)
    alone = files_of(shards)
    for path in shards.rglob("*.index.safetensors"):
        path.unlink()
    assert build(shards, workers=2)[1] == 12
    assert files_of(shards) == alone
    manifest = json.loads(alone["dataset.json"])
    assert manifest["totals"] == {"shards": 3, "samples": 12, "rejected": 3}
    assert [entry["name"] for entry in manifest["shards"]] == ["a.tar", "b.tar", "sub/c.tar"]
    lines = [json.loads(line) for line in alone["index_rejects.jsonl"].splitlines()]
    assert [(line["shard"], line["key"], line["reason"]) for line in lines] == [
        (name, f"bad-{i}", "zero_bytes") for i, name in enumerate(("a.tar", "b.tar", "sub/c.tar"))
    ]


def test_only_what_changed_is_read_again(shards: Path) -> None:
    build(shards, workers=1)
    before, files = written(shards), files_of(shards)
    build(shards, workers=1)
    assert written(shards) == before
    assert files_of(shards) == files
    # The same size, and the time set back: the file system still knows that it was written.
    data, state = (shards / "b.tar").read_bytes(), (shards / "b.tar").stat()
    place = data.index(b"a plain picture")
    (shards / "b.tar").write_bytes(data[:place] + b"A" + data[place + 1 :])
    os.utime(shards / "b.tar", ns=(state.st_atime_ns, state.st_mtime_ns))
    (shards / "a.index.safetensors").write_bytes(b"damaged")
    write_tar(shards / "d.tar", {"d.png": picture(9), "d.txt": b"new"})
    build(shards, workers=1)
    after = written(shards)
    assert {name for name in after if after[name] != before.get(name)} == {
        "a.index.safetensors", "b.index.safetensors", "d.index.safetensors"
    }  # fmt: skip
    assert verify(IndexConfig(shards=str(shards), workers=1), Console(file=io.StringIO())) == []
    (shards / "sub" / "c.tar").unlink()
    assert build(shards, workers=1)[1] == 9


def test_what_is_remembered_is_of_this_tar_these_settings_and_whole(shards: Path) -> None:
    files, place = locate(shards, "shards")
    notebook, found = Notebook(files, place, FIELDS), list_shards(files, place)
    assert notebook.recall(found) == {}
    reports = {shard.name: notebook.index(shard, scan.Watch()) for shard in found}
    assert notebook.recall(found) == reports
    assert Notebook(files, place, ("title",)).recall(found) == {}
    others = {"a.tar": {"stamp": "mtime=1"}, "b.tar": {"num_bytes": 1}, "sub/c.tar": {"stamp": ""}}
    assert notebook.recall([replace(shard, **others[shard.name]) for shard in found]) == {}  # type: ignore[arg-type]
    nameless = replace(found[0], stamp="")  # a file system that tells nothing of versions
    notebook.index(nameless, scan.Watch())
    assert notebook.recall([nameless]) == {}
    notebook.index(found[0], scan.Watch())
    for damage in ("{", "[]", '{"version": 1}'):
        (shards / ".index" / "a.json").write_text(damage)
        assert notebook.recall(found).keys() == {"b.tar", "sub/c.tar"}
    (shards / "b.index.safetensors").write_bytes(b"damaged")
    (shards / "sub" / "c.index.safetensors").unlink()
    assert notebook.recall(found) == {}


@pytest.mark.distributed
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(60):
        write_tar(folder / f"{i:03d}.tar", {f"{j}.png": picture(i + j) for j in range(10)})
    command = [sys.executable, "-m", "data_pipelines.index", f"shards={folder}", "workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(folder.glob(".index/*.json"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "dataset.json").exists()
    files, place = locate(folder, "shards")
    done = Notebook(files, place, FIELDS).recall(list_shards(files, place))
    assert 3 <= len(done) < 60
    before = {name: written(folder)[name.replace(".tar", ".index.safetensors")] for name in done}
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert "600 samples in 60 shards = 600 indexed + 0 rejected" in last
    assert {name: written(folder)[name.replace(".tar", ".index.safetensors")] for name in done} == before
    assert open_dataset(folder).manifest.num_samples == 600


def hostile(data: bytes, suffix: str) -> MediaFacts:
    """A decoder with a fault that some file triggers."""
    if data == picture(12):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == picture(21):
        time.sleep(60)
    return MediaFacts(1, 0.0, 24, 32, 0, 0.0, False)


def index_with_faults(notebook: Notebook, shard: ShardFile, watch: scan.Watch) -> ShardReport:
    scan.probe_media = hostile  # in the process that does the work
    if shard.name == "a.tar":
        os._exit(3)
    return notebook.index(shard, watch)


def test_a_medium_that_ends_its_process_costs_itself_alone(shards: Path) -> None:
    files, place = locate(shards, "shards")
    found = list_shards(files, place)
    task = functools.partial(index_with_faults, Notebook(files, place, FIELDS))
    told: list[int] = []
    workers = ShardWorkers(task, 2, told.append, probe_seconds=1.0)
    results = {shard.name: result for shard, result in workers.run(found)}
    failed = results.pop("a.tar")
    assert isinstance(failed, Failed)
    assert failed.error == "the process that read it ended, exit code 3"
    for name, key, reason in (("b.tar", "1-2", "crash"), ("sub/c.tar", "2-1", "timeout")):
        report = results[name]
        assert isinstance(report, ShardReport)
        assert (report.entry.num_samples, report.entry.num_rejected) == (3, 2)
        assert (key, reason) in {(reject.key, reject.reason) for reject in report.rejects}
    assert 0 < told[-1] <= sum(shard.num_bytes for shard in found)


def refuse(shard: ShardFile, watch: scan.Watch) -> None:
    raise PermissionError(13, "Permission denied", shard.name)


def test_a_shard_that_cannot_be_read_is_named_when_the_others_are_done(shards: Path) -> None:
    files, place = locate(shards, "shards")
    results = dict(ShardWorkers(refuse, 2).run(list_shards(files, place)))
    assert all(isinstance(result, Failed) and "Permission denied" in result.error for result in results.values())
    (shards / "b.tar").unlink()
    (shards / "b.tar").symlink_to(shards / "nowhere.tar")
    with pytest.raises(ConfigError, match=r"b\.tar cannot be indexed \(.*2 of 3 are done.*same command goes on"):
        build(shards, workers=2)
    assert {path.name for path in shards.glob(".index/**/*.json")} == {"a.json", "c.json"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_pipelines.index", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_says_what_it_did_and_verifies(shards: Path) -> None:
    done = run(f"shards={shards}", "workers=1")
    assert done.returncode == 0, done.stderr
    assert "15 samples in 3 shards = 12 indexed + 3 rejected" in done.stdout
    assert "zero_bytes" in done.stdout
    assert "index_rejects.jsonl" in done.stdout

    good = run(f"shards={shards}", "verify=true", "workers=1")
    assert (good.returncode, "all as they were indexed" in good.stdout) == (0, True)
    dataset = open_dataset(shards)
    row = dataset.table(1).row(2)
    data = bytearray((shards / "b.tar").read_bytes())
    data[row.medium_offset + 40] ^= 1
    (shards / "b.tar").write_bytes(data)
    (shards / "sub" / "c.tar").unlink()
    write_tar(shards / "new.tar", {"a.png": picture(1)})
    bad = run(f"shards={shards}", "verify=true", "workers=1")
    assert bad.returncode == 1
    lines = [line for line in bad.stdout.splitlines() if ".tar: " in line]
    assert lines == [
        f"{shards}/b.tar: its SHA-256 differs; 1 of 4 samples differ: 1-2",
        f"{shards}/new.tar: is not in dataset.json",
        f"{shards}/sub/c.tar: is missing",
    ]


def test_verification_tells_a_cut_tar_and_a_stale_index(shards: Path) -> None:
    build(shards, workers=1)
    config, console = IndexConfig(shards=str(shards), verify=True, workers=1), Console(file=io.StringIO())
    assert verify(config, console) == []
    row = open_dataset(shards).table(0).row(3)
    data = (shards / "a.tar").read_bytes()
    (shards / "a.tar").write_bytes(data[: row.medium_offset + 5])
    (shards / "b.index.safetensors").write_bytes((shards / "a.index.safetensors").read_bytes())
    (first, second) = verify(config, console)
    size = row.medium_offset + 5
    assert first == (
        "a.tar",
        f"has {size} bytes, {len(data)} were indexed; its SHA-256 differs; 1 of 4 samples differ: {row.key}",
    )
    assert second[0] == "b.tar"
    assert "b.index.safetensors is damaged or not the one" in second[1]


def test_what_cannot_be_written_to_is_said_before_anything_is_read(shards: Path) -> None:
    (shards / ".index").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot be written to \(.*: copy the shards"):
        build(shards)
    with pytest.raises(OSError, match="AsyncFileSystem only reads"):
        write_whole(AsyncFileSystem(), "a", b"b")


def test_mistakes_get_one_line(tmp_path: Path) -> None:
    cases = {
        f"shards={tmp_path}": "holds no *.tar",
        f"shards={tmp_path / 'nowhere'}": "is not a folder",
        "shards='pipe:touch mark'": "commands are not run",
        "shards=nosuch://bucket": "Protocol not known",
    }
    for argument, message in cases.items():
        with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
            build(argument.removeprefix("shards=").strip("'"))
    with pytest.raises(ConfigError, match=r"workers=-1 is negative"):
        build(tmp_path, workers=-1)
    with pytest.raises(ConfigError, match=r"caption_fields=\[\] names no field"):
        build(tmp_path, caption_fields=[])
    with pytest.raises(ConfigError, match=r"caption_fields=\[''\] names no field"):
        build(tmp_path, caption_fields=[""])
    with pytest.raises(ConfigError, match="shards is empty"):
        build("")
    done = run(f"shards={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert main.__doc__


def test_memory_urls_are_indexed_in_this_process(shards: Path) -> None:
    files = fsspec.filesystem("memory")
    for path in shards.rglob("*.tar"):
        files.pipe_file(f"/indexed/{path.relative_to(shards)}", path.read_bytes())
    assert build("memory://indexed")[1] == 12
    stamps = {path: files.info(path)["created"] for path in files.find("/indexed")}
    assert build("memory://indexed")[1] == 12
    changed = {path for path in stamps if files.info(path)["created"] != stamps[path]}
    assert changed == {f"/indexed/{name}" for name in ("dataset.json", "index_rejects.jsonl", ".index/README.txt")}
    config = IndexConfig(shards="memory://indexed", verify=True)
    assert verify(config, Console(file=io.StringIO())) == []
