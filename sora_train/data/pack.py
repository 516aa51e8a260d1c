"""What one rank trains on in one micro-step, and how it is put together from what was read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from sora_train.config.diffusion import TimestepConfig
from sora_train.data.draws import Purpose, generator
from sora_train.data.order import PlannedSample
from sora_train.data.packing import PackPlan, Piece
from sora_train.data.precomputed import NUMBERS
from sora_train.data.precomputed_header import Place
from sora_train.data.sample import Facts, Task, places_of, timestep
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
    """The documents that a rank trains on: clips that sit whole on it, then its parts of shared ones; where there are
    none, a filler of weight 0. And the media of all clips that it reads.

    A clip that this rank reads has frames or latents, and noise: of its whole length, also where a part of it, or
    nothing, is trained on here. One that failed, now or when this step was first done, has zeros for all of them. A
    clip that a neighbour reads has none.
    """

    plan: PackPlan
    pieces: tuple[Piece, ...]  # those of the plan, with the filler
    # One a piece: documents, then clips that are read for neighbours alone.
    frames: list[Tensor | None]  # uint8 [T, H, W, 3]
    latents: list[Tensor | None]  # [C, T, H, W] in the numbers they are stored in
    noise: list[Tensor | None]  # float32 [C, T, H, W]
    weight: Tensor  # float32; 0 = filler, or this rank could not read what it should, or was not to
    is_tried: tuple[bool, ...]  # what was to be read: no filler, nor what failed when this step was first done
    # One a document.
    t_S: Tensor  # float32
    # In [0, 1): below diffusion.first_frame_probability, the clip's first frame is known.
    first_frame_draws: tuple[float, ...]
    text: list[str | Tensor]  # "" where the caption was dropped; rows [M, D] where the shard has them
    failures: tuple[Failure, ...]

    @property
    def is_last(self) -> bool:
        """Whether it is the last of its step."""
        return self.plan.is_last

    @property
    def documents(self) -> tuple[Piece, ...]:
        """The pieces with tokens here; S of them."""
        return tuple(piece for piece in self.pieces if piece.part)

    @property
    def samples(self) -> tuple[PlannedSample, ...]:
        """The clip of each document."""
        return tuple(document.sample for document in self.documents)

    @property
    def parts(self) -> tuple[range, ...]:
        """Of each document's clip the tokens that are here."""
        return tuple(document.part for document in self.documents)

    @property
    def num_whole(self) -> int:
        """Documents that are no parts of shared clips; they come first."""
        return sum(document.shared is None for document in self.documents)

    @property
    def num_tokens(self) -> int:
        """Video tokens, filler included."""
        return sum(len(document.part) for document in self.documents)

    def to(self, device: torch.device | str) -> "Pack":
        """With its tensors on a device; to CUDA from page-locked memory, so that the host does not wait."""
        is_pinned = torch.device(device).type == "cuda"
        return self._map(lambda tensor: (tensor.pin_memory() if is_pinned else tensor).to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Pack":
        return replace(
            self,
            frames=[None if frames is None else change(frames) for frames in self.frames],
            latents=[None if latents is None else change(latents) for latents in self.latents],
            noise=[None if noise is None else change(noise) for noise in self.noise],
            t_S=change(self.t_S),
            weight=change(self.weight),
            text=[text if isinstance(text, str) else change(text) for text in self.text],
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
        tasks: Sequence[Task | None],
        facts: Sequence[Facts | None],
        memory: Sequence[Tensor | None],
        failures: Sequence[Failure],
    ) -> Pack:
        """The pack of a plan.

        Args:
            tasks: of each piece of the plan; None: it was not to be read.
            facts: of each; None: it was not read.
            memory: of each, uint8, as its facts and `Task.places` tell; the pack's tensors are views of it.
            failures: those to be told of.
        """
        pieces = plan.pieces
        if not any(piece.part for piece in pieces):
            pieces = (self._filler(plan), *pieces)
            tasks, facts, memory = (None, *tasks), (None, *facts), (None, *memory)
        frames: list[Tensor | None] = []
        latents: list[Tensor | None] = []
        noise: list[Tensor | None] = []
        text: list[str | Tensor] = []
        t: list[float] = []
        for piece, known, part in zip(pieces, facts, memory, strict=True):
            sample = piece.sample
            pixels, stored, drawn = self._medium(sample, known, part) if piece.is_owned else (None, None, None)
            frames.append(pixels)
            latents.append(stored)
            noise.append(drawn)
            if not piece.part:
                continue
            if known is None or part is None:
                text.append("")
                t.append(timestep(self.timesteps, self.seed, sample))
            else:
                text.append(known.text if known.rows is None else _tensor(part, known.rows))
                t.append(known.t)
        return Pack(
            plan=plan,
            pieces=pieces,
            frames=frames,
            latents=latents,
            noise=noise,
            weight=torch.tensor([known is not None for known in facts], dtype=torch.float32),
            is_tried=tuple(task is not None for task in tasks),
            t_S=torch.tensor(t, dtype=torch.float32),
            first_frame_draws=tuple(self._first_frame_draw(piece.sample) for piece in pieces if piece.part),
            text=text,
            failures=tuple(failures),
        )

    def _first_frame_draw(self, sample: PlannedSample) -> float:
        return float(generator(self.seed, sample.step, sample.index, Purpose.first_frame).random())

    @staticmethod
    def _medium(
        sample: PlannedSample, known: Facts | None, part: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Frames or latents, and the noise."""
        shape = (sample.size.num_frames, sample.size.height, sample.size.width, 3)
        if known is None or part is None:
            is_latent = sample.row.latent_shape is not None
            frames = None if is_latent else torch.zeros(shape, dtype=torch.uint8)
            return frames, torch.zeros(sample.latent_shape) if is_latent else None, torch.zeros(sample.latent_shape)
        places = places_of(sample)
        noise = part[places.noise].view(torch.float32).view(sample.latent_shape)
        if known.latents is None:
            return part[places.medium].view(shape), None, noise
        return None, _tensor(part, known.latents)[:, : sample.latent_shape[1]], noise

    def _filler(self, plan: PackPlan) -> Piece:
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
        return Piece(PlannedSample(plan.step, 0, -1, -1, row, size, shape, 1, None), range(1), True)


def _tensor(memory: Tensor, place: Place) -> Tensor:
    dtype = NUMBERS[place.number]
    size = dtype.itemsize * prod(place.shape)
    return memory[place.offset : place.offset + size].view(dtype).view(place.shape)
