"""How many tokens each shard holds under a size rule: what tells where a step begins without walking there.

Computed once by reading every index, then kept in a file of the user's caches: a later start opens no index but those
of its first batch.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sora_train.config.data import SizeConfig
from sora_train.data.index import Dataset
from sora_train.data.schema import DatasetManifest
from sora_train.data.selection import Selection
from sora_train.data.shard_table import Numbers
from sora_train.data.size import Stride, clip_sizes, does_not_fit

# In the name of every cached file: goes up when the rule or the file changes.
VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """What makes the clips of a data set training clips, and gives each its tokens."""

    size: SizeConfig
    stride: Stride
    selection: Selection


@dataclass(frozen=True)
class LongestClip:
    """The clip of most tokens, held-out ones included, as messages name it."""

    key: str
    shard: str
    num_frames: int
    height: int
    width: int
    num_tokens: int


@dataclass(frozen=True)
class Totals:
    """By shard, in the order of the manifest."""

    tokens: Numbers  # of the clips that are trained on
    clips: Numbers
    held_out: Numbers  # clips
    # Mean pixels x frames of a training clip as it lies in the shard: the same under every size rule.
    extent: NDArray[np.float64]
    longest: LongestClip | None  # None: there is no clip at all


COLUMNS = ("tokens", "clips", "held_out", "extent")


def load_totals(dataset: Dataset, rule: Rule, cache_dir: str) -> Totals:
    """From the cache, or computed and put there. A cache that cannot be read or written costs time alone.

    Raises:
        ConfigError: a clip of less than one token, or latents of another codec, by name.
    """
    path = cache_path(dataset.manifest, rule, cache_dir)
    try:
        return _read(path, len(dataset.manifest.shards))
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("the cached totals %s are not readable (%s): computed again", path, error)
    totals = compute_totals(dataset, rule)
    try:
        _write(totals, path)
    except OSError as error:
        log.warning("the totals of the data are not kept (%s): each start computes them", error)
    return totals


def compute_totals(dataset: Dataset, rule: Rule) -> Totals:
    """Reads every index once. Raises ConfigError as `load_totals` does."""
    shards = dataset.manifest.shards
    tokens, clips, num_held_out = (np.zeros(len(shards), dtype=np.int64) for _ in range(3))
    extent = np.zeros(len(shards), dtype=np.float64)
    longest: LongestClip | None = None
    for shard, (entry, table) in enumerate(zip(shards, dataset.tables(range(len(shards))), strict=True)):
        sizes = clip_sizes(table, rule.size, rule.stride)
        trained, held_out = rule.selection.trained(table), rule.selection.held_out(table)
        # Held-out clips as well: the first validation would be late to say so.
        taken = np.union1d(trained, held_out)
        if len(taken) == 0:
            continue
        lengths = sizes.num_tokens[taken]
        if lengths.min() == 0:
            raise does_not_fit(table.row(int(taken[lengths.argmin()])), rule.stride)
        if longest is None or lengths.max() > longest.num_tokens:
            i = int(taken[lengths.argmax()])
            size = sizes.clip(i)
            key, most = table.key(i), int(lengths.max())
            longest = LongestClip(key, entry.name, size.num_frames, size.height, size.width, most)
        tokens[shard] = sizes.num_tokens[trained].sum()
        clips[shard], num_held_out[shard] = len(trained), len(held_out)
        if len(trained):
            extents = table.num_frames[trained] * table.height[trained] * table.width[trained]
            extent[shard] = extents.sum() / len(trained)
    return Totals(tokens, clips, num_held_out, extent, longest)


def cache_folder(cache_dir: str) -> Path:
    """The folder of data.cache_dir; the user's own where that is empty."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "sora_train"
    return Path(cache_dir) if cache_dir else default


def cache_path(manifest: DatasetManifest, rule: Rule, cache_dir: str) -> Path:
    """The file of these totals: its name is the hash of all that they depend on."""
    media = rule.selection.media.value
    what = [VERSION, asdict(rule.size), asdict(rule.stride), rule.selection.held_out_fraction, media]
    digest = hashlib.sha256(json.dumps(what).encode())
    for entry in manifest.shards:
        hashes = f"{entry.sha256} {entry.index_sha256}"
        digest.update(f"\n{entry.name} {entry.num_bytes} {entry.num_samples} {hashes}".encode())
    return cache_folder(cache_dir) / f"totals-{digest.hexdigest()}.safetensors"


def _read(path: Path, num_shards: int) -> Totals:
    with safe_open(path, framework="numpy") as file:
        columns = {name: file.get_tensor(name) for name in COLUMNS}
        longest = json.loads(file.metadata()["longest"])
    if any(column.shape != (num_shards,) for column in columns.values()):
        raise ValueError("it is of another number of shards")
    return Totals(**columns, longest=LongestClip(**longest) if longest else None)


def _write(totals: Totals, path: Path) -> None:
    longest = json.dumps(asdict(totals.longest) if totals.longest else None)
    data = save({name: getattr(totals, name) for name in COLUMNS}, metadata={"longest": longest})
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ranks may write the same file at the same time: each its own, and the last one stays.
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
