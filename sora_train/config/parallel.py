"""Settings of the engine: how parameters are partitioned, in which precision, on which attention kernel."""

from dataclasses import dataclass
from enum import Enum


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class AttentionKind(Enum):
    auto = "auto"  # the fastest that is installed and right for the device
    sdpa = "sdpa"  # torch scaled_dot_product_attention, one call a document; any device
    masked = "masked"  # one masked call over the whole pack: quadratic, the reference
    varlen = "varlen"  # torch.nn.attention.varlen, CUDA
    flash = "flash"  # the flash-attn package, CUDA


@dataclass(frozen=True)
class ParallelConfig:
    # DeepSpeed ZeRO: 0 replicates, 1 partitions optimizer states, 2 also gradients, 3 also parameters.
    zero_stage: int = 1
    precision: Precision = Precision.bf16
    attention: AttentionKind = AttentionKind.auto
    # Recompute each block's activations in the backward pass.
    checkpoint_activations: bool = False
