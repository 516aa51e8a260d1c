"""Attention within the documents of a pack: kernels behind one signature. `attention_choice` chooses among them.

    core(query_LNK, key_MNK, value_MNK, layout, is_cross) -> out_LNK

Self-attention has M = L. Cross-attention takes keys and values from the documents' texts, or, with the layout's
`of_image`, from the rows of their images. No core pads, and none but the reference fills an L x M mask.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sora_train.models.pack_layout import PackLayout


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
    """`scaled_dot_product_attention` document by document: exact on any device, and on CPU faster than any mask.

    Neighbours of equal lengths (both of queries and of keys) are a batch as they lie, and go in one call.
    """
    key_lengths = layout.text_lengths if is_cross else layout.lengths
    return _sdpa_of_batches(query_LNK, key_MNK, value_MNK, equal_neighbours(layout.lengths, key_lengths))


def masked_sdpa(query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool) -> Tensor:
    """One call with a dense L x M mask: quadratic in the pack, kept as the reference the others are held to.

    What other documents hold gets weight zero, which is exact for all finite numbers; a NaN times zero is a NaN.
    """
    mask_LM = layout.sample_L[:, None] == (layout.sample_M if is_cross else layout.sample_L)[None, :]
    query, key, value = (x.transpose(0, 1)[None] for x in (query_LNK, key_MNK, value_MNK))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask_LM)[0].transpose(0, 1)


def cudnn_per_document(
    query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool
) -> Tensor:
    """SDPA document by document on cuDNN's kernels (CUDA, bf16 or fp16).

    cuDNN builds a plan, in up to a second, whenever it meets a shape for the first time in a process. Two things keep
    shapes few. The number of equal neighbours that go in one call is a power of two. And with the environment's
    TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 (torch >= 2.9) torch itself rounds lengths up to powers of two in the plan and
    tells the kernel the true ones: nothing is padded. Here lengths cannot be rounded: a padded key must be masked, and
    torch hands cuDNN a mask only as a bias that is added to every score. Cross-attention stays off cuDNN: every pair of
    a clip's and a caption's length would be a shape, for a small part of the work.

    Shapes that cuDNN refuses, such as a single token, go to torch's own flash or memory-efficient kernels.
    """
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if is_cross:
        batches = equal_neighbours(layout.lengths, layout.text_lengths)
    else:
        batches = powers_of_two(equal_neighbours(layout.lengths, layout.lengths))
        backends.insert(0, SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(backends, set_priority=True):
        return _sdpa_of_batches(query_LNK, key_MNK, value_MNK, batches)


Batch = tuple[int, int, int]  # documents that lie side by side, tokens and key rows of each


def equal_neighbours(lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> Iterator[Batch]:
    """The documents of a pack in order, equal neighbours together."""
    for (length, key_length), documents in groupby(zip(lengths, key_lengths, strict=True)):
        yield sum(1 for _ in documents), length, key_length


def powers_of_two(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same documents in batches of 1, 2, 4, …, the largest first."""
    for count, length, key_length in batches:
        for power in reversed(range(count.bit_length())):
            if count >> power & 1:
                yield 1 << power, length, key_length


def _sdpa_of_batches(query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, batches: Iterable[Batch]) -> Tensor:
    batches = list(batches)
    rows, key_rows = [count * length for count, length, _ in batches], [count * length for count, _, length in batches]
    # Four dimensions, also of one document, are what lets torch take its fused kernels; given to all documents at once,
    # since each view of a small one costs as much as its arithmetic.
    parts = zip(
        batches,
        query_LNK[None].split(rows, dim=1),
        key_MNK[None].split(key_rows, dim=1),
        value_MNK[None].split(key_rows, dim=1),
        strict=True,
    )
    out = []
    for (count, _, _), *inputs in parts:
        if count > 1:
            inputs = [part.reshape(count, -1, *part.shape[2:]) for part in inputs]
        query, key, value = (part.transpose(1, 2) for part in inputs)
        of_batch = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        out.append(of_batch if count == 1 else of_batch.flatten(0, 1)[None])
    return (out[0] if len(out) == 1 else torch.cat(out, dim=1))[0]


def torch_varlen(query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool) -> Tensor:
    """FlashAttention-2 over variable lengths, as torch ships it (CUDA, bf16 or fp16, torch >= 2.10)."""
    from torch.nn.attention.varlen import varlen_attn

    out: Tensor = varlen_attn(  # type: ignore[assignment]
        query_LNK, key_MNK, value_MNK, **_offsets(layout, is_cross, "cu_seq_{}", "max_{}")
    )
    return out


def flash_attention_2(
    query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool
) -> Tensor:
    """The flash-attn package (CUDA, bf16 or fp16)."""
    from flash_attn import flash_attn_varlen_func

    return _flash_varlen(flash_attn_varlen_func, query_LNK, key_MNK, value_MNK, layout, is_cross)


def flash_attention_3(
    query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool
) -> Tensor:
    """FlashAttention-3, built from the folder hopper/ of its repository (Hopper, bf16 or fp16)."""
    from flash_attn_interface import flash_attn_varlen_func

    return _flash_varlen(flash_attn_varlen_func, query_LNK, key_MNK, value_MNK, layout, is_cross)


def flash_attention_4(
    query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool
) -> Tensor:
    """The flash-attn-4 package, compiled when first called (Hopper and Blackwell, bf16 or fp16)."""
    from flash_attn.cute import flash_attn_varlen_func

    return _flash_varlen(flash_attn_varlen_func, query_LNK, key_MNK, value_MNK, layout, is_cross)


def _flash_varlen(
    attend: Callable[..., Any],
    query_LNK: Tensor,
    key_MNK: Tensor,
    value_MNK: Tensor,
    layout: PackLayout,
    is_cross: bool,
) -> Tensor:
    """By keyword, since the three packages agree on names, not on places."""
    out = attend(query_LNK, key_MNK, value_MNK, **_offsets(layout, is_cross, "cu_seqlens_{}", "max_seqlen_{}"))
    # FlashAttention-4 and the first releases of 3 return the log of the sum of exponentials too.
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _offsets(layout: PackLayout, is_cross: bool, offsets: str, longest: str) -> dict[str, Any]:
    """Where documents begin, on the device, and the longest, on the host: by the names of a kernel's arguments."""
    cu_keys, key_lengths = (layout.cu_text, layout.text_lengths) if is_cross else (layout.cu_seqlens, layout.lengths)
    return {
        offsets.format("q"): layout.cu_seqlens,
        offsets.format("k"): cu_keys,
        longest.format("q"): max(layout.lengths),
        longest.format("k"): max(key_lengths),
    }
