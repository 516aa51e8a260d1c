"""How much memory a rank of a training run needs, from its config alone: model states by ZeRO stage, activations by
checkpointing mode. Pure: nothing is allocated, no device is asked.

Activations of a block that backward finds in memory, in bytes. b is 4 in fp32 and 2 in bf16; D the width, m the MLP's,
N the heads; a row of text or image enters cross-attention only. Each line is a tensor that autograd keeps:

                                    a token                                       a row of text (and of images)
    none        norms 1, 3: input, output, scale, all float32      24 D
                norm 2: input                                       4 D
                queries and keys before their norm                3 b D             b D
                queries, keys, values as attention takes them     4 b D           2 b D
                what attention gives, and the same in rows        4 b D           (2 b D of a single document)
                inputs of to_q (twice) and of the MLP             3 b D
                MLP, before and after GELU                        2 b m
                gates, float32, and sub-layers' outputs       8 D + 2 b D
                statistics of norms and softmax               36 + 8 N            4
                = 100 D + 8 m + … in fp32, 68 D + 4 m + … in bf16
    operations  input, 6 outputs of matrix products on D,
                the MLP's output, 2 of attention                 10 b D           2 b D
                softmax                                              8 N
    block       input                                               b D

SDPA and flash kernels keep that (never scores); masked SDPA on other backends and compiled blocks differ. The code the
table describes is Block.forward; a test holds it to within 5% of what autograd really keeps.

Of clips that a sequence group of g ranks shares, a rank keeps its share of the tokens; around self-attention it has 1/g
of the heads for all T tokens of these clips, which come to as many numbers as T/g tokens:

    none        queries, keys, values; what attention gives       4 b D for T/g tokens, the latter not for its share;
                                                                   the former also for its share, beside whole clips
    operations  the same, and the latter sent back                 4 b D for T/g tokens, beside those of its share
    block       nothing more
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.optim import EmaConfig, EmaProfile
from sora_train.config.parallel import Checkpointing, ParallelConfig, Precision, group_size
from sora_train.config.root import ConfigError, TrainConfig

GIB = 2**30
# For the largest pack of a run: so many tokens to a caption of the greatest length.
TOKENS_PER_CAPTION = 1024
# DeepSpeed's defaults: elements of the buffer in which gradients are reduced, and of gathered parameters under ZeRO-3.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class PackSize:
    """What one rank holds in one micro-step."""

    tokens: int
    text_rows: int
    samples: int
    image_rows: int = 0
    share: int = 0  # those of the tokens that are of clips shared with neighbours
    shared_tokens: int = 0  # of these clips, on all ranks of the group
    group_size: int = 1

    @property
    def traded(self) -> float:
        """The shared clips' tokens in this rank's self-attention, were they with all heads."""
        return self.shared_tokens / self.group_size


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a rank needs at its peak, the end of the forward pass of its largest pack."""

    parameters: int  # as the model computes with them; under ZeRO-3 a partition, and what is gathered at a time
    gradients: int
    optimizer: int  # fp32 copies of the weights, and Adam's two states
    ema: int
    buffers: int  # in which DeepSpeed reduces gradients, and queries, keys and values travel
    activations: int
    working: int  # of the block that is computed again while the rest is kept; 0 where none is

    @property
    def total(self) -> int:
        """Of all; what the frozen encoders and the allocator take comes on top."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def line(self) -> str:
        """For people."""
        parts = ", ".join(
            f"{field.name} {gib(getattr(self, field.name))}" for field in fields(self) if getattr(self, field.name)
        )
        return f"memory: about {gib(self.total)} GiB a rank beside the frozen encoders ({parts})"


def gib(num_bytes: float) -> str:
    """In GiB, with as many digits as one reads."""
    return f"{num_bytes / GIB:.3g}"


def estimate(config: TrainConfig, world_size: int, device_gib: float | None = None) -> MemoryEstimate:
    """Of a run on so many ranks, at the largest pack its config allows.

    Raises:
        ConfigError: it is more than `device_gib`, or not even full recomputation fits in activation_memory_gib.
    """
    model, parallel, pack = config.model, config.parallel, largest_pack(config, world_size)
    modes = block_modes(model, parallel, pack)
    held = states(num_parameters(model), parallel, world_size, num_averages(config.ema))
    held["buffers"] += 3 * _element(parallel.precision) * model.width * pack.share  # as they are sent
    needed = MemoryEstimate(
        **held,
        activations=activation_bytes(model, pack, modes, parallel.precision, parallel.offload_activations),
        working=working_bytes(model, pack, modes, parallel.precision),
    )
    if device_gib is not None and needed.total > device_gib * GIB:
        raise ConfigError(
            f"{needed.line}, but the device has {device_gib:g} GiB: lower data.max_tokens_per_pack="
            f"{config.data.max_tokens_per_pack}, raise parallel.zero_stage={parallel.zero_stage} or set "
            "parallel.checkpointing=block"
        )
    return needed


def largest_pack(config: TrainConfig, world_size: int) -> PackSize:
    """Of a training run: data.max_tokens_per_pack, and a caption of the greatest length for each 1,024 of them.

    Where ranks may share clips, all but one token are of shared clips: of level ranks it is that which needs most.
    """
    tokens, model = config.data.max_tokens_per_pack, config.model
    samples = math.ceil(tokens / TOKENS_PER_CAPTION)
    rows = 1 + model.text.max_bytes if model.text.kind is TextKind.bytes else config.text_encoder.max_tokens
    image_rows = samples * (model.image_positions or 257) if model.image_width else 0
    size = group_size(config.parallel.largest_group, world_size, model.heads)
    share = tokens - 1 if size > 1 else 0
    return PackSize(tokens, samples * rows, samples, image_rows, share, size * share, size)


# --- model states


def num_parameters(config: ModelConfig) -> int:
    """Of a VideoDiT, all of which are trained."""
    width, text, image = config.width, config.text, config.image_width
    volume = config.patch_frames * config.patch_height * config.patch_width
    block = 8 * _linear(width, width) + _linear(width, config.mlp_width) + _linear(config.mlp_width, width)
    block += (4 * width if config.qk_norm else 0) + (2 * width if config.cross_attention_norm else 0) + 6 * width
    total = _linear((config.in_channels + config.condition_channels) * volume, width)
    total += _linear(config.frequency_width, width) + _linear(width, width) + _linear(width, 6 * width)
    total += _linear(text.width, width) + _linear(width, width)
    if image:
        block += 2 * _linear(width, width) + (width if config.qk_norm else 0)
        total += (config.image_positions + 2) * image + _linear(image, image) + _linear(image, width) + 2 * width
    if text.kind is TextKind.bytes:
        total += _byte_parameters(text) + _linear(text.width, width)
    return total + config.depth * block + _linear(width, config.out_channels * volume) + 2 * width


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _byte_parameters(text: TextConfig) -> int:
    width = text.width
    block = 4 * _linear(width, width) + _linear(width, 4 * width) + _linear(4 * width, width) + 6 * width
    return (257 + text.max_bytes + 1) * width + text.layers * block + 2 * width


def num_averages(config: EmaConfig) -> int:
    """Moving averages that are kept."""
    return len(config.lengths) if config.profile is EmaProfile.power else 1


def states(parameters: int, parallel: ParallelConfig, world_size: int, averages: int = 1) -> dict[str, int]:
    """Bytes a rank of everything that has the shape of the weights, as our engine configures DeepSpeed.

    Adam with fp32 masters (in fp32 the weights themselves, from ZeRO-1 on a copy; Muon needs one state less of the
    matrices it updates, which is not counted), gradients in the weights' type, moving averages in fp32. Like the
    estimate of DeepSpeed, but for gradients: ZeRO-1 keeps all of them until the step, 2 and 3 a partition; the fp32
    gradients of the partition that is stepped come with the optimizer.
    """
    stage, element = parallel.zero_stage, _element(parallel.precision)
    part = math.ceil(parameters / world_size)
    is_fp32 = parallel.precision is Precision.fp32
    stepped = part if stage >= 1 else parameters
    optimizer = 8 * stepped  # two states
    if not (is_fp32 and stage == 0):
        optimizer += 8 * stepped  # masters, and their gradients while the step is taken
    gathered = min(parameters, MAX_LIVE_PARAMETERS) if stage == 3 else 0
    return {
        "parameters": element * ((part if stage == 3 else parameters) + gathered),
        "gradients": element * (part if stage >= 2 else parameters),
        "optimizer": optimizer,
        "ema": 4 * averages * stepped,
        "buffers": element * REDUCE_BUCKET if stage >= 1 else 0,
    }


# --- activations


def _element(precision: Precision) -> int:
    return 2 if precision.is_bf16 else 4


def block_bytes(config: ModelConfig, pack: PackSize, mode: Checkpointing, precision: Precision) -> int:
    """What is kept of one block; see the table above."""
    width, mlp, b = config.width, config.mlp_width, _element(precision)
    if mode is Checkpointing.block:
        return b * width * pack.tokens
    has_images = config.image_width > 0
    softmax = 4 * config.heads * (3 if has_images else 2)
    if mode is Checkpointing.operations:
        # Matrix products that widen are not kept.
        hidden = (mlp if mlp <= width else 0) + (width if width <= mlp else 0)
        outputs = 9 + has_images
        kept = pack.tokens * (b * (outputs * width + hidden) + softmax) + _rows(pack) * 2 * b * width
        return kept + math.ceil(pack.traded * 4 * b * width + (pack.traded - pack.share) * 4 * config.heads)
    if mode is not Checkpointing.none:
        raise ValueError(f"{mode} is not the mode of a block")
    token, statistics = 32 + b * (13 + has_images), 16
    if pack.samples == 1:  # what attention gives is one piece, and lies as rows do
        token -= b * (2 - has_images)
    row, row_statistics, weights = 2 * b, 0, 0
    if config.cross_attention_norm:
        token, statistics = token + 4, statistics + 8
        weights = 8 * width if precision.is_bf16 else 0  # float32 copies of the norm's
    if config.qk_norm:
        token, statistics = token + 3 * b, statistics + 12
        row, row_statistics = row + b, 4
    kept = pack.tokens * (token * width + 2 * b * mlp + statistics + softmax)
    # Tokens of whole clips and of the share lie in one tensor: attention to the former keeps the latter.
    freed = 0 if pack.tokens > pack.share else pack.share
    kept += math.ceil(
        (pack.traded - freed) * 3 * b * width + (pack.traded - pack.share) * (b * width + 4 * config.heads)
    )
    return kept + _rows(pack) * (row * width + row_statistics) + weights


def _rows(pack: PackSize) -> int:
    return pack.text_rows + pack.image_rows


def edge_bytes(config: ModelConfig, pack: PackSize, precision: Precision, is_recomputed: bool) -> int:
    """What is kept outside the blocks: patches in, the last norm and the prediction, embeddings of t, text and images.

    Args:
        config: the model.
        pack: what it is given.
        precision: of its weights.
        is_recomputed: whether any block runs again, for which the modulation is kept.
    """
    width, text, image, b = config.width, config.text, config.image_width, _element(precision)
    volume = config.patch_frames * config.patch_height * config.patch_width
    token = b * (config.in_channels + config.condition_channels) * volume + 4 * config.out_channels * volume
    # Norm, scale and input of the last layer; its statistics, the token's number of its sample, its rotation.
    token += (12 + b) * width + 16 + 4 * width // config.heads
    sample = 4 * (config.frequency_width + (10 if is_recomputed else 4) * width)
    row = b * (text.width + 3 * width)
    total = pack.tokens * token
    if precision.is_bf16:
        total += 4 * 7 * width**2  # float32 copies of the time embedding's weights
    if text.kind is TextKind.bytes:
        kept = 18 if pack.samples == 1 else 19  # a layer, of its width
        row += 16 + text.layers * (kept * b * text.width + 4 * b + 8 + 4 * text.heads) + text.width * b + 2 * b
        sample += 4 * text.width
        if precision.is_bf16:
            total += 4 * text.width * width
    if image:
        # Between two norms with float32 input and statistics: what enters and leaves two layers, and GELU.
        total += pack.image_rows * ((4 + 3 * b) * image + (4 + b) * width + 16)
    return total + pack.samples * sample + pack.text_rows * row


def activation_bytes(
    config: ModelConfig,
    pack: PackSize,
    modes: Sequence[Checkpointing],
    precision: Precision,
    is_offloaded: bool = False,
) -> int:
    """What a rank keeps between the forward and the backward pass of a pack.

    With offloading, what checkpointing keeps of a block is on the device while the block runs and the next fetches.
    """
    total = edge_bytes(config, pack, precision, any(mode is not Checkpointing.none for mode in modes))
    blocks = [(mode, block_bytes(config, pack, mode, precision)) for mode in modes]
    if not is_offloaded:
        return total + sum(kept for _, kept in blocks)
    stays = sum(kept for mode, kept in blocks if mode is Checkpointing.none)
    return total + stays + sum(sorted(kept for mode, kept in blocks if mode is not Checkpointing.none)[-2:])


def working_bytes(
    config: ModelConfig, pack: PackSize, modes: Sequence[Checkpointing], precision: Precision
) -> int:
    """What a block takes on top while it is computed again for its backward pass; 0 where none is."""
    whole = block_bytes(config, pack, Checkpointing.none, precision)
    again = [mode for mode in modes if mode is not Checkpointing.none]
    return max((whole - block_bytes(config, pack, mode, precision) for mode in again), default=0)


# --- which blocks compute what again


def block_modes(config: ModelConfig, parallel: ParallelConfig, pack: PackSize) -> tuple[Checkpointing, ...]:
    """The mode of each block, first to last: the configured one, or with a budget, the cheapest mix that fits.

    Blocks that compute less again come last: their memory is freed first in the backward pass, before that of a block
    computed again is needed.

    Raises:
        ConfigError: activations do not fit in the budget even when every block is computed again.
    """
    if parallel.checkpointing is not Checkpointing.budget:
        return (parallel.checkpointing,) * config.depth
    budget = parallel.activation_memory_gib * GIB
    modes_of_a_block = (Checkpointing.none, Checkpointing.operations, Checkpointing.block)
    cost: dict[Checkpointing, int] = {mode: recomputed_flops(config, pack, mode) for mode in modes_of_a_block}

    def needed(modes: tuple[Checkpointing, ...]) -> int:
        kept = activation_bytes(config, pack, modes, parallel.precision, parallel.offload_activations)
        return kept + working_bytes(config, pack, modes, parallel.precision)

    mixes: list[tuple[Checkpointing, ...]] = [
        (Checkpointing.block,) * whole
        + (Checkpointing.operations,) * some
        + (Checkpointing.none,) * (config.depth - whole - some)
        for whole in range(config.depth + 1)
        for some in range(config.depth + 1 - whole)
    ]
    fitting = [modes for modes in mixes if needed(modes) <= budget]
    if not fitting:
        least = min(needed(modes) for modes in mixes)
        raise ConfigError(
            f"parallel.activation_memory_gib={parallel.activation_memory_gib:g} does not hold a pack of {pack.tokens} "
            f"tokens, which needs {gib(least)} with every block recomputed: give it that, or lower "
            "data.max_tokens_per_pack"
        )
    return min(fitting, key=lambda modes: sum(cost[mode] for mode in modes))


def recomputed_flops(config: ModelConfig, pack: PackSize, mode: Checkpointing) -> int:
    """FLOPs of matrix products that a block's backward pass does again, documents being of equal length."""
    if mode is Checkpointing.none:
        return 0
    wide = 2 * config.width * config.mlp_width * pack.tokens
    if mode is Checkpointing.operations:
        return wide
    square = 2 * config.width**2
    attention = 4 * config.width * pack.tokens * (pack.tokens + _rows(pack)) // pack.samples
    return 6 * square * pack.tokens + 2 * square * _rows(pack) + 2 * wide + attention
