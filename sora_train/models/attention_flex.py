"""FlexAttention as an attention core: one compiled kernel that skips the blocks of other documents.

The blocks to visit are worked out from the layout, once for each layout and without waiting for the device;
`create_block_mask` would fill the whole L x M mask first.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sora_train.models.pack_layout import PackLayout

BLOCK = 128  # tokens of a block of the mask, of queries and of keys


def flex_per_document(
    query_LNK: Tensor, key_MNK: Tensor, value_MNK: Tensor, layout: PackLayout, is_cross: bool
) -> Tensor:
    """Compiled FlexAttention (CUDA: on a CPU torch has no backward pass of it).

    Blocks that two documents share are computed whole and masked: exact for all finite numbers, but a NaN in one
    document can reach its neighbours.
    """
    mask = layout.memo.get(("flex", is_cross))
    if mask is None:
        mask = layout.memo["flex", is_cross] = document_mask(layout, is_cross)
    query, key, value = (x.transpose(0, 1)[None] for x in (query_LNK, key_MNK, value_MNK))
    return compiled_flex()(query, key, value, block_mask=mask)[0].transpose(0, 1)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """One kernel for packs of all lengths."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


def document_mask(layout: PackLayout, is_cross: bool) -> BlockMask:
    """The blocks that hold keys of a document of their queries, on the layout's device.

    Documents lie in order, so a row of blocks needs one range of key blocks: from where the keys of its first document
    begin to where those of its last end. Blocks that lie within one document, queries and keys, need no mask.
    """
    num_tokens, num_keys = sum(layout.lengths), sum(layout.text_lengths if is_cross else layout.lengths)
    cu_keys, sample_M = (layout.cu_text, layout.sample_M) if is_cross else (layout.cu_seqlens, layout.sample_L)
    sample_L, device = layout.sample_L, layout.sample_L.device
    rows_R = torch.arange(-(-num_tokens // BLOCK), device=device, dtype=torch.int32) * BLOCK
    columns_C = torch.arange(-(-num_keys // BLOCK), device=device, dtype=torch.int32)
    first_R, last_R = sample_L[rows_R], sample_L[(rows_R + (BLOCK - 1)).clamp(max=num_tokens - 1)]
    begin_R, end_R = cu_keys[first_R], cu_keys[last_R + 1]  # keys
    start_R, stop_R = begin_R // BLOCK, (end_R + (BLOCK - 1)) // BLOCK  # blocks that hold some of them
    is_one_R = (first_R == last_R) & (rows_R + BLOCK <= num_tokens)
    full_start_R = torch.where(is_one_R, (begin_R + (BLOCK - 1)) // BLOCK, stop_R)
    full_stop_R = torch.where(is_one_R, end_R // BLOCK, stop_R).maximum(full_start_R)
    # Masked blocks lie before and after the full ones.
    before_R1 = (full_start_R - start_R)[:, None]
    after_RC = full_stop_R[:, None] + columns_C - before_R1
    masked_RC = torch.where(columns_C < before_R1, start_R[:, None] + columns_C, after_RC)

    def same_document(batch: Tensor, head: Tensor, token: Tensor, key_row: Tensor) -> Tensor:
        return sample_L[token] == sample_M[key_row]

    return BlockMask.from_kv_blocks(
        (full_start_R - start_R + stop_R - full_stop_R)[None, None],
        masked_RC.clamp(max=len(columns_C) - 1)[None, None],
        (full_stop_R - full_start_R)[None, None],
        (full_start_R[:, None] + columns_C).clamp(max=len(columns_C) - 1)[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=same_document,
        seq_lengths=(num_tokens, num_keys),
    )
