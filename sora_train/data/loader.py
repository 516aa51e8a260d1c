"""Hands each rank its packs, step after step, from any step on. Nothing is remembered: resume is `packs(step)`.

Order.batch(step) -> assign(...) -> this rank's PackPlans        in the training process: arithmetic
PackReader.read(plan) -> frames, noise, t, captions              in worker processes, ahead across steps
"""

import atexit
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sora_train.config.data import DataConfig
from sora_train.config.diffusion import TimestepConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError
from sora_train.cost.flops import step_flops, text_tokens
from sora_train.data.clip import check_decoder
from sora_train.data.order import GlobalBatch, Order, PlannedSample, open_datasets
from sora_train.data.pack import FlatPack, Pack, PackReader
from sora_train.data.packing import PackPlan, assign
from sora_train.encoders.codec_shape import CodecShape

__all__ = ["Loader", "Pack", "build_loader"]


def build_loader(
    config: DataConfig,
    model: ModelConfig,
    codec: CodecShape,
    timesteps: TimestepConfig,
    seed: int,
    global_rank: int,
    world_size: int,
) -> "Loader":
    """Opens the data set and checks every clip of it against the sizes. Starts no process yet.

    Raises:
        ConfigError: see `Order`; or settings of the loader that cannot work.
    """
    for name, value, least in (("workers", config.workers, 0), ("read_ahead", config.read_ahead, 1)):
        if value < least:
            raise ConfigError(f"data.{name}={value}: choose {least} or more")
    check_decoder()
    order = Order(open_datasets(config), config, model, codec, seed)
    order.refuse_over(config.max_tokens_per_pack, "data.max_tokens_per_pack")
    patch = (model.patch_height, model.patch_width)
    reader = PackReader(order.datasets, timesteps, seed, order.stride, codec.channels, patch)
    return Loader(order, reader, config, global_rank, world_size)


class Loader:
    """The packs of one rank. Its only state is the step that its workers have read ahead from."""

    def __init__(self, order: Order, reader: PackReader, config: DataConfig, global_rank: int, world_size: int) -> None:
        self.order = order
        self.reader = reader
        self.config = config
        self.global_rank, self.world_size = global_rank, world_size
        self._stream: Iterator[FlatPack] | None = None
        self._next_step: int | None = None
        self._workers: list[BaseProcess] = []

    def plans(self, step: int) -> list[PackPlan]:
        """What this rank does in a step: one plan a micro-step, as many as on every rank."""
        micro_steps = assign(
            self.order.batch(step), self.world_size, self.config.max_tokens_per_pack, self.training_flops
        )
        return [packs[self.global_rank] for packs in micro_steps]

    def training_flops(self, sample: PlannedSample) -> float:
        """Forward and backward of one sample: what packs are balanced by."""
        model = self.order.model
        return step_flops(model, sample.num_tokens, text_tokens(model, sample.text_bytes))

    def packs(self, step: int) -> Iterator[Pack]:
        """The packs of a step. Steps in a row are read ahead; another step starts the workers anew.

        Raises:
            RuntimeError: a worker process died.
        """
        if self._stream is None or self._next_step != step:
            self.close()
            self._stream = self._start(step)
        # Not known until the step has been taken to its end: a caller may leave half-way.
        self._next_step = None
        for flat in self._stream:
            pack = flat.unflatten()
            if pack.is_last:
                self._next_step = step + 1
            yield pack
            if pack.is_last:
                return

    def validation_packs(self, num_clips: int) -> list[Pack]:
        """Held-out clips with draws that never change, spread over ranks; the same number of packs on each rank.

        `planned_tokens` and `planned_samples` count all ranks together. Empty when nothing is held out.
        """
        samples = self.order.validation_samples(num_clips)
        if not samples:
            return []
        limit = self.config.max_tokens_per_pack
        micro_steps = assign(GlobalBatch(samples[0].step, samples), self.world_size, limit, self.training_flops)
        return [self.reader.read(packs[self.global_rank]).unflatten() for packs in micro_steps]

    def close(self) -> None:
        """Ends the worker processes; `packs` starts them again."""
        self._stream = None  # DataLoader ends its workers when its iterator is dropped
        self._next_step = None
        for worker in self._workers:
            # Something may still hold the iterator, the frame of an error above all. Workers are deaf to SIGTERM,
            # with which Python would end them, so one that stays would keep the program from ending.
            if self._is_left(worker):
                worker.kill()
        self._workers = []
        atexit.unregister(self.close)

    @staticmethod
    def _is_left(worker: BaseProcess) -> bool:
        worker.join(timeout=0.5)
        return worker.is_alive()

    def _start(self, step: int) -> Iterator[FlatPack]:
        workers = self.config.workers
        loader: DataLoader[FlatPack] = DataLoader(
            _Reads(self.reader),
            batch_size=None,
            sampler=_PlansFrom(self, step),
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=self.config.read_ahead if workers else None,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_start_worker if workers else None,
        )
        others = multiprocessing.active_children()
        with _without_main_module(), _children_deaf_to_signals():
            stream = iter(loader)
        self._workers = [process for process in multiprocessing.active_children() if process not in others]
        atexit.register(self.close)
        return stream


class _Reads(Dataset[FlatPack]):
    """Indexed by plans: DataLoader hands what the sampler yields to a worker, and returns results in that order."""

    def __init__(self, reader: PackReader) -> None:
        self.reader = reader

    def __getitem__(self, plan: PackPlan) -> FlatPack:
        return self.reader.read(plan)


class _PlansFrom(Sampler[PackPlan]):
    """This rank's plans from a step on, without end."""

    def __init__(self, loader: Loader, step: int) -> None:
        self.plans, self.step = loader.plans, step

    def __iter__(self) -> Iterator[PackPlan]:
        step = self.step
        while True:
            yield from self.plans(step)
            step += 1


def _as_is(pack: Any) -> Any:
    return pack


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Last thing in the worker, as in a forked process: taking the interpreter down while libraries that run threads
    # are loaded aborts now and then.
    Finalize(None, os._exit, args=(0,), exitpriority=-100)


@contextmanager
def _children_deaf_to_signals() -> Iterator[None]:
    """A launcher signals the whole process group; the training process answers with a checkpoint, for which its
    workers must go on. They inherit the mask, and end when their parent does."""
    resource_tracker.ensure_running()  # spawning starts it, and unblocks SIGTERM and SIGINT when it does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Processes spawned in here do not import the program's main module, which would bring DeepSpeed to each."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
