"""Attention over a pack, and the one seam of the model: `Attention.core`.

A pack is several documents (samples) laid end to end. `PackLayout` says where each begins; a core keeps them apart.
All cores share one signature, so the kernel, and later the split of a document over ranks, is chosen from outside:

    core(query_LNK, key_MNK, value_MNK, layout, is_cross) -> out_LNK

Self-attention has M = L. Cross-attention takes keys and values from the documents' texts, or, with the layout's
`of_image`, from the rows of their images.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.config.parallel import AttentionKind
from sora_train.config.root import ConfigError
from sora_train.models.rope import rotate

# What FlashAttention-2 takes for the width of a head.
HEAD_MULTIPLE, MAX_HEAD_WIDTH = 8, 256


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

    @property
    def of_text(self) -> "PackLayout":
        """The layout for self-attention among the text rows."""
        return PackLayout(
            self.text_lengths, self.text_lengths, self.cu_text, self.cu_text, self.sample_M, self.sample_M
        )

    @property
    def of_image(self) -> "PackLayout":
        """The layout for cross-attention to the image rows: they stand where the text rows stood."""
        if self.cu_image is None or self.sample_I is None:
            raise ValueError("the pack has no image rows")
        return replace(self, text_lengths=self.image_lengths, cu_text=self.cu_image, sample_M=self.sample_I)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackLayout":
        """The same layout with its tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def _offsets(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cumulative offsets int32 [S + 1] and the document of each row, int64."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    cumulative = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return cumulative, torch.repeat_interleave(torch.arange(len(lengths)), counts)


class Core(Protocol):
    """Attention within each document. Softmax scale is 1 / sqrt(K)."""

    def __call__(
        self, query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool
    ) -> Tensor:
        """Returns [L, N, K]."""
        ...


def sdpa_per_document(
    query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool
) -> Tensor:
    """One `scaled_dot_product_attention` a document: exact on any device, and on CPU faster than any mask."""
    key_lengths = layout.text_lengths if is_cross else layout.lengths
    documents = zip(
        query_LNK.split(layout.lengths), key_MNK.split(key_lengths), value_MNK.split(key_lengths), strict=True
    )
    # The leading 1 is what lets torch take its fused kernel: 3-d input falls back to plain matmuls.
    out = [
        F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None]
        )[0].transpose(0, 1)
        for query, key, value in documents
    ]
    return torch.cat(out)


def masked_sdpa(query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool) -> Tensor:
    """One call with a dense L x M mask: quadratic in the pack, kept as the reference the others are held to."""
    mask_LM = layout.sample_L[:, None] == (layout.sample_M if is_cross else layout.sample_L)[None, :]
    query, key, value = (x.transpose(0, 1)[None] for x in (query_LNK, key_MNK, value_MNK))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask_LM)[0].transpose(0, 1)


def torch_varlen(query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool) -> Tensor:
    """FlashAttention-2 over variable lengths, as torch ships it (CUDA, bf16 or fp16, torch >= 2.10)."""
    from torch.nn.attention.varlen import varlen_attn

    cu_keys, key_lengths = (layout.cu_text, layout.text_lengths) if is_cross else (layout.cu_seqlens, layout.lengths)
    out: Tensor = varlen_attn(  # type: ignore[assignment]
        query_LNK, key_MNK, value_MNK, layout.cu_seqlens, cu_keys, max(layout.lengths), max(key_lengths)
    )
    return out


def flash_attention(
    query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool
) -> Tensor:
    """`flash_attn_varlen_func` of the flash-attn package (CUDA, bf16 or fp16)."""
    from flash_attn import flash_attn_varlen_func

    cu_keys, key_lengths = (layout.cu_text, layout.text_lengths) if is_cross else (layout.cu_seqlens, layout.lengths)
    out: Tensor = flash_attn_varlen_func(
        query_LNK, key_MNK, value_MNK, layout.cu_seqlens, cu_keys, max(layout.lengths), max(key_lengths)
    )
    return out


