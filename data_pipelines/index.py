"""Indexes WebDataset tars, wherever they come from: `python -m data_pipelines.index shards=DIR_OR_URL`.

What curation does for its own shards, for shards made elsewhere: afterwards `data.shards=DIR_OR_URL` trains on them.
Shards are read side by side, each once. What a shard held is remembered in DIR/.index, so that the same command goes on
after a kill, and reads again only tars that are new or have changed. `verify=true` reads everything again and compares.
"""

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data_pipelines.shard_workers import Failed, Job, Result, ShardWorkers
from data_pipelines.verify_index import verify_shard
from sora_train.config.command import hydra_app
from sora_train.config.curation import IndexConfig
from sora_train.config.root import ConfigError
from sora_train.data.index import FETCHED_AT_ONCE, locate, open_dataset
from sora_train.data.index_writer import ShardFile, ShardReport, index_shard, list_shards, write_manifest, write_whole
from sora_train.data.scan import Reject, Watch
from sora_train.data.schema import FORMAT_VERSION, MANIFEST_NAME, REJECTS_NAME, DatasetManifest, ShardEntry, index_name

# Part of what an index is made by: raise it when the same tar would give another one.
SCAN_VERSION = 1
EXIT_DAMAGED = 1


@hydra_app(IndexConfig, "index")
def main(config: IndexConfig) -> None:
    """Indexes, or verifies, and says what is there; exit code 1 when verification finds damage."""
    console = Console()
    if config.verify:
        damage = verify(config, console)
        for name, complaint in damage:
            print(f"{config.shards}/{name}: {complaint}")
        if damage:
            sys.exit(EXIT_DAMAGED)
        return
    manifest, rejects = build_index(config, console)
    if rejects:
        console.print(rejects_table(rejects))
        print(f"each by name: {config.shards}/{REJECTS_NAME} (notes leave their sample in the index)")
    total = manifest.num_samples + manifest.num_rejected
    print(
        f"{config.shards}/{MANIFEST_NAME}: {total} samples in {len(manifest.shards)} shards = "
        f"{manifest.num_samples} indexed + {manifest.num_rejected} rejected"
    )


def build_index(config: IndexConfig, console: Console) -> tuple[DatasetManifest, list[Reject]]:
    """Reads what has not been read yet, then writes dataset.json.

    Raises:
        ConfigError: a setting out of bounds, no shards, a shard that cannot be read, or no sample that can be indexed.
    """
    files, folder = _locate(config)
    shards = list_shards(files, folder)
    notebook = Notebook(files, folder, tuple(config.caption_fields))
    try:
        notebook.open()
    except OSError as error:
        raise ConfigError(f"shards={config.shards} cannot be written to ({error}): copy the shards") from error
    reports = notebook.recall(shards)
    todo = [shard for shard in shards if shard.name not in reports]
    failed: dict[str, str] = {}
    with progress_bar("indexing", sum(shard.num_bytes for shard in todo), console) as advance:
        for shard, result in run_shards(files, notebook.index, todo, config.workers, advance):
            if isinstance(result, Failed):
                failed[shard.name] = result.error
            else:
                reports[shard.name] = result
    for name, reason in sorted(failed.items()):
        raise ConfigError(
            f"shards={config.shards}: {name} cannot be indexed ({reason}); {len(shards) - len(failed)} of "
            f"{len(shards)} are done: remove it or copy it again, and the same command goes on"
        )
    ordered = [reports[shard.name] for shard in shards]
    manifest = write_manifest(files, folder, ordered, config.caption_fields)
    return manifest, [reject for report in ordered for reject in report.rejects]


def verify(config: IndexConfig, console: Console) -> list[tuple[str, str]]:
    """(shard, what is wrong), for every shard of dataset.json or of the folder that is not as it was indexed.

    Raises:
        ConfigError: a setting out of bounds, or no dataset.json.
    """
    files, folder = _locate(config)
    manifest = open_dataset(config.shards).manifest
    damage: dict[str, str] = {}
    with progress_bar("verifying", sum(entry.num_bytes for entry in manifest.shards), console) as advance:
        task = functools.partial(_verify, files, folder)
        for entry, result in run_shards(files, task, manifest.shards, config.workers, advance):
            complaints = (f"cannot be read: {result.error}",) if isinstance(result, Failed) else result
            if complaints:
                damage[entry.name] = "; ".join(complaints)
    known = {entry.name for entry in manifest.shards}
    for path in files.find(folder):
        name = path.removeprefix(folder).lstrip("/")
        if name.endswith(".tar") and name not in known and not any(part.startswith(".") for part in name.split("/")):
            damage[name] = f"is not in {MANIFEST_NAME}"
    samples = f"{manifest.num_samples} samples in {len(manifest.shards)} shards"
    print(f"{samples}: {f'{len(damage)} shards differ' if damage else 'all as they were indexed'}")
    return sorted(damage.items())


