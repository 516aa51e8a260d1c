"""Which parameters decay, which are orthogonalized, and the optimizer over them."""

from typing import Any

import torch
from torch import nn

from sora_train.config.optim import OptimConfig, OptimizerKind
from sora_train.distributed.muon import Muon


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups that are not empty, in one order: with kind=muon the matrices of blocks, then other matrices, then the
    rest.

    What multiplies activations decays: matrices. What is added, scales or is looked up does not: biases and norms (He
    et al. 2019, arXiv:1812.01187, section 3.1), modulation tables, positions and embeddings, of which most rows have
    no gradient in a step and would only shrink. Muon is for hidden matrices, not for what is next to inputs and
    outputs (Jordan et al. 2024; Liu et al. 2025): those outside the blocks embed t, text and images.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    in_blocks, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim != 2 or id(parameter) in looked_up:
            others.append(parameter)
        elif config.kind is OptimizerKind.muon and "blocks" in name.split("."):
            in_blocks.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": in_blocks, "weight_decay": config.weight_decay, "is_muon": True},
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused on CUDA, alone or beside Muon. Its learning rate is 0 until
    `set_learning_rate` gives each step's (see `build_engine`)."""
    groups = parameter_groups(model, config)
    betas = (config.beta1, config.beta2)
    if config.kind is OptimizerKind.muon:
        return Muon(groups, device, betas=betas, eps=config.eps, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=device.type == "cuda")
