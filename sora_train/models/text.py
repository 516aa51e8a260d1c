"""The byte text path: captions as UTF-8 bytes, encoded inside the model and trained with it.

No tokenizer, no frozen encoder: what a laptop trains in minutes, and any language or symbol is in its vocabulary.
The frozen encoders (config.text_encoder) enter the model as float rows instead and skip this module.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.config.model import TextConfig
from sora_train.models.attention import Attention
from sora_train.models.pack_layout import PackLayout

BEGIN = 256  # stands before the bytes, so that no caption is empty
VOCABULARY = 257


def byte_ids(text: str, max_bytes: int) -> list[int]:
    """BEGIN, then the first `max_bytes` bytes of the caption in UTF-8."""
    return [BEGIN, *text.encode("utf-8", errors="replace")[:max_bytes]]


def pack_bytes(captions: Sequence[str], max_bytes: int) -> tuple[Tensor, tuple[int, ...]]:
    """Ids of all captions end to end, int64 [M], and how many each has."""
    documents = [byte_ids(caption, max_bytes) for caption in captions]
    ids_M = torch.tensor([token for document in documents for token in document], dtype=torch.int64)
    return ids_M, tuple(len(document) for document in documents)


class ByteBlock(nn.Module):
    """Pre-norm transformer block over packed captions."""

    def __init__(self, config: TextConfig, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=eps)
        self.attention = Attention(config.width, config.heads, eps)
        self.norm2 = nn.LayerNorm(config.width, eps=eps)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, rows_MD: Tensor, layout: PackLayout) -> Tensor:
        """`layout` is the text's own (`PackLayout.of_text`)."""
        rows_MD = rows_MD + self.attention(self.norm1(rows_MD), None, None, layout)
        return rows_MD + self.down(F.gelu(self.up(self.norm2(rows_MD)), approximate="tanh"))


class ByteText(nn.Module):
    """Bytes -> one row a byte for cross-attention, and one pooled row a caption for the time embedding."""

    def __init__(self, config: TextConfig, eps: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Embedding(config.max_bytes + 1, config.width)
        self.blocks = nn.ModuleList(ByteBlock(config, eps) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=eps)

    def forward(self, ids_M: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
        """ids int64 [M] -> rows [M, text width], pooled [S, text width] (the mean of a caption's rows)."""
        text = layout.of_text
        place_M = torch.arange(ids_M.shape[0], device=ids_M.device) - text.cu_seqlens[text.sample_L]
        rows_MD = self.embedding(ids_M) + self.positions(place_M)
        for block in self.blocks:
            rows_MD = block(rows_MD, text)
        rows_MD = self.norm(rows_MD)
        pooled_SD = torch.stack([rows.mean(0) for rows in rows_MD.split(text.lengths)])
        return rows_MD, pooled_SD
