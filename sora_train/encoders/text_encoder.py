"""Frozen text encoders (T5, UMT5) from a transformers folder: captions to rows that the model attends to.

Used with model.text.kind=encoder; the byte text path needs none of this.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_train.config.encoders import TextEncoderConfig
from sora_train.config.root import ConfigError

FAMILIES = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}  # model_type of config.json -> transformers class

# Of each layer, about so many weights are part of an encoder's identity.
IDENTITY_WEIGHTS = 4096


class TextEncoder:
    """A frozen encoder and its tokenizer. Rows stop where the text stops, unless `pad_to_max` asks for Wan's way."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int, pad_to_max: bool) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.pad_to_max = pad_to_max
        self.width: int = model.config.d_model

    @cached_property
    def identity(self) -> str:
        """Two encoders of one identity give the same rows: family and a hash of words, settings and, since there are
        billions, of some thousand weights of each layer."""
        digest = hashlib.sha256(f"{self.max_tokens} {self.pad_to_max}".encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            some = value.detach().flatten()[:: max(1, value.numel() // IDENTITY_WEIGHTS)]
            digest.update(some.cpu().float().numpy().tobytes())
        for word, number in sorted(self.tokenizer.get_vocab().items()):
            digest.update(f"{word}\0{number}".encode())
        return f"{type(self.model).__name__}-{digest.hexdigest()[:16]}"

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Rows [M, width] of each caption, on the encoder's device; an empty caption has the end mark's row.

        With `pad_to_max`, zeros follow up to max_tokens rows: Wan was trained to attend to them (512 rows, no mask).
        White space is normalised, as Wan and T5 do.
        """
        texts = [" ".join(caption.split()) for caption in captions]
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        # All that depends on lengths is decided here, so that nothing waits for the device: given the tokenizer's mask,
        # transformers would ask there whether it masks anything.
        lengths = batch.attention_mask.sum(1).tolist()
        bias = None  # added to scores, [captions, heads, queries, keys]
        if min(lengths) < max(lengths):
            is_padding = batch.attention_mask[:, None, None, :] == 0
            bias = torch.zeros(is_padding.shape, dtype=self.model.dtype)
            bias = bias.masked_fill_(is_padding, torch.finfo(bias.dtype).min).to(self.model.device, non_blocking=True)
        ids = batch.input_ids.to(self.model.device, non_blocking=True)
        hidden = self.model(input_ids=ids, attention_mask=bias).last_hidden_state
        rows = [h[:length] for h, length in zip(hidden, lengths, strict=True)]
        if not self.pad_to_max:
            return rows
        return [torch.cat([r, r.new_zeros(self.max_tokens - r.shape[0], self.width)]) for r in rows]


def load_text_encoder(
    config: TextEncoderConfig, width: int, device: torch.device | str, dtype: torch.dtype
) -> TextEncoder:
    """Loads encoder and tokenizer from one folder (or hub id), or from `text_encoder/` and `tokenizer/` inside it,
    as diffusers lays a pipeline out.

    Raises ConfigError when the path is missing, holds no T5 or UMT5 encoder or one whose rows are not as wide as the
    model takes them (`width`), or transformers is not installed.
    """
    if not config.path:
        raise ConfigError("text_encoder.path is not set: give the folder of a T5 or UMT5, or use model.text.kind=bytes")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("model.text.kind=encoder needs transformers: pip install 'sora_train[encoders]'") from error
    folder = Path(config.path)
    is_pipeline = (folder / "text_encoder").is_dir()
    weights, words = (str(folder / "text_encoder"), str(folder / "tokenizer")) if is_pipeline else (config.path,) * 2
    is_local = folder.exists() or config.path.startswith((".", "/", "~"))
    if is_local and not (Path(weights) / "config.json").is_file():
        raise ConfigError(f"text_encoder.path={config.path} holds no config.json: give the folder of a T5 or UMT5")
    try:
        settings = transformers.AutoConfig.from_pretrained(weights)
        family = settings.model_type
        if family not in FAMILIES:
            raise ConfigError(f"text_encoder.path={config.path} is a {family}: use a T5 or UMT5 encoder")
        if settings.d_model != width:
            raise ConfigError(
                f"model.text.width={width}, but text_encoder.path={config.path} gives rows of {settings.d_model}: "
                f"set model.text.width={settings.d_model}"
            )
        model = getattr(transformers, FAMILIES[family]).from_pretrained(weights, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    except OSError as error:
        raise ConfigError(f"text_encoder.path={config.path}: {str(error).splitlines()[0]}") from error
    return TextEncoder(model.to(device), tokenizer, config.max_tokens, config.pad_to_max)
