"""What one rank trains on in one micro-step, and how it is put together from what was read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from sora_train.config.diffusion import TimestepConfig
from sora_train.data.order import PlannedSample
from sora_train.data.packing import PackPlan
from sora_train.data.precomputed import NUMBERS
from sora_train.data.precomputed_header import Place
from sora_train.data.sample import Facts, places_of, timestep
from sora_train.data.schema import IndexRow
from sora_train.data.size import ClipSize, Stride


@dataclass(frozen=True)
class Failure:
    """A clip that could not be read. It keeps its place in the pack, with weight 0."""

    key: str
    shard: str  # data set/shard
    reason: str


@dataclass(frozen=True)
class Pack:
    """The lists have one entry a sample, in the order of `samples`; a filler is a sample of weight 0.

    A sample has frames or latents. One that failed, now or when this step was first done, has zeros for all of them.
    """

    step: int
    micro_step: int
    is_last: bool
    samples: tuple[PlannedSample, ...]
    frames: list[Tensor | None]  # uint8 [T, H, W, 3]
    latents: list[Tensor | None]  # [C, T, H, W] in the numbers they are stored in
    noise: list[Tensor]  # float32 [C, T, H, W]
    t_S: Tensor  # float32
    text: list[str | Tensor]  # "" where the caption was dropped; rows [M, D] where the shard has them
    weight_S: Tensor  # float32; 0 = failed or filler
    is_trained: tuple[bool, ...]  # the same, for the host
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
            frames=[None if frames is None else change(frames) for frames in self.frames],
            latents=[None if latents is None else change(latents) for latents in self.latents],
            noise=[change(noise) for noise in self.noise],
            t_S=change(self.t_S),
            text=[text if isinstance(text, str) else change(text) for text in self.text],
            weight_S=change(self.weight_S),
        )


@dataclass(frozen=True)
class Assembly:
    """Puts packs together."""

    timesteps: TimestepConfig
    seed: int
    stride: Stride
    latent_channels: int
    patch: tuple[int, int]  # rows and columns of latents that a token covers

    def build(
        self,
        plan: PackPlan,
        facts: Sequence[Facts | None],
        memory: Sequence[Tensor | None],
        failures: Sequence[Failure],
    ) -> Pack:
        """The pack of a plan.

        Args:
            facts: of each sample of the plan; None: it could not be read, or was not to be.
            memory: of each sample, uint8, as its facts and `places_of` tell; the pack's tensors are views of it.
            failures: those to be told of.
        """
        if not plan.samples:
            return self._pack(plan, (self._filler(plan),), [None], [None], failures)
        return self._pack(plan, plan.samples, facts, memory, failures)

    def _pack(
        self,
        plan: PackPlan,
        samples: tuple[PlannedSample, ...],
        facts: Sequence[Facts | None],
        memory: Sequence[Tensor | None],
        failures: Sequence[Failure],
    ) -> Pack:
        frames: list[Tensor | None] = []
        latents: list[Tensor | None] = []
        noise: list[Tensor] = []
        text: list[str | Tensor] = []
        t: list[float] = []
        for sample, known, part in zip(samples, facts, memory, strict=True):
            size, places = sample.size, places_of(sample)
            shape = (size.num_frames, size.height, size.width, 3)
            if known is None or part is None:
                is_latent = sample.row.latent_shape is not None
                frames.append(None if is_latent else torch.zeros(shape, dtype=torch.uint8))
                latents.append(torch.zeros(sample.latent_shape) if is_latent else None)
                noise.append(torch.zeros(sample.latent_shape))
                text.append("")
                t.append(timestep(self.timesteps, self.seed, sample))
                continue
            is_latent = known.latents is not None
            frames.append(None if is_latent else part[places.medium].view(shape))
            stored = None if known.latents is None else _tensor(part, known.latents)
            latents.append(None if stored is None else stored[:, : sample.latent_shape[1]])
            noise.append(part[places.noise].view(torch.float32).view(sample.latent_shape))
            text.append(known.text if known.rows is None else _tensor(part, known.rows))
            t.append(known.t)
        is_trained = tuple(known is not None for known in facts)
        return Pack(
            step=plan.step,
            micro_step=plan.micro_step,
            is_last=plan.is_last,
            samples=samples,
            frames=frames,
            latents=latents,
            noise=noise,
            t_S=torch.tensor(t, dtype=torch.float32),
            text=text,
            weight_S=torch.tensor(is_trained, dtype=torch.float32),
            is_trained=is_trained,
            planned_tokens=plan.planned_tokens,
            planned_samples=plan.planned_samples,
            failures=tuple(failures),
        )

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


def _tensor(memory: Tensor, place: Place) -> Tensor:
    dtype = NUMBERS[place.number]
    size = dtype.itemsize * prod(place.shape)
    return memory[place.offset : place.offset + size].view(dtype).view(place.shape)
