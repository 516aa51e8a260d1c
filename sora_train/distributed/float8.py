"""float8 in the large matrix products of the blocks, by torchao, while everything between them stays bf16.

Tokens and weights are scaled row by row, so that what a clip gives does not depend on the clips beside it in the pack
(one scale for the whole pack would mix them: a bright clip would cost its neighbours precision), nor on how ranks share
it. The gradient of a weight is a sum over all tokens and stays a bf16 product, which also takes packs of any length:
float8 products add over multiples of 16. So two of the three products of a layer are float8.

Parameters keep their names, types and objects: checkpoints, ZeRO's partitions and the optimizer see nothing of it.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import nn

from sora_train.config.root import ConfigError
from sora_train.models.video_dit import VideoDiT

# Of a block: the layers that every token of the pack passes. What modulates, and what only the text's rows or the
# image's pass, is small, and stays as it is.
LAYERS = frozenset({
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out", "attn2.to_q", "attn2.to_out", "ffn.up", "ffn.down",
})  # fmt: skip
MULTIPLE = 16  # of the rows and columns of a float8 product
MIN_CAPABILITY = (8, 9)


def apply_float8(model: VideoDiT, device: torch.device, is_emulated: bool = False) -> None:
    """Replaces those layers, before an engine is built.

    Args:
        model: on any device.
        device: where it will compute.
        is_emulated: round as float8 does, and multiply in bf16: on any device, for tests.

    Raises:
        ConfigError: no such device, no torchao, widths that float8 products do not take.
    """
    width, mlp_width = model.config.width, model.config.mlp_width
    for name, size in (("width", width), ("mlp_width", mlp_width)):
        if size % MULTIPLE:
            raise ConfigError(
                f"parallel.precision=fp8 multiplies in blocks of {MULTIPLE}, model.{name}={size} is no multiple of it: "
                "change it or use parallel.precision=bf16"
            )
    if not is_emulated and (device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY):
        raise ConfigError(
            f"parallel.precision=fp8 needs a CUDA device of compute capability {'.'.join(map(str, MIN_CAPABILITY))} "
            f"or more, this run is on {device.type}: use parallel.precision=bf16"
        )
    if find_spec("torchao") is None:
        raise ConfigError(
            "parallel.precision=fp8 needs torchao: pip install 'sora_train[fp8]' or use parallel.precision=bf16"
        )
    # Imported when asked for: it takes seconds.
    from torchao.float8 import Float8LinearConfig, Float8LinearRecipeName, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(Float8LinearRecipeName.ROWWISE_WITH_GW_HP)
    convert_to_float8_training(
        model.blocks, module_filter_fn=_is_large, config=replace(config, emulate=is_emulated)
    )


def _is_large(module: nn.Module, name: str) -> bool:
    """By name in `blocks`: the number of the block, then the layer."""
    return name.partition(".")[2] in LAYERS