@dataclass(frozen=True)
class Notebook:
    """What is known of each shard: DIR/.index/NAME.json, written when its index has been."""

    files: AbstractFileSystem
    folder: str
    caption_fields: tuple[str, ...]

    def open(self) -> None:
        """Says what the folder is for. Raises OSError where nothing can be written, before anything is read."""
        self.files.makedirs(f"{self.folder}/.index", exist_ok=True)
        about = b"What `python -m data_pipelines.index` has read. Without it, the next time reads all shards again.\n"
        write_whole(self.files, f"{self.folder}/.index/README.txt", about)

    def index(self, shard: ShardFile, watch: Watch) -> ShardReport:
        """Indexes a shard and remembers it. Raises OSError."""
        report = index_shard(self.files, self.folder, shard, self.caption_fields, watch)
        page = {**self._identity(shard), "report": asdict(report)}
        path = self._path(shard)
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        write_whole(self.files, path, json.dumps(page).encode())
        return report

    def recall(self, shards: Sequence[ShardFile]) -> dict[str, ShardReport]:
        """The reports of the shards that are as they were when they were read, by the same settings and code."""
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
            found = pool.map(self._recall, shards)
            return {shard.name: report for shard, report in zip(shards, found, strict=True) if report is not None}

    def _recall(self, shard: ShardFile) -> ShardReport | None:
        try:
            page = json.loads(self.files.cat_file(self._path(shard)))
            identity = self._identity(shard)
            if not shard.stamp or {key: page[key] for key in identity} != identity:
                return None
            values = page["report"]
            report = ShardReport(
                entry=ShardEntry(**values["entry"]),
                rejects=tuple(Reject(**item) for item in values["rejects"]),
                encoders=tuple(values["encoders"]),
                text_encoders=tuple(values["text_encoders"]),
            )
            index = self.files.cat_file(f"{self.folder}/{index_name(shard.name)}")
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there yet, or damaged: the shard is read again
        return report if sha256(index).hexdigest() == report.entry.index_sha256 else None

    def _identity(self, shard: ShardFile) -> dict[str, object]:
        return {
            "version": [FORMAT_VERSION, SCAN_VERSION],
            "num_bytes": shard.num_bytes,
            "stamp": shard.stamp,
            "caption_fields": list(self.caption_fields),
        }

    def _path(self, shard: ShardFile) -> str:
        return f"{self.folder}/.index/{shard.name.removesuffix('.tar')}.json"


def run_shards(
    files: AbstractFileSystem,
    task: Callable[[Job, Watch], Result],
    jobs: Sequence[Job],
    workers: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[Job, Result | Failed]]:
    """Runs a task on every job, in processes of their own wherever those see the same files."""
    if not isinstance(files, MemoryFileSystem):
        yield from ShardWorkers(task, workers or os.cpu_count() or 1, advance).run(jobs)
        return
    for job in jobs:
        try:
            yield job, task(job, Watch())
        except OSError as error:
            yield job, Failed(str(error))


@contextmanager
def progress_bar(what: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Shows how many bytes have been read; the function it gives takes their number so far."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda num_bytes: progress.update(bar, completed=num_bytes)
        progress.update(bar, completed=total)


def rejects_table(rejects: Sequence[Reject]) -> Table:
    """How many of each reason."""
    table = Table()
    for name in ("reason", "samples", "notes"):
        table.add_column(name, justify="left" if name == "reason" else "right")
    counts = Counter((reject.reason, reject.is_sample) for reject in rejects)
    for reason in sorted({reject.reason for reject in rejects}):
        table.add_row(reason, *(str(counts[reason, kind] or "") for kind in (True, False)))
    return table


def _verify(files: AbstractFileSystem, folder: str, entry: ShardEntry, watch: Watch) -> tuple[str, ...]:
    return verify_shard(files, folder, entry, watch)


def _locate(config: IndexConfig) -> tuple[AbstractFileSystem, str]:
    if config.workers < 0:
        raise ConfigError(f"workers={config.workers} is negative: give 0 for one a core, or a number")
    if not config.caption_fields or not all(config.caption_fields):
        fields = list(config.caption_fields)
        raise ConfigError(f"caption_fields={fields} names no field: give those that hold captions, as [caption,text]")
    files, folder = locate(config.shards, "shards")
    if isinstance(files, LocalFileSystem) and not files.isdir(folder):
        raise ConfigError(f"shards={config.shards} is not a folder: give the folder that holds the tars")
    return files, folder


if __name__ == "__main__":
    main()
