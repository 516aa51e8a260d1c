"""Memory from the config alone, against what autograd keeps, what the model has and what DeepSpeed estimates."""

import random
from dataclasses import replace

import pytest
import torch
from allocations import Allocations

from sora_train.config.data import DataConfig
from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.optim import EmaConfig, EmaProfile
from sora_train.config.parallel import Checkpointing, ParallelConfig, Precision
from sora_train.config.root import ConfigError, TrainConfig
from sora_train.cost.memory import (
    GIB,
    PackSize,
    activation_bytes,
    block_modes,
    estimate,
    largest_pack,
    num_parameters,
    states,
    working_bytes,
)
from sora_train.distributed.activations import BlockRunner
from sora_train.models.inputs import PackedConditioning
from sora_train.models.pack_layout import PackLayout
from sora_train.models.video_dit import VideoDiT, call_block

MODES = (Checkpointing.none, Checkpointing.operations, Checkpointing.block)
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def random_case(seed: int) -> tuple[ModelConfig, list[int], list[int], list[int]]:
    """A model, and the tokens, text rows and image rows of each document of a pack."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3, 4])
    width = heads * draw.choice([8, 16, 24, 32])
    kind = draw.choice(list(TextKind))
    text = TextConfig(kind=kind, width=draw.choice([16, 64]), layers=draw.randint(0, 2), heads=2)
    has_images = kind is TextKind.encoder and seed % 4 == 0
    config = ModelConfig(
        width=width,
        depth=draw.randint(1, 4),
        heads=heads,
        mlp_width=draw.choice([width // 2, 2 * width, 4 * width, 6 * width]),
        in_channels=4,
        out_channels=4,
        image_width=24 if has_images else 0,
        condition_channels=4 if has_images else 0,
        frequency_width=32,
        qk_norm=draw.random() < 0.8,
        cross_attention_norm=draw.random() < 0.8,
        text=text,
    )
    samples = draw.randint(1, 5)
    lengths = [draw.choice([1, draw.randint(2, 150), draw.randint(2, 400)]) for _ in range(samples)]
    return config, lengths, [draw.randint(1, 60) for _ in lengths], [draw.randint(1, 20) for _ in lengths] * has_images


def measured(
    config: ModelConfig, lengths: list[int], text: list[int], images: list[int], mode: Checkpointing, dtype: torch.dtype
) -> int:
    model = VideoDiT(config).to(dtype)
    model.run_block = BlockRunner(dict.fromkeys(model.blocks, mode), None, call_block)
    tokens, rows = sum(lengths), sum(text)
    with Allocations(list(model.parameters())) as allocations:
        is_bytes = config.text.kind is TextKind.bytes
        out = model(
            torch.randn(tokens, config.in_channels * 4),
            torch.zeros(tokens, 3, dtype=torch.int64),
            torch.rand(len(lengths)),
            torch.randint(0, 256, (rows,)) if is_bytes else torch.randn(rows, config.text.width),
            PackLayout.build(lengths, text, image_lengths=images),
            PackedConditioning(torch.randn(tokens, 16), torch.randn(sum(images), 24)) if images else None,
        )
    assert out.requires_grad
    return allocations.alive


@pytest.mark.slow
@pytest.mark.parametrize("precision", list(DTYPES))
@pytest.mark.parametrize("mode", MODES)
def test_activations_are_what_autograd_keeps(mode: Checkpointing, precision: Precision) -> None:
    for seed in range(20):
        config, lengths, text, images = random_case(seed)
        pack = PackSize(sum(lengths), sum(text), len(lengths), sum(images))
        modes = (mode,) * config.depth
        got = activation_bytes(config, pack, modes, precision)
        expected = measured(config, lengths, text, images, mode, DTYPES[precision])
        assert got == pytest.approx(expected, rel=0.05), (seed, got / expected, config, pack)


def test_parameters_are_counted_exactly() -> None:
    for seed in range(20):
        config = random_case(seed)[0]
        if seed % 2:
            config = replace(config, image_width=24, image_positions=5)
        with torch.device("meta"):
            model = VideoDiT(config)
        assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("ranks", [1, 8, 512])
@pytest.mark.parametrize("stage", range(4))
def test_model_states_equal_deepspeeds_estimate(stage: int, ranks: int) -> None:
    """Its estimate knows stages 2 and 3 in half precision, and no average. In stage 3 it counts one layer as gathered,
    though by default up to 1e9 parameters are, and 2 bytes less for gradients."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    parameters = 5_000_000_000
    needed = states(parameters, ParallelConfig(zero_stage=stage, precision=Precision.bf16), ranks)
    total = needed["parameters"] + needed["gradients"] + needed["optimizer"]
    share = 1 if stage == 0 else ranks
    assert needed["ema"] == 4 * parameters / share
    two = states(parameters, ParallelConfig(zero_stage=stage, precision=Precision.bf16), ranks, averages=2)
    assert two == {**needed, "ema": 2 * needed["ema"]}
    if stage == 0:
        assert total == 20 * parameters
    elif stage == 1:
        assert total == parameters * 4 + 16 * parameters / ranks
    elif stage == 2:
        _, device = estimate_zero2_model_states_mem_needs(parameters, ranks, cpu_offload=False)
        assert total == pytest.approx(device, rel=1e-6)
    else:
        _, device, _ = estimate_zero3_model_states_mem_needs(parameters, 0, ranks, 1, cpu_offload=False)
        assert total == pytest.approx(device + 2 * 1_000_000_000 + 2 * parameters / ranks, rel=1e-6)


