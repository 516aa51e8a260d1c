"""Where the documents of a pack begin, for kernels and loops alike."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SharedClips:
    """The clips that a sequence group of ranks shares in one micro-step; the same on all its ranks, but for group_rank.

    They are laid end to end, and the sequence is cut into one range for each rank, in the order of the ranks and as
    long as `shares` says. A rank's range is the end of its pack: whatever sits whole on it comes first.
    """

    of_all: "PackLayout"  # the shared clips at their full lengths; of it, self-attention reads the videos alone
    shares: tuple[int, ...]  # tokens on each rank of the group; they sum to those of the clips
    first_rank: int  # of the group in the world
    group_rank: int  # this rank's place in the group

    def __post_init__(self) -> None:
        if len(self.shares) < 2 or min(self.shares) < 0 or sum(self.shares) != sum(self.of_all.lengths):
            raise ValueError(
                f"shares of {self.shares} do not divide {sum(self.of_all.lengths)} tokens of shared clips among ranks"
            )

    @staticmethod
    def build(
        lengths: Sequence[int],
        shares: Sequence[int],
        first_rank: int,
        group_rank: int,
        device: torch.device | str = "cpu",
    ) -> "SharedClips":
        """Of clips of so many tokens. Raises ValueError for shares that do not sum to them."""
        of_all = PackLayout.build(lengths, [1] * len(lengths), device)
        return SharedClips(of_all, tuple(shares), first_rank, group_rank)

    @property
    def num_tokens(self) -> int:
        """On this rank."""
        return self.shares[self.group_rank]

    @property
    def parts(self) -> list[tuple[int, range]]:
        """The clips of which this rank holds tokens, and which of each clip's they are."""
        start = sum(self.shares[: self.group_rank])
        stop = start + self.num_tokens
        found, begin = [], 0
        for clip, length in enumerate(self.of_all.lengths):
            held = range(max(start - begin, 0), min(stop - begin, length))
            if held:
                found.append((clip, held))
            begin += length
        return found


@dataclass(frozen=True)
class PackLayout:
    """Where the documents of a pack, their texts and, where the model attends to them, their images begin.

    Lengths are host integers, so that a loop over documents or a kernel's `max_seqlen` never waits for the device;
    the tensors are what kernels and lookups read there.
    """

    lengths: tuple[int, ...]  # video tokens of each of the S documents; they sum to L
    text_lengths: tuple[int, ...]  # text rows of each; they sum to M
    cu_seqlens: Tensor  # int32 [S + 1], 0 … L
    cu_text: Tensor  # int32 [S + 1], 0 … M
    sample_L: Tensor  # int64 [L], the document of each token
    sample_M: Tensor  # int64 [M], the document of each text row
    image_lengths: tuple[int, ...] = ()  # image rows of each; they sum to I; empty: the pack has none
    cu_image: Tensor | None = None  # int32 [S + 1], 0 … I
    sample_I: Tensor | None = None  # int64 [I], the document of each image row
    # With it, the last documents are this rank's parts of clips that it shares with its neighbours.
    shared: "SharedClips | None" = None

    @staticmethod
    def build(
        lengths: Sequence[int],
        text_lengths: Sequence[int],
        device: torch.device | str = "cpu",
        image_lengths: Sequence[int] = (),
    ) -> "PackLayout":
        """Raises ValueError unless every document has at least one token and one text row, and, in a pack with
        images, one image row."""
        if not lengths or len(lengths) != len(text_lengths):
            raise ValueError(f"a pack needs as many texts as documents, got {len(lengths)} and {len(text_lengths)}")
        if min(*lengths, *text_lengths) < 1:
            raise ValueError(f"every document needs a token and a text row, got {lengths} and {text_lengths}")
        cu_seqlens, sample_L = _offsets(lengths)
        cu_text, sample_M = _offsets(text_lengths)
        layout = PackLayout(tuple(lengths), tuple(text_lengths), cu_seqlens, cu_text, sample_L, sample_M)
        if image_lengths:
            if len(image_lengths) != len(lengths) or min(image_lengths) < 1:
                raise ValueError(f"every one of {len(lengths)} documents needs an image row, got {image_lengths}")
            cu_image, sample_I = _offsets(image_lengths)
            layout = replace(layout, image_lengths=tuple(image_lengths), cu_image=cu_image, sample_I=sample_I)
        # Without waiting: `.to` alone would stop here until the device has done all that was asked of it before.
        return layout.to(device, non_blocking=True)

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.lengths)

    @functools.cached_property
    def memo(self) -> dict[Any, Any]:
        """What an attention core works out of this layout once, such as a block mask; a copy begins with none."""
        return {}

    @functools.cached_property
    def of_text(self) -> "PackLayout":
        """The layout for self-attention among the text rows."""
        return PackLayout(
            self.text_lengths, self.text_lengths, self.cu_text, self.cu_text, self.sample_M, self.sample_M
        )

    @functools.cached_property
    def of_image(self) -> "PackLayout":
        """The layout for cross-attention to the image rows: they stand where the text rows stood."""
        if self.cu_image is None or self.sample_I is None:
            raise ValueError("the pack has no image rows")
        return replace(self, text_lengths=self.image_lengths, cu_text=self.cu_image, sample_M=self.sample_I)

    @functools.cached_property
    def of_whole(self) -> "PackLayout | None":
        """The layout for self-attention among the documents that sit whole on this rank; None: there are none.

        Raises:
            ValueError: the last documents are not this rank's parts of the shared clips.
        """
        if self.shared is None:
            return self
        parts = tuple(len(held) for _, held in self.shared.parts)
        count = self.num_samples - len(parts)
        if count < 0 or self.lengths[count:] != parts:
            raise ValueError(f"a pack of {self.lengths} tokens does not end in its parts {parts} of shared clips")
        if not count:
            return None
        tokens, rows = sum(self.lengths[:count]), sum(self.text_lengths[:count])
        return PackLayout(
            self.lengths[:count],
            self.text_lengths[:count],
            self.cu_seqlens[: count + 1],
            self.cu_text[: count + 1],
            self.sample_L[:tokens],
            self.sample_M[:rows],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackLayout":
        """The same layout with its tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        if self.shared is not None:
            moved["shared"] = replace(self.shared, of_all=self.shared.of_all.to(device, non_blocking))
        return replace(self, **moved)


def _offsets(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cumulative offsets int32 [S + 1] and the document of each row, int64."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    cumulative = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return cumulative, torch.repeat_interleave(torch.arange(len(lengths)), counts)
