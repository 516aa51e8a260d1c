"""FLOPs of VideoDiT from its config alone: what packs are balanced by, and what MFU is measured against. Pure.

Counted are the multiplications and additions of matrix products, exactly as torch's FlopCounterMode counts them, one
document of a pack at a time: linear layers (blocks, embeddings, modulation, projections of text and images), scores and
weighted values of self-attention, of cross-attention to text and to images, and of the byte encoder. Left out, as is
usual (Chowdhery et al. 2022, PaLM, appendix B), are norms, activations, softmax, RoPE and the modulation's elementwise
products. A backward pass takes the gradients of both factors of each product, except of those inputs that nobody asks
a gradient of: patches, sinusoids of t, rows of a frozen encoder.

All of it is useful work: there is no padding in a pack (Wan's 512 text rows, zeros after the text's end, are what that
model attends to, and count if they are given), nothing is recomputed, and the frozen encoders are not in it.
"""

from dataclasses import dataclass

from sora_train.config.model import ModelConfig, TextKind

# Dense bf16 FLOPs a second by a part of torch's device name (NVIDIA's data sheets); the first that matches.
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}


@dataclass(frozen=True)
class LinearFlops:
    """Forward FLOPs of the linear layers for one row of each kind, and how many of them take no gradient further."""

    token: int
    text: int  # a row of text
    image: int  # a row of an image
    time: int  # a different t
    first_token: int  # of `token`, the layer that the patches enter
    first_text: int  # of `text`, the layer that a frozen encoder's rows enter; 0 for bytes
    first_time: int  # of `time`, the layer that the sinusoids enter
    sample: int  # whatever is done once a sample: the pooled text


def linear_flops(config: ModelConfig) -> LinearFlops:
    """A product of a row with a matrix of n x m is 2 n m FLOPs."""
    width, text, image = config.width, config.text, config.image_width
    volume = config.patch_frames * config.patch_height * config.patch_width
    is_bytes = text.kind is TextKind.bytes
    # Self-attention has four square products a token; cross-attention two for queries and output, and two a row of
    # text or image.
    block = 6 * width**2 + 2 * width * config.mlp_width
    first_token = volume * (config.in_channels + config.condition_channels) * width
    first_text = text.width * width
    first_time = config.frequency_width * width
    byte_encoder = text.layers * 12 * text.width**2 if is_bytes else 0
    return LinearFlops(
        token=2 * (config.depth * block + first_token + volume * config.out_channels * width),
        text=2 * (config.depth * 2 * width**2 + first_text + width**2 + byte_encoder),
        image=2 * (config.depth * 2 * width**2 + image**2 + image * width) if image else 0,
        time=2 * (first_time + 7 * width**2),
        first_token=2 * first_token,
        first_text=0 if is_bytes else 2 * first_text,
        first_time=2 * first_time,
        sample=2 * text.width * width if is_bytes else 0,
    )


def forward_flops(
    config: ModelConfig, num_tokens: int, num_text_tokens: int, num_image_tokens: int = 0, num_times: int = 1
) -> int:
    """Of one sample: linear in all lengths, quadratic in attention (scores and weighted values).

    Args:
        config: the model.
        num_tokens: video tokens.
        num_text_tokens: rows of text as they enter the model.
        num_image_tokens: rows of images.
        num_times: different t that are embedded: 2 with clean frames, one a token where each has its own.
    """
    each = linear_flops(config)
    linear = each.token * num_tokens + each.text * num_text_tokens + each.image * num_image_tokens
    linear += each.time * num_times + each.sample
    keys = num_tokens + num_text_tokens + num_image_tokens
    attention = 4 * config.depth * config.width * num_tokens * keys
    if config.text.kind is TextKind.bytes:
        attention += 4 * config.text.layers * config.text.width * num_text_tokens**2
    return linear + attention


def backward_flops(
    config: ModelConfig, num_tokens: int, num_text_tokens: int, num_image_tokens: int = 0, num_times: int = 1
) -> int:
    """Of one sample, every parameter trained and nothing recomputed; see `forward_flops`."""
    each = linear_flops(config)
    unasked = each.first_token * num_tokens + each.first_text * num_text_tokens + each.first_time * num_times
    return 2 * forward_flops(config, num_tokens, num_text_tokens, num_image_tokens, num_times) - unasked


def step_flops(
    config: ModelConfig, num_tokens: int, num_text_tokens: int, num_image_tokens: int = 0, num_times: int = 1
) -> int:
    """Forward and backward of one sample, without recomputation; see `forward_flops`."""
    sizes = num_tokens, num_text_tokens, num_image_tokens, num_times
    return forward_flops(config, *sizes) + backward_flops(config, *sizes)


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
