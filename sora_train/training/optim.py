"""Which parameters decay, and the optimizer over them."""

import torch
from torch import nn

from sora_train.config.optim import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Matrices decay; biases, norms and modulation tables do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim == 2]
    others = [parameter for parameter in trained if parameter.ndim != 2]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused on CUDA. Its learning rate is 0 until `set_learning_rate` gives each
    step's (see `build_engine`)."""
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type == "cuda",
    )
