"""Hands each rank its packs, step after step, from any step on. Nothing is remembered: resume is `packs(step)`.

Order.batch(step) -> assign(...) -> this rank's PackPlans        in a planning thread, ahead: arithmetic
SampleReader.read(task) -> frames, noise, t, captions            in decoding processes (stream.py), ahead across steps
Assembly.build(...) -> Pack                                      views of the memory that they have filled
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from weakref import finalize

import numpy as np
import torch

from sora_train.config.data import DataConfig
from sora_train.config.diffusion import TimestepConfig
from sora_train.config.model import ModelConfig, TextKind
from sora_train.config.root import ConfigError
from sora_train.cost.step_cost import of_model
from sora_train.data.captions import check_captions
from sora_train.data.index import Dataset
from sora_train.data.order import GlobalBatch, Order, PlannedSample, open_datasets
from sora_train.data.pack import Assembly, Failure, Pack
from sora_train.data.packing import PackLimits, PackPlan, assign
from sora_train.data.sample import Facts, SampleError, SampleReader, Source, Task, Unwatched
from sora_train.data.shard_cache import ShardCache
from sora_train.data.stages import build_stages
from sora_train.data.stream import Job, Lost, Pool
from sora_train.data.totals import cache_folder
from sora_train.encoders.codec_shape import CodecShape

__all__ = ["Loader", "Pack", "build_loader", "check_settings"]

GIB = 1 << 30
# By step, (shard, key) of the clips that are not to be read in it: they failed when it was first done.
Masked = Mapping[int, frozenset[tuple[str, str]]]


def build_loader(
    config: DataConfig,
    model: ModelConfig,
    codec: CodecShape,
    timesteps: TimestepConfig,
    seed: int,
    global_rank: int,
    world_size: int,
    *,
    largest_group: int = 1,
    regroups_within_step: bool = True,
    masked: Masked | None = None,
    codec_identity: str | None = None,
    text_identity: str | None = None,
) -> "Loader":
    """Starts the decoding processes, opens the data sets and checks every clip against the sizes.

    Args:
        largest_group: neighbouring ranks that may share a clip, at most.
        regroups_within_step: see `PackLimits`.
        masked: clips that failed when a step was first done, as the ledger tells them; they fail again unread, and
            are not told of again.
        codec_identity: of the run's codec; needed where shards hold latents.
        text_identity: of the run's text encoder; needed where shards hold its rows.

    Raises:
        ConfigError: see `Order`; a clip that no group of ranks can hold, by name; latents or text rows made by another
            encoder than the run's; or settings of the loader that cannot work.
    """
    check_settings(config)
    # While the data sets are opened, the children load what they need.
    pool = Pool(config.workers, config.stall_seconds, int(config.worker_memory_gib * GIB)) if config.workers else None
    try:
        datasets = open_datasets(config)
        for name, dataset in datasets.items():
            _check_encoders(name, dataset, model, codec_identity, text_identity)
        order = Order(datasets, config, model, codec, seed)
        limits = PackLimits(config.max_tokens_per_pack, largest_group, model.heads, regroups_within_step)
        # Held-out clips as well.
        order.refuse_over(limits.max_tokens_per_pack, "data.max_tokens_per_pack", limits.group_size(world_size))
        cache = ShardCache(cache_folder(config.cache_dir) / "shards", int(config.cache_gib * GIB))
        reader = SampleReader(
            tuple(Source(item.files, item.folder, item.manifest.caption_fields) for item in order.datasets),
            timesteps,
            config.captions,
            seed,
            config.decoder,
            cache if config.cache_gib > 0 else None,
        )
        patch = (model.patch_height, model.patch_width)
        assembly = Assembly(timesteps, seed, order.stride, codec.channels, patch)
        if pool is not None:
            pool.open(reader, expects_scaling=any(not item.manifest.encoders for item in order.datasets))
        return Loader(order, reader, assembly, pool, config, limits, global_rank, world_size, masked or {})
    except BaseException:
        if pool is not None:
            pool.close()
        raise


class Loader:
    """The packs of one rank. Its only state is the step that it has read ahead from."""

    def __init__(
        self,
        order: Order,
        reader: SampleReader,
        assembly: Assembly,
        pool: Pool | None,
        config: DataConfig,
        limits: PackLimits,
        global_rank: int,
        world_size: int,
        masked: Masked,
    ) -> None:
        """`pool`: None reads in this process."""
        self.order, self.reader, self.assembly, self.pool = order, reader, assembly, pool
        self.config, self.masked = config, masked
        self.global_rank, self.world_size = global_rank, world_size
        self.limits, self.cost_model = limits, of_model(order.model)
        self._ahead: _ReadAhead | None = None
        self._next_step: int | None = None
        # Also when the program ends, or forgets the loader.
        self._end = finalize(self, pool.close) if pool is not None else lambda: None

    def plans(self, step: int) -> list[PackPlan]:
        """What this rank does in a step: one plan a micro-step, as many as on every rank."""
        micro_steps = assign(self.order.batch(step), self.world_size, self.limits, self.cost_model)
        return [packs[self.global_rank] for packs in micro_steps]

    def packs(self, step: int) -> Iterator[Pack]:
        """The packs of a step. Steps in a row are read ahead; another step starts reading anew.

        Raises:
            RuntimeError: decoding processes cannot start, or die one after the other.
            ConfigError: what the plan of a step needs (an index, say) is no longer there.
        """
        if self.pool is None:
            for plan in self.plans(step):
                yield self._read(plan)
            return
        if self._ahead is None or self._next_step != step:
            self._leave()
            self._ahead = _ReadAhead(self.pool, self.plans, self._tasks, step, self.config.read_ahead)
        # Not known until the step has been taken to its end: a caller may leave half-way.
        self._next_step = None
        is_last = False
        while not is_last:
            plan, job = self._ahead.take()
            pack, is_last = self._collect(self.pool, plan, job), plan.is_last
            if is_last:
                self._next_step = step + 1
            yield pack

    def validation_packs(self, num_clips: int) -> list[Pack]:
        """Held-out clips with draws that never change, spread over ranks; the same number of packs on each rank.

        `planned_tokens` and `planned_samples` count all ranks together. Empty when nothing is held out.
        """
        samples = self.order.validation_samples(num_clips)
        if not samples:
            return []
        batch = GlobalBatch(samples[0].step, samples)
        micro_steps = assign(batch, self.world_size, self.limits, self.cost_model)
        plans = [packs[self.global_rank] for packs in micro_steps]
        if self.pool is None:
            return [self._read(plan) for plan in plans]
        jobs = [self.pool.submit(self._tasks(plan), is_urgent=True) for plan in plans]
        return [self._collect(self.pool, plan, job) for plan, job in zip(plans, jobs, strict=True)]

    def close(self) -> None:
        """Ends the decoding processes; the loader is of no use afterwards."""
        self._leave()
        self._end()

    def _leave(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._next_step = None

    def _tasks(self, plan: PackPlan) -> list[Task | None]:
        """Of each piece; None where the clip is masked, on all ranks that have to do with it."""
        masked = self.masked.get(plan.step, frozenset())
        tasks = []
        for sample, _, is_owned, _ in plan.pieces:
            is_masked = masked and (self._shard_name(sample), sample.row.key) in masked
            shard = self.order.datasets[sample.dataset].manifest.shards[sample.shard]
            tasks.append(None if is_masked else Task(sample, shard, is_owned))
        return tasks

    def _shard_name(self, sample: PlannedSample) -> str:
        name = self.order.datasets[sample.dataset].manifest.shards[sample.shard].name
        return f"{self.order.names[sample.dataset]}/{name}"  # also of a single data set: another may join it later

    def _collect(self, pool: Pool, plan: PackPlan, job: Job) -> Pack:
        memory = pool.wait(job)
        parts, failures, facts = [], [], []
        for task, start, outcome in zip(job.tasks, job.starts, job.outcomes, strict=True):
            known = outcome if isinstance(outcome, Facts) else None
            facts.append(known)
            part = None
            if task is not None and memory is not None and known is not None:
                part = memory[start:][: task.places.num_bytes]
            parts.append(part)
            if task is not None and isinstance(outcome, Lost):
                failures.append(self._failure(task, outcome.reason))
        return self.assembly.build(plan, job.tasks, facts, parts, failures)

    def _read(self, plan: PackPlan) -> Pack:
        parts: list[torch.Tensor | None] = []
        facts: list[Facts | None] = []
        failures = []
        tasks = self._tasks(plan)
        for task in tasks:
            part, known = None, None
            if task is not None:
                memory = np.empty(task.places.num_bytes, dtype=np.uint8)
                try:
                    part, known = torch.from_numpy(memory), self.reader.read(task, memory, Unwatched())
                except SampleError as error:
                    failures.append(self._failure(task, error.reason))
            parts.append(part)
            facts.append(known)
        return self.assembly.build(plan, tasks, facts, parts, failures)

    def _failure(self, task: Task, reason: str) -> Failure:
        return Failure(task.sample.row.key, self._shard_name(task.sample), reason)


class _ReadAhead:
    """This rank's packs from a step on, without end: planned in a thread, asked for ahead of being taken."""

    def __init__(
        self,
        pool: Pool,
        plans: Callable[[int], list[PackPlan]],
        tasks: Callable[[PackPlan], list[Task | None]],
        step: int,
        depth: int,
    ) -> None:
        """`depth`: packs that are asked for and not taken."""
        self._pool, self._plans, self._tasks = pool, plans, tasks
        self._asked: queue.SimpleQueue[tuple[PackPlan, Job] | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._is_closed = False
        self._thread = threading.Thread(target=self._plan, args=(step,), name="planning", daemon=True)
        self._thread.start()

    def _plan(self, step: int) -> None:
        try:
            for number in count(step):
                for plan in self._plans(number):
                    self._room.acquire()
                    if self._is_closed:
                        return
                    self._asked.put((plan, self._pool.submit(self._tasks(plan))))
        except BaseException as error:
            self._asked.put(error)

    def take(self) -> tuple[PackPlan, Job]:
        """The next. Raises whatever planning it raised."""
        asked = self._asked.get()
        if isinstance(asked, BaseException):
            raise asked
        self._room.release()
        return asked

    def close(self) -> None:
        """Lets go of what nobody took."""
        self._is_closed = True
        self._room.release()
        self._thread.join()
        jobs = []
        while not self._asked.empty():
            asked = self._asked.get()
            if not isinstance(asked, BaseException):
                jobs.append(asked[1])
        self._pool.drop(jobs)


def check_settings(config: DataConfig) -> None:
    """All that can be said of the settings before the data is looked at. Raises ConfigError for what cannot work."""
    check_captions(config.captions)
    build_stages(config)
    for name, value, least in (("workers", config.workers, 0), ("read_ahead", config.read_ahead, 1)):
        if value < least:
            raise ConfigError(f"data.{name}={value}: choose {least} or more")
    for name, seconds in (("stall_seconds", config.stall_seconds), ("worker_memory_gib", config.worker_memory_gib)):
        if not seconds > 0:
            raise ConfigError(f"data.{name}={seconds}: choose more than 0")
    if not config.cache_gib >= 0:
        raise ConfigError(f"data.cache_gib={config.cache_gib}: choose 0 or more")


def _check_encoders(
    name: str, dataset: Dataset, model: ModelConfig, codec_identity: str | None, text_identity: str | None
) -> None:
    """Latents and text rows mean something to the encoder that made them alone."""
    manifest = dataset.manifest
    if manifest.text_encoders and model.text.kind is TextKind.bytes:
        raise ConfigError(
            f"data set {name} has text rows of {', '.join(manifest.text_encoders)}, but model.text.kind=bytes reads "
            "captions: set model.text.kind=encoder, or index shards without text rows"
        )
    for made_by, own, what, setting in (
        (manifest.encoders, codec_identity, "latents", "codec"),
        (manifest.text_encoders, text_identity, "text rows", "text_encoder"),
    ):
        for identity in made_by:
            if identity != own:
                raise ConfigError(
                    f"data set {name} has {what} made by {identity}, the run's {setting} is {own}: "
                    f"train with the {setting} that made them, or make them anew"
                )
