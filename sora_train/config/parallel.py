"""Settings of the engine: how parameters are partitioned, in which precision, on which attention kernel, which ranks
share clips, and how activations are kept from the forward to the backward pass."""

from dataclasses import dataclass
from enum import Enum


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    # bf16, with large matrix products of the blocks in float8 (pip install 'sora_train[fp8]'; Ada, Hopper or later).
    # Only training: validation and samples compute in bf16. Without parallel.compile it is slower than bf16.
    fp8 = "fp8"

    @property
    def is_bf16(self) -> bool:
        """Whether weights, and what goes from layer to layer, are bf16."""
        return self is not Precision.fp32


class AttentionKind(Enum):
    auto = "auto"  # the fastest that is installed and right for the device
    sdpa = "sdpa"  # torch scaled_dot_product_attention, one call a document; any device
    masked = "masked"  # one masked call over the whole pack: quadratic, the reference
    varlen = "varlen"  # torch.nn.attention.varlen, CUDA
    flash2 = "flash2"  # the flash-attn package, CUDA
    flash3 = "flash3"  # FlashAttention-3, built from source: Hopper
    flash4 = "flash4"  # the flash-attn-4 package: Hopper, Blackwell
    cudnn = "cudnn"  # SDPA a document on cuDNN's kernels, CUDA; a plan, in about a second, for each new length
    flex = "flex"  # FlexAttention with a block mask, compiled, CUDA


# Ranks of a sequence group.
GROUP_SIZES = (1, 2, 4, 8)


class Checkpointing(Enum):
    """What the backward pass computes again instead of finding it in memory. Bytes are those a block of Wan 2.1 1.3B
    keeps in bf16 for a token and channel (cost/memory.py counts them for any)."""

    none = "none"  # nothing: 91 bytes
    # Keeps what matrix products and attention gave, except the MLP's wide hidden layer, and computes the cheap rest
    # again: 20 bytes for about a tenth more FLOPs, less the longer the clips. Of compiled blocks it keeps what
    # attention gave: fewer bytes, more FLOPs.
    operations = "operations"
    block = "block"  # keeps the input of each block: 2 bytes for a third more FLOPs
    # Of each block the mildest of these with which max_tokens_per_pack fits in activation_memory_gib.
    budget = "budget"


@dataclass(frozen=True)
class ParallelConfig:
    # DeepSpeed ZeRO: 0 replicates, 1 partitions optimizer states, 2 also gradients, 3 also parameters.
    zero_stage: int = 1
    precision: Precision = Precision.bf16
    attention: AttentionKind = AttentionKind.auto
    # So many neighbouring ranks may share a clip that outweighs one of them: 1 (none), 2, 4 or 8. The model's heads
    # are divided among them.
    largest_group: int = 8
    # Whether ranks may be grouped differently in each micro-step of a step, or only from step to step. None: they may,
    # but under ZeRO-3 on CUDA, where parameters are fetched ahead while groups exchange tokens.
    regroup_within_step: bool | None = None
    checkpointing: Checkpointing = Checkpointing.none
    # GiB a rank may fill with activations, for checkpointing=budget.
    activation_memory_gib: float = 0.0
    # Keep activations in the host's memory between the passes, copied while the device computes.
    offload_activations: bool = False
    # torch.compile of the blocks: once for all lengths of packs. Without a compiler, blocks run as they are, and a line
    # says so. On CUDA compiled code sums some gradients in no fixed order: a resumed run is then close, not bitwise.
    # On several ranks with zero_stage 0 and 1 alone.
    compile: bool = False


def group_size(largest_group: int, world_size: int, heads: int) -> int:
    """Ranks of the largest sequence group: at most `largest_group`, no more than there are, and dividing the heads."""
    most = min(largest_group, world_size)
    return max(size for size in GROUP_SIZES if size == 1 or (size <= most and heads % size == 0))


def regroups(config: ParallelConfig, on_cuda: bool) -> bool:
    """Whether sequence groups may change from one micro-step of a step to the next."""
    if config.regroup_within_step is not None:
        return config.regroup_within_step
    return config.zero_stage < 3 or not on_cuda
