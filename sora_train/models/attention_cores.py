"""Attention within the documents of a pack: every kernel behind one signature, and the choice among them.

    core(query_LNK, key_MNK, value_MNK, layout, is_cross) -> out_LNK

Self-attention has M = L. Cross-attention takes keys and values from the documents' texts, or, with the layout's
`of_image`, from the rows of their images.
"""

from collections.abc import Collection
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_train.config.parallel import AttentionKind
from sora_train.config.root import ConfigError
from sora_train.models.pack_layout import PackLayout

# What FlashAttention-2 takes for the width of a head.
HEAD_MULTIPLE, MAX_HEAD_WIDTH = 8, 256


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
