"""Applies to a model, from outside, all that depends on the machine: the attention kernel and recomputation.

The model knows nothing of ranks or devices; the order here is the order of application.
"""

import functools
import logging

import torch
from torch.utils.checkpoint import checkpoint

from sora_train.config.parallel import ParallelConfig, Precision
from sora_train.distributed.topology import World
from sora_train.models.attention import apply_core
from sora_train.models.video_dit import VideoDiT

log = logging.getLogger(__name__)


def parallelize(model: VideoDiT, config: ParallelConfig, world: World, *, is_quiet: bool = False) -> None:
    """1. every `Attention.core` becomes the configured kernel; 2. blocks recompute their activations if asked.

    One line says which kernel runs and why, unless `is_quiet`.
    """
    reason = apply_core(model, config.attention, world.device, compute_dtype(config))
    if world.is_main and not is_quiet:
        log.info("attention: %s", reason)
    if config.checkpoint_activations:
        model.run_block = functools.partial(checkpoint, use_reentrant=False)


def compute_dtype(config: ParallelConfig) -> torch.dtype:
    """What the weights of a model are computed with."""
    return torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
