"""What one rank trains on in one micro-step, and how it is read from its plan."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sora_train.config.diffusion import TimestepConfig
from sora_train.data.clip import DecodeError, Frames, decode_clip
from sora_train.data.draws import Purpose, generator
from sora_train.data.index import Dataset
from sora_train.data.order import PlannedSample
from sora_train.data.packing import PackPlan
from sora_train.data.schema import ClipRecord, IndexRow
from sora_train.data.size import ClipSize, Stride
from sora_train.diffusion.timesteps import sample_t


@dataclass(frozen=True)
class Failure:
    """A clip that could not be read. It keeps its place in the pack, with weight 0."""

    key: str
    shard: str
    reason: str


@dataclass(frozen=True)
class Pack:
    """The lists have one entry a sample, in the order of `samples`; a filler is a sample of weight 0."""

    step: int
    micro_step: int
    is_last: bool
    samples: tuple[PlannedSample, ...]
    frames: list[Tensor]  # uint8 [T, H, W, 3]; zeros where a clip failed
    noise: list[Tensor]  # float32 [C, T, H, W]
    t_S: Tensor  # float32
    text: list[str]  # "" where the caption was dropped
    weight_S: Tensor  # float32; 0 = failed or filler
    # Of the whole step on all ranks, before anything failed.
    planned_tokens: int
    planned_samples: int
    failures: tuple[Failure, ...]

    @property
    def num_tokens(self) -> int:
        """Video tokens, filler included."""
        return sum(sample.num_tokens for sample in self.samples)

    def to(self, device: torch.device | str) -> "Pack":
        """With its tensors on a device; to CUDA from page-locked memory, so that the host does not wait."""
        is_pinned = torch.device(device).type == "cuda"
        return self._map(lambda tensor: (tensor.pin_memory() if is_pinned else tensor).to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Pack":
        return replace(
            self,
            frames=[change(frames) for frames in self.frames],
            noise=[change(noise) for noise in self.noise],
            t_S=change(self.t_S),
            weight_S=change(self.weight_S),
        )


@dataclass(frozen=True)
class FlatPack:
    """A pack on its way out of a worker: frames and noise end to end, so that each is one shared memory."""

    pack: Pack
    frames: Tensor
    noise: Tensor

    def unflatten(self) -> Pack:
        """The pack; its tensors are views."""
        shapes = [(sample.size.num_frames, sample.size.height, sample.size.width, 3) for sample in self.pack.samples]
        frames = self.frames.split([int(np.prod(shape)) for shape in shapes])
        noise = self.noise.split([int(np.prod(sample.latent_shape)) for sample in self.pack.samples])
        return replace(
            self.pack,
            frames=[part.view(shape) for part, shape in zip(frames, shapes, strict=True)],
            noise=[part.view(sample.latent_shape) for part, sample in zip(noise, self.pack.samples, strict=True)],
        )


@dataclass(frozen=True)
class PackReader:
    """Turns plans into packs; holds all that a worker needs and travels to it by pickle."""

    datasets: tuple[Dataset, ...]  # by PlannedSample.dataset
    timesteps: TimestepConfig
    seed: int
    stride: Stride
    latent_channels: int
    patch: tuple[int, int]  # rows and columns of latents that a token covers

    def read(self, plan: PackPlan) -> FlatPack:
        """Fetches, decodes and draws; a clip that fails is masked, never raised."""
        samples = plan.samples or (self._filler(plan),)
        frames: list[Frames] = []
        noise: list[NDArray[np.float32]] = []
        text: list[str] = []
        t: list[float] = []
        failures: list[Failure] = []
        weights: list[float] = []
        for sample in samples:
            weight = 1.0 if plan.samples else 0.0
            caption, pixels = "", None
            if plan.samples:
                try:
                    caption, pixels = self._read_caption(sample), self._read_frames(sample)
                except (DecodeError, OSError, ValueError) as error:
                    reason = error.reason if isinstance(error, DecodeError) else "read"
                    shard = self.datasets[sample.dataset].manifest.shards[sample.shard].name
                    failures.append(Failure(sample.row.key, shard, reason))
                    weight = 0.0
            size = sample.size
            blank = np.zeros((size.num_frames, size.height, size.width, 3), dtype=np.uint8)
            frames.append(blank if pixels is None else pixels)
            draw = generator(self.seed, sample.step, sample.index, Purpose.noise)
            noise.append(draw.standard_normal(sample.latent_shape, dtype=np.float32))
            draw = generator(self.seed, sample.step, sample.index, Purpose.timestep)
            t.append(sample_t(self.timesteps, sample.num_tokens, draw))
            text.append(caption)
            weights.append(weight)
        pack = Pack(
            step=plan.step,
            micro_step=plan.micro_step,
            is_last=plan.is_last,
            samples=samples,
            frames=[],
            noise=[],
            t_S=torch.tensor(t, dtype=torch.float32),
            text=text,
            weight_S=torch.tensor(weights, dtype=torch.float32),
            planned_tokens=plan.planned_tokens,
            planned_samples=plan.planned_samples,
            failures=tuple(failures),
        )
        return FlatPack(
            pack,
            torch.from_numpy(np.concatenate([part.ravel() for part in frames])),
            torch.from_numpy(np.concatenate([part.ravel() for part in noise])),
        )

    def _read_frames(self, sample: PlannedSample) -> Frames:
        row = sample.row
        data = self.datasets[sample.dataset].read(sample.shard, row.medium_offset, row.medium_size)
        return decode_clip(data, row, sample.size)

    def _read_caption(self, sample: PlannedSample) -> str:
        if sample.caption is None:
            return ""
        row = sample.row
        data = self.datasets[sample.dataset].read(sample.shard, row.record_offset, row.record_size)
        record = ClipRecord.from_json(data)
        if len(record.captions) != len(row.captions):
            raise ValueError(f"{row.key} has {len(record.captions)} captions, the index says {len(row.captions)}")
        return record.captions[sample.caption].text

    def _filler(self, plan: PackPlan) -> PlannedSample:
        # One token, so that a rank without clips runs the same collectives as the others.
        height, width = self.stride.height, self.stride.width
        row = IndexRow(
            key="filler",
            medium="",
            medium_offset=0,
            medium_size=0,
            num_frames=1,
            fps=0.0,
            height=height,
            width=width,
            duration_seconds=0.0,
            source_sha256="",
        )
        size = ClipSize(1, height, width, height, width, 0, 1.0)
        shape = (self.latent_channels, 1, *self.patch)
        return PlannedSample(plan.step, 0, -1, -1, row, size, shape, 1, None)