def test_what_a_run_needs_is_said_in_one_line_and_refused_where_it_does_not_fit() -> None:
    config = TrainConfig(data=DataConfig(shards="s", max_tokens_per_pack=4096))
    pack = largest_pack(config, 1)
    assert pack == PackSize(4096, 4 * 257, 4)
    needed = estimate(config, 1)
    modes = (Checkpointing.none,) * config.model.depth
    assert needed.activations == activation_bytes(config.model, pack, modes, Precision.bf16)
    assert needed.working == 0
    assert needed.total == sum(
        (needed.parameters, needed.gradients, needed.optimizer, needed.ema, needed.buffers, needed.activations)
    )
    assert needed.line.startswith(f"memory: about {needed.total / GIB:.3g} GiB a rank")
    assert estimate(replace(config, ema=EmaConfig(profile=EmaProfile.power)), 1).ema == 2 * needed.ema
    assert "activations" in needed.line
    assert "\n" not in needed.line
    assert estimate(config, 1, needed.total / GIB + 0.1) == needed
    with pytest.raises(ConfigError, match=r"lower data.max_tokens_per_pack=4096"):
        estimate(config, 1, needed.total / GIB - 0.1)


def test_ranks_that_share_clips_need_room_for_the_heads_they_trade() -> None:
    """Beside whole clips: queries, keys and values a second time, and the buffer they are sent in."""
    config = TrainConfig(data=DataConfig(shards="s", max_tokens_per_pack=4096))
    heads = config.model.heads
    size = max(size for size in (1, 2, 4, 8) if heads % size == 0)
    shared = {"share": 4095, "shared_tokens": size * 4095, "group_size": size}
    assert largest_pack(config, 64) == PackSize(4096, 4 * 257, 4, **shared)
    alone = replace(config, parallel=ParallelConfig(largest_group=1))
    assert largest_pack(alone, 64) == largest_pack(config, 1)
    more, fewer = estimate(config, 64), estimate(alone, 64)
    a_block = 3 * 2 * config.model.width * 4095
    assert more.activations - fewer.activations == config.model.depth * a_block
    assert more.buffers - fewer.buffers == a_block


def test_offloading_keeps_two_blocks_on_the_device() -> None:
    config, pack = replace(TrainConfig().model, depth=10), PackSize(4096, 100, 2)
    modes = (Checkpointing.none,) * 2 + (Checkpointing.block,) * 8

    def needed(modes: tuple[Checkpointing, ...], is_offloaded: bool) -> int:
        return activation_bytes(config, pack, modes, Precision.bf16, is_offloaded)

    one = 2 * config.width * pack.tokens
    assert needed(modes, False) - needed(modes, True) == 6 * one
    assert needed(modes[:2], True) == needed(modes[:2], False), "blocks that keep everything keep it on the device"


def test_a_budget_is_used_up_before_more_is_computed_again() -> None:
    """Every mix fits, blocks that compute less come last, and one step up would not fit."""
    config, pack = replace(TrainConfig().model, depth=8), PackSize(4096, 100, 2)
    order = (Checkpointing.block, Checkpointing.operations, Checkpointing.none)

    def needed(modes: tuple[Checkpointing, ...]) -> int:
        kept = activation_bytes(config, pack, modes, Precision.bf16)
        return kept + working_bytes(config, pack, modes, Precision.bf16)

    least, most = (needed((mode,) * 8) for mode in (Checkpointing.block, Checkpointing.none))
    seen = set()
    for share in (0.0, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0):
        budget = least + share * (most - least)
        parallel = ParallelConfig(checkpointing=Checkpointing.budget, activation_memory_gib=budget / GIB)
        modes = block_modes(config, parallel, pack)
        seen |= set(modes)
        assert list(modes) == sorted(modes, key=order.index)
        assert needed(modes) <= budget
        for number, mode in enumerate(modes):
            if mode is not Checkpointing.none:
                better = (*modes[:number], order[order.index(mode) + 1], *modes[number + 1 :])
                assert needed(better) > budget, (share, modes)
    assert seen == set(order)
    with pytest.raises(ConfigError, match="does not hold a pack of 4096 tokens"):
        block_modes(config, replace(parallel, activation_memory_gib=0.9 * least / GIB), pack)
