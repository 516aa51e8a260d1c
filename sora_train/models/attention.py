"""Attention over a pack, and the one seam of the model: `Attention.core`.

A pack is several documents (samples) laid end to end. `PackLayout` says where each begins; a core keeps them apart. All
cores share one signature, so the kernel, and the split of a document over ranks, is chosen from outside.
"""

import torch
from torch import Tensor, nn

from sora_train.config.parallel import AttentionKind
from sora_train.models.attention_choice import choose_core
from sora_train.models.attention_cores import Core, sdpa_per_document
from sora_train.models.norms import RMSNorm
from sora_train.models.pack_layout import PackLayout
from sora_train.models.rope import rotate


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
        self.norm_q = RMSNorm(width, eps=eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width, eps=eps) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(width, width)
        self.has_image = has_image
        if has_image:
            self.add_k_proj = nn.Linear(width, width)
            self.add_v_proj = nn.Linear(width, width)
            self.norm_added_k = RMSNorm(width, eps=eps) if qk_norm else nn.Identity()
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
