"""Run under torchrun by test_sequence_groups.py: clips shared in groups that change from micro-step to micro-step,
against one process that holds all of a step's clips in one pack. Many cases in one world, each a line of JSON.
"""

import functools
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from allocations import Allocations
from group_steps import (
    BYTES,
    IMAGES,
    ROWS,
    SCHEDULES,
    Group,
    Inputs,
    all_clips,
    features,
    lay,
    mine,
    pack_of,
    random_clip,
    random_step,
)

from sora_train.config.model import ModelConfig
from sora_train.config.optim import OptimConfig
from sora_train.config.parallel import AttentionKind, Checkpointing, ParallelConfig, Precision
from sora_train.cost.memory import PackSize, activation_bytes
from sora_train.distributed import runtime
from sora_train.distributed.activations import BlockRunner
from sora_train.distributed.collectives import gather_facts, sum_over_ranks
from sora_train.distributed.compilation import compile_blocks
from sora_train.distributed.engine import build_engine
from sora_train.distributed.parallelize import parallelize
from sora_train.distributed.sequence_parallel import SequenceGroups, Ulysses
from sora_train.distributed.topology import World
from sora_train.models.attention import Attention
from sora_train.models.attention_cores import sdpa_per_document
from sora_train.models.pack_layout import PackLayout, SharedClips
from sora_train.models.video_dit import VideoDiT, call_block
from sora_train.training.optim import build_optimizer

OPTIM = OptimConfig(clip_norm=0.0)


def model_of(config: ModelConfig) -> VideoDiT:
    torch.manual_seed(7)
    model = VideoDiT(config)
    for name, parameter in model.named_parameters():  # nothing at zero, so that every path counts
        if parameter.ndim == 1 and name.endswith("weight"):
            nn.init.normal_(parameter, 1.0, 0.1)
        else:
            nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model


def loss_of(model: Callable[..., Tensor], inputs: Inputs, planned: float) -> Tensor:
    error_L = (model(*inputs.arguments) - inputs.target_LQ).square().mean(1)
    return (inputs.weight_L * error_L).sum() / planned


def planned_of(step: Sequence[Sequence[Group]]) -> int:
    return sum(clip.num_tokens for clip in all_clips(step))


@dataclass(frozen=True)
class Step:
    """The groups of each micro-step; loss and gradients with all clips in one pack of one process."""

    micro_steps: list[list[Group]]
    loss: float
    gradients: dict[str, Tensor]


@functools.cache
def steps_of(config: ModelConfig, has_t_of_tokens: bool, world_size: int, dtype: torch.dtype) -> list[Step]:
    draw, steps = random.Random(f"{config} {world_size}"), []
    for schedule in SCHEDULES[world_size] * (2 if dtype is torch.float64 else 1):
        micro_steps = random_step(draw, config, schedule)
        model = model_of(config).to(dtype)
        loss = loss_of(model, lay(all_clips(micro_steps), has_t_of_tokens), planned_of(micro_steps))
        loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        steps.append(Step(micro_steps, loss.item(), gradients))
    return steps


