"""FLOPs of VideoDiT from its config alone: what packs are balanced by, and what MFU is measured against. Pure.

Counts multiplications and additions of matrix products; norms, activations and RoPE are left out, as is usual
(Chowdhery et al. 2022, PaLM, appendix B).
"""

from sora_train.config.model import ModelConfig, TextKind

# A backward pass takes the gradients of both factors of each product.
TRAINING_FACTOR = 3

# Dense bf16 FLOPs a second by a part of torch's device name (NVIDIA's data sheets); the first that matches.
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}


def linear_flops(config: ModelConfig) -> tuple[int, int, int]:
    """Forward FLOPs of linear layers a video token, a text token and a sample."""
    width, text = config.width, config.text
    volume = config.patch_frames * config.patch_height * config.patch_width
    # Self-attention has four square products a token; cross-attention two for queries and output, and two a text row.
    token = config.depth * (6 * width**2 + 2 * width * config.mlp_width)
    token += volume * (config.in_channels + config.out_channels) * width
    text_token = config.depth * 2 * width**2 + text.width * width + width**2
    sample = config.frequency_width * width + 7 * width**2
    if text.kind is TextKind.bytes:
        text_token += text.layers * 12 * text.width**2
        sample += text.width * width
    return 2 * token, 2 * text_token, 2 * sample


def forward_flops(config: ModelConfig, num_tokens: int, num_text_tokens: int) -> int:
    """Of one sample: linear in both lengths, quadratic in attention (scores and weighted values)."""
    token, text_token, sample = linear_flops(config)
    attention = 4 * config.depth * config.width * (num_tokens**2 + num_tokens * num_text_tokens)
    if config.text.kind is TextKind.bytes:
        attention += 4 * config.text.layers * config.text.width * num_text_tokens**2
    return token * num_tokens + text_token * num_text_tokens + sample + attention


def step_flops(config: ModelConfig, num_tokens: int, num_text_tokens: int) -> int:
    """Forward and backward of one sample, without recomputation."""
    return TRAINING_FACTOR * forward_flops(config, num_tokens, num_text_tokens)


def text_tokens(config: ModelConfig, num_bytes: int) -> int:
    """Text rows that a caption of `num_bytes` gives: exact for bytes; for an encoder, about one in four bytes."""
    if config.text.kind is TextKind.bytes:
        return 1 + min(num_bytes, config.text.max_bytes)
    return 1 + num_bytes // 4


def peak_flops(device_name: str) -> float:
    """Dense bf16 FLOPs a second of a device as torch names it; 0 when it is not known."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), 0.0)


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: useful FLOPs over what the device could have done; 0 when its peak is not known."""
    return flops / seconds / peak if peak > 0 and seconds > 0 else 0.0
