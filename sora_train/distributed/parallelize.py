"""Applies to a model, from outside, all that depends on the machine: the attention kernel, the ranks that share its
work, compilation, recomputation.

The model knows nothing of ranks or devices; the order here is the order of application.
"""

import logging
from collections import Counter

import torch

from sora_train.config.limits import check_parallel
from sora_train.config.parallel import Checkpointing, ParallelConfig, Precision, group_size
from sora_train.config.root import ConfigError, TrainConfig
from sora_train.cost.memory import GIB, PackSize, block_modes, estimate
from sora_train.distributed.activations import BlockRunner
from sora_train.distributed.compilation import compile_blocks
from sora_train.distributed.float8 import apply_float8
from sora_train.distributed.offload import Offload
from sora_train.distributed.sequence_parallel import SequenceGroups, Ulysses
from sora_train.distributed.topology import World
from sora_train.models.attention import Attention, apply_core
from sora_train.models.attention_choice import hidden_kernel
from sora_train.models.video_dit import VideoDiT

log = logging.getLogger(__name__)


def parallelize(
    model: VideoDiT,
    config: ParallelConfig,
    world: World,
    groups: SequenceGroups,
    pack: PackSize | None = None,
    *,
    is_quiet: bool = False,
) -> None:
    """1. every `Attention.core` becomes the configured kernel, 2. which goes over ranks where packs share clips; and of
    a model that is trained, 3. blocks are compiled, 4. they compute activations again in the backward pass, or keep
    them on the host, as configured.

    One line each says what runs and why, unless `is_quiet`.

    Args:
        model: on any device.
        config: what is wanted.
        world: this rank and its device.
        groups: of ranks that may share clips.
        pack: the largest that the model is trained on; None: it is not trained.
        is_quiet: say nothing.

    Raises:
        ConfigError: a kernel that cannot run here, compiled blocks under ZeRO-2 or 3 on several ranks,
            activations that do not fit in their budget.
    """
    check_parallel(config)
    reason = apply_core(model, config.attention, world.device, compute_dtype(config))
    hidden = hidden_kernel(next(module.core for module in model.modules() if isinstance(module, Attention)))
    is_heard = world.is_main and not is_quiet
    if is_heard:
        log.info("attention: %s", reason)
    if groups.largest > 1:
        for module in model.modules():
            if isinstance(module, Attention):
                module.core = Ulysses(module.core, groups)
    if pack is None:
        return
    reduces_as_they_come = config.zero_stage >= 2 and world.world_size > 1
    if config.compile and reduces_as_they_come:
        # They reduce gradients, and fetch parameters, in the order in which a rank comes to them; a pack with a single
        # row runs as it is, in another order than the compiled one on the next rank.
        raise ConfigError(
            f"parallel.compile=true gives wrong gradients with parallel.zero_stage={config.zero_stage} on "
            f"{world.world_size} ranks: use parallel.zero_stage=0 or 1, or parallel.compile=false"
        )
    if config.precision is Precision.fp8:
        apply_float8(model, world.device)
        if is_heard and not config.compile:
            more = " and parallel.zero_stage=1" if reduces_as_they_come else ""
            log.warning("parallel.precision=fp8 is slower than bf16 unless compiled: set parallel.compile=true%s", more)
    compiled = compile_blocks(model.blocks, world.device, backend="inductor") if config.compile else None
    modes = block_modes(model.config, config, pack)
    if set(modes) != {Checkpointing.none}:
        offload = Offload(world.device) if config.offload_activations else None
        model.run_block = BlockRunner(dict(zip(model.blocks, modes, strict=True)), offload, model.run_block)
        if is_heard:
            counts = ", ".join(f"{mode.value} of {count} blocks" for mode, count in Counter(modes).items())
            log.info("checkpointing: %s%s", counts, ", kept on the host" if offload else "")
            if hidden and Checkpointing.operations in modes:
                log.warning(
                    "parallel.checkpointing=operations cannot keep what %s gives and computes it again: set "
                    "parallel.attention to flash3, flash2 or varlen to compare",
                    hidden,
                )
    if compiled is not None:
        model.run_block = compiled.or_as_it_is(model.run_block)


def build_groups(config: TrainConfig, world: World) -> SequenceGroups:
    """The groups that ranks may share clips in, and one line of how large they are. Every rank must call it."""
    asked, heads = config.parallel.largest_group, config.model.heads
    size = group_size(asked, world.world_size, heads)
    if world.is_main and world.world_size > 1:
        log.info("%s", groups_line(asked, world.world_size, heads))
    return SequenceGroups.build(world, size)


def groups_line(asked: int, world_size: int, heads: int) -> str:
    """What bounds the groups, for people."""
    size, of_world = group_size(asked, world_size, heads), group_size(asked, world_size, asked)
    line = f"sequence groups: up to {size} ranks" if size > 1 else "sequence groups: none"
    if size < of_world:
        line += f" (parallel.largest_group={asked}, but model.heads={heads} divide by {size} only)"
    elif size < asked:
        line += f", there being {world_size} ranks"
    return line


def check_memory(config: TrainConfig, world: World) -> None:
    """Says in one line what the run needs, before a model is built.

    Raises:
        ConfigError: more than this rank's CUDA device has. Compiled blocks may need less than is counted: no refusal.
    """
    device_gib = None
    if world.device.type == "cuda" and not config.parallel.compile:
        device_gib = torch.cuda.get_device_properties(world.device).total_memory / GIB
    needed = estimate(config, world.world_size, device_gib)
    if world.is_main:
        log.info("%s", needed.line)


def compute_dtype(config: ParallelConfig) -> torch.dtype:
    """What the weights of a model are computed with."""
    return torch.bfloat16 if config.precision.is_bf16 else torch.float32