def off(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Relative errors of the gradient: of all parameters together, and of the parameter where it is largest."""
    assert got.keys() == expected.keys()
    wrong = {name: float((got[name] - value).norm()) for name, value in expected.items()}
    right = {name: float(value.norm()) for name, value in expected.items()}
    return math.hypot(*wrong.values()) / math.hypot(*right.values()), max(wrong[name] / right[name] for name in wrong)


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Also what the model computes in float32 whatever its weights are: then nothing hides in rounding."""
    to_float = Tensor.float
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        Tensor.float = to_float  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Variant:
    """How a model is trained."""

    config: ModelConfig
    attention: AttentionKind = AttentionKind.sdpa
    checkpointing: Checkpointing = Checkpointing.none
    is_offloaded: bool = False
    is_compiled: bool = False
    has_t_of_tokens: bool = False


VARIANTS = {
    "bytes, masked, blocks again": Variant(BYTES, AttentionKind.masked, Checkpointing.block),
    "rows": Variant(ROWS),
    "bytes, operations kept": Variant(BYTES, checkpointing=Checkpointing.operations),
    "images, clean frames": Variant(IMAGES),
    "bytes": Variant(BYTES),
    "rows, operations kept on the host": Variant(ROWS, AttentionKind.masked, Checkpointing.operations, True),
    "t of tokens": Variant(BYTES, checkpointing=Checkpointing.block, has_t_of_tokens=True),
    "compiled, operations kept": Variant(BYTES, checkpointing=Checkpointing.operations, is_compiled=True),
}


def plain_variants(world_size: int) -> list[str]:
    """Four processes take their time; what is applied from outside is alike in any world."""
    names = [name for name in VARIANTS if not VARIANTS[name].is_compiled]
    return names if world_size == 2 else names[:4]


def engine_cases(world_size: int) -> list[tuple[int, str]]:
    """Stages and variants. Compiled blocks in two processes, where `parallelize` allows them."""
    cases = list(itertools.product(range(4), plain_variants(world_size)))
    if world_size == 2:
        cases += itertools.product(range(2), [name for name in VARIANTS if VARIANTS[name].is_compiled])
    return cases


def equals_one_process(world: World, groups: SequenceGroups, stage: int, name: str) -> dict[str, Any]:
    """Under DeepSpeed: loss and gradients of every step."""
    from deepspeed.utils import safe_get_full_grad

    variant = VARIANTS[name]
    model = model_of(variant.config)
    parallel = ParallelConfig(
        zero_stage=stage,
        precision=Precision.fp32,
        attention=variant.attention,
        checkpointing=variant.checkpointing,
        offload_activations=variant.is_offloaded,
    )
    parallelize(model, parallel, world, groups, PackSize(100, 10, 3), is_quiet=True)
    if isinstance(model.run_block, BlockRunner) and model.run_block.offload:
        model.run_block.offload.min_bytes = 0
    if variant.is_compiled:
        compile_blocks(model.blocks, world.device, "aot_eager")
    engine = build_engine(model, build_optimizer(model, OPTIM, world.device), parallel, OPTIM)
    losses, errors = [], []
    steps = steps_of(variant.config, variant.has_t_of_tokens, world.world_size, torch.float32)
    for step in steps:
        total = 0.0
        for micro_step in step.micro_steps:
            group, is_last = mine(micro_step, world.global_rank), micro_step is step.micro_steps[-1]
            inputs = pack_of(group, world.global_rank, variant.config, variant.has_t_of_tokens)
            share = loss_of(engine, inputs, planned_of(step.micro_steps))
            total += share.item()
            # As `accumulate` does it, but for a look at the gradients.
            engine.set_gradient_accumulation_boundary(is_last)
            engine.backward(share * world.world_size, scale_wrt_gas=False)
            if is_last:
                got = {key: safe_get_full_grad(value).clone() for key, value in engine.module.named_parameters()}
                errors.append(off(got, step.gradients))
            engine.step()
        losses.append(abs(sum(gather_facts(total)) - step.loss) / step.loss)
    return report(losses, errors, steps)


def train_bare(
    world: World, core: Callable[..., Tensor], variant: Variant, mutate: str = ""
) -> dict[str, Any]:
    """Without DeepSpeed, in float64: errors of loss and gradients over all steps."""
    model = model_of(variant.config).double()
    for module in model.modules():
        if isinstance(module, Attention):
            module.core = core
    if variant.checkpointing is not Checkpointing.none:
        model.run_block = BlockRunner(dict.fromkeys(model.blocks, variant.checkpointing), None, call_block)
    losses, errors = [], []
    steps = steps_of(variant.config, variant.has_t_of_tokens, world.world_size, torch.float64)
    steps = steps[: len(SCHEDULES[world.world_size])] if mutate else steps
    for step in steps:
        total, planned = torch.zeros(()), planned_of(step.micro_steps)
        model.zero_grad()
        for micro_step in step.micro_steps:
            group = mine(micro_step, world.global_rank)
            inputs = pack_of(
                group, world.global_rank, variant.config, variant.has_t_of_tokens, offset=mutate == "wrong split"
            )
            if mutate == "filler counts":
                inputs = replace(inputs, weight_L=inputs.weight_L.clamp(min=0.5))
            if mutate == "mean of means":
                planned = inputs.target_LQ.shape[0] * world.world_size * len(step.micro_steps)
            share = loss_of(model, inputs, planned)
            if mutate == "shared clips count once a rank":
                share = share / len(group.shares)
            total += share.detach()
            share.backward()
        got = {name: sum_over_ranks(value.grad) for name, value in model.named_parameters() if value.grad is not None}
        losses.append(float(abs(sum_over_ranks(total) - step.loss)) / step.loss)
        errors.append(off(got, step.gradients))
    return report(losses, errors, steps)


def report(losses: list[float], errors: list[tuple[float, float]], steps: list[Step]) -> dict[str, Any]:
    gradients, parameters = zip(*errors, strict=True)
    largest = {"loss": max(losses), "gradient": max(gradients), "parameter": max(parameters)}
    return {**largest, "steps": len(steps), **features([step.micro_steps for step in steps])}


def is_exact(world: World, groups: SequenceGroups) -> Iterator[dict[str, Any]]:
    """Without rounding to hide in."""
    for name in plain_variants(world.world_size):
        with all_in_float64():
            yield {"variant": name, **train_bare(world, Ulysses(sdpa_per_document, groups), VARIANTS[name])}


# --- what must be noticed


class Mutant(Ulysses):
    """Wrong in one way."""

    def __init__(self, groups: SequenceGroups, how: str) -> None:
        super().__init__(sdpa_per_document, groups)
        self.how = how

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, is_cross: bool) -> Tensor:
        if self.how == "missing gather" and layout.shared is not None:
            layout = replace(layout, shared=None)
        return super().__call__(query, key, value, layout, is_cross)

    def _shared(self, query: Tensor, key: Tensor, value: Tensor, shared: SharedClips) -> Tensor:
        size = len(shared.shares)
        if self.how == "clips see each other":
            whole = PackLayout.build([sum(shared.shares)], [1])
            return super()._shared(query, key, value, replace(shared, of_all=whole))
        if self.how == "heads in another order":
            out = super()._shared(query, key, value, shared)
            return out.unflatten(1, (size, -1)).transpose(1, 2).flatten(1, 2)
        if self.how == "keys of other heads":
            return super()._shared(query, key.roll(1, dims=1), value, shared)
        if self.how == "gradient of one rank's heads":
            out = super()._shared(query, key, value, shared)
            own = torch.zeros_like(out)
            heads = out.shape[1] // size
            own[:, shared.group_rank * heads : (shared.group_rank + 1) * heads] = 1
            return out * own + (out * (1 - own)).detach()
        if self.how == "gradient counted twice":
            out = super()._shared(query, key, value, shared)
            return 2 * out - out.detach()
        return super()._shared(query, key, value, shared)


