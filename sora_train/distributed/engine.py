"""DeepSpeed, as training sees it: build an engine, accumulate a loss, take a step.

The loss that `accumulate` gets is this rank's share of a sum over the whole step (DESIGN: a sum over tokens divided
by the global planned count). DeepSpeed averages gradients over ranks, so the share is multiplied by the world size;
the gradient is then that of one big process, whatever the ranks, packs and micro-steps.
"""

from typing import Any

import torch
from torch import nn

from sora_train.config.optim import OptimConfig
from sora_train.config.parallel import ParallelConfig
from sora_train.distributed.partitions import locate_matrices


def deepspeed_config(parallel: ParallelConfig, optim: OptimConfig) -> dict[str, Any]:
    """Our typed settings as the dict DeepSpeed takes."""
    return {
        # Required by DeepSpeed; packs decide what a micro-step holds and set the boundaries themselves.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": optim.clip_norm,
        "zero_optimization": {"stage": parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": parallel.precision.is_bf16},
    }


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, parallel: ParallelConfig, optim: OptimConfig
) -> Any:
    """Wraps the model for ZeRO over the whole world.

    The optimizer must come with a learning rate of 0: at ZeRO-0 with bf16 DeepSpeed takes a step on zero gradients to
    allocate the states, which would decay the weights. `set_learning_rate` gives the real one before each step.
    """
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # its notes on every start drown ours
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(parallel, optim))
    locate_matrices(engine)
    return engine


def accumulate(engine: Any, loss: torch.Tensor, is_last: bool) -> None:
    """Backward of one micro-step; with `is_last`, gradients are reduced and clipped and the weights updated."""
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss * engine.dp_world_size, scale_wrt_gas=False)
    engine.step()


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """For the step that comes."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def gradient_norm(engine: Any) -> dict[str, float]:
    """{"gradient_norm": …} of the last step before clipping; nothing where DeepSpeed keeps none (fp32 at ZeRO-0)."""
    norm: torch.Tensor | float | None = engine.get_global_grad_norm()
    return {} if norm is None else {"gradient_norm": float(norm)}