def choose_core(
    kind: AttentionKind, device: torch.device | str, dtype: torch.dtype, head_widths: Collection[int] = ()
) -> tuple[Core, str]:
    """The core for a device, the precision of its inputs and the model's head widths, and one line that says which
    it is and why.

    Raises:
        ConfigError: a kernel asked for by name cannot run here.
    """
    on_cuda = torch.device(device).type == "cuda"
    is_half = dtype in (torch.bfloat16, torch.float16)
    has_flash, has_varlen = find_spec("flash_attn") is not None, find_spec("torch.nn.attention.varlen") is not None
    odd_widths = sorted(width for width in head_widths if width % HEAD_MULTIPLE or width > MAX_HEAD_WIDTH)
    kernels_run = on_cuda and is_half and not odd_widths
    place = f"{torch.device(device).type} in {str(dtype).removeprefix('torch.')}"
    if kind is AttentionKind.auto:
        if kernels_run and has_flash:
            return flash_attention, f"flash-attn over variable lengths ({place})"
        if kernels_run and has_varlen:
            return torch_varlen, f"torch varlen_attn, flash-attn is not installed ({place})"
        reasons = {
            "its kernels need CUDA": not on_cuda,
            "its kernels need bf16": not is_half,
            f"no kernel takes heads of width {odd_widths}": bool(odd_widths),
            "not in this torch": True,
        }
        why = next(reason for reason, holds in reasons.items() if holds)
        return sdpa_per_document, f"SDPA per document ({place}); no flash attention: {why}"
    if kind is AttentionKind.sdpa:
        return sdpa_per_document, f"SDPA per document, as configured ({place})"
    if kind is AttentionKind.masked:
        return masked_sdpa, f"masked SDPA, as configured: quadratic in the pack ({place})"
    is_flash = kind is AttentionKind.flash
    if not (on_cuda and is_half):
        raise ConfigError(
            f"parallel.attention={kind.value} needs CUDA and bf16, this run is on {place}: use parallel.attention=auto"
        )
    if odd_widths:
        raise ConfigError(
            f"parallel.attention={kind.value} has no kernel for heads of width {odd_widths[0]}: "
            f"use a multiple of {HEAD_MULTIPLE} up to {MAX_HEAD_WIDTH}, or parallel.attention=auto"
        )
    if not (has_flash if is_flash else has_varlen):
        fix = "pip install 'sora_train[gpu]'" if is_flash else "install torch >= 2.10"
        raise ConfigError(f"parallel.attention={kind.value} is not installed: {fix} or use parallel.attention=auto")
    core: Core = flash_attention if is_flash else torch_varlen
    return core, f"{kind.value}, as configured ({place})"


class Attention(nn.Module):
    """Multi-head attention with RMSNorm over the full width of queries and keys (Wan 2.1).

    With `has_image`, a second attention by the same queries, to image rows, is added before the output projection
    (Wan 2.1's image-to-video models).
    `core` is replaced from outside (`apply_core`); the rest of the module treats every row alike.
    """

    core: Core

    def __init__(self, width: int, heads: int, eps: float, qk_norm: bool = True, has_image: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=eps) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width, eps=eps) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(width, width)
        self.has_image = has_image
        if has_image:
            self.add_k_proj = nn.Linear(width, width)
            self.add_v_proj = nn.Linear(width, width)
            self.norm_added_k = nn.RMSNorm(width, eps=eps) if qk_norm else nn.Identity()
        self.core = sdpa_per_document

    def forward(
        self,
        rows_LD: Tensor,
        source_MD: Tensor | None,
        rotation: Tensor | None,
        layout: PackLayout,
        image_ID: Tensor | None = None,
    ) -> Tensor:
        """Self-attention among `rows_LD`, or cross-attention to the text rows `source_MD`.

        Args:
            rows_LD: the rows that ask.
            source_MD: text rows, or None for self-attention.
            rotation: complex [L, 1, K/2] of `rope.rotation`, or None to leave queries and keys unrotated.
            layout: the documents of the pack.
            image_ID: projected image rows; given if and only if the module `has_image`.
        """
        is_cross = source_MD is not None
        keys_from = rows_LD if source_MD is None else source_MD
        query_LNK = self.norm_q(self.to_q(rows_LD)).unflatten(-1, (self.heads, -1))
        key_MNK = self.norm_k(self.to_k(keys_from)).unflatten(-1, (self.heads, -1))
        value_MNK = self.to_v(keys_from).unflatten(-1, (self.heads, -1))
        if rotation is not None:
            query_LNK, key_MNK = rotate(query_LNK, rotation), rotate(key_MNK, rotation)
        out_LNK = self.core(query_LNK, key_MNK, value_MNK, layout, is_cross)
        if self.has_image:
            if image_ID is None:
                raise ValueError("attention to images needs image rows")
            key_INK = self.norm_added_k(self.add_k_proj(image_ID)).unflatten(-1, (self.heads, -1))
            value_INK = self.add_v_proj(image_ID).unflatten(-1, (self.heads, -1))
            out_LNK = out_LNK + self.core(query_LNK, key_INK, value_INK, layout.of_image, True)
        return self.to_out(out_LNK.flatten(-2))


def apply_core(model: nn.Module, kind: AttentionKind, device: torch.device | str, dtype: torch.dtype) -> str:
    """Gives every `Attention` of a model the core that `choose_core` names; returns the line that says why.

    Raises:
        ConfigError: see `choose_core`.
    """
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    core, reason = choose_core(kind, device, dtype, {each.to_q.out_features // each.heads for each in attentions})
    for each in attentions:
        each.core = core
    return reason