MUTANTS = (
    "missing gather",
    "wrong split",
    "mean of means",
    "clips see each other",
    "heads in another order",
    "keys of other heads",
    "gradient of one rank's heads",
    "gradient counted twice",
    "filler counts",
    "shared clips count once a rank",
)


def notices(world: World, groups: SequenceGroups) -> Iterator[dict[str, Any]]:
    for how in MUTANTS if world.world_size == 2 else MUTANTS[:3]:
        with all_in_float64():
            yield {"mutant": how, **train_bare(world, Mutant(groups, how), VARIANTS["bytes"], how)}


# --- what is kept, and how often ranks exchange


class CountExchanges(TorchDispatchMode):
    """Forward and backward."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.sora_train.exchange.default
        return func(*args, **(kwargs or {}))


def keeps(world: World, groups: SequenceGroups, mode: Checkpointing, has_whole: bool) -> dict[str, Any]:
    """Bytes that a pack leaves for its backward pass, against the estimate; and how often a block exchanges."""
    config = replace(ROWS, width=96, mlp_width=400)
    model = model_of(config)
    for module in model.modules():
        if isinstance(module, Attention):
            module.core = Ulysses(sdpa_per_document, groups)
    model.run_block = BlockRunner(dict.fromkeys(model.blocks, mode), None, call_block)
    draw, size = random.Random(5), world.world_size
    whole = [[random_clip(draw, config, 100 + 30 * rank)] if has_whole else [] for rank in range(size)]
    shares = [150, 350, 60, 240][:size]
    group = Group(0, whole, [random_clip(draw, config, 90), random_clip(draw, config, sum(shares) - 90)], shares)
    inputs = pack_of(group, world.global_rank, config)
    layout = next(each for each in inputs.arguments if isinstance(each, PackLayout))
    pack = PackSize(
        sum(layout.lengths),
        sum(layout.text_lengths),
        layout.num_samples,
        share=shares[world.global_rank],
        shared_tokens=sum(shares),
        group_size=size,
    )
    with CountExchanges() as sent:
        with Allocations(list(model.parameters())) as allocations:
            out = model(*inputs.arguments)
        kept, forward = allocations.alive, sent.calls
        out.square().sum().backward()
    expected = activation_bytes(config, pack, (mode,) * config.depth, Precision.fp32)
    return {
        "mode": mode.value,
        "whole": has_whole,
        "ratio": gather_facts(expected / kept),
        "forward": forward / config.depth,
        "backward": (sent.calls - forward) / config.depth,
    }


def main(out: str) -> None:
    world = runtime.start(threads=1)
    groups = SequenceGroups.build(world, world.world_size)
    results: dict[str, list[dict[str, Any]]] = {"engine": [], "exact": [], "mutants": [], "memory": []}
    for stage, name in engine_cases(world.world_size):
        result = equals_one_process(world, groups, stage, name)
        results["engine"].append({"stage": stage, "variant": name, **result})
    results["exact"] += is_exact(world, groups)
    results["mutants"] += notices(world, groups)
    for mode, has_whole in itertools.product(
        (Checkpointing.none, Checkpointing.operations, Checkpointing.block), (False, True)
    ):
        results["memory"].append(keeps(world, groups, mode, has_whole))
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    runtime.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
