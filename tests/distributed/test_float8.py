"""float8 touches the layers it is meant for, and nothing that others hold on to: names, weights, clips in one pack."""

import random

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.optim import OptimConfig
from sora_train.config.parallel import Checkpointing, ParallelConfig, Precision
from sora_train.config.root import ConfigError
from sora_train.cost.memory import PackSize, activation_bytes, states
from sora_train.distributed import float8
from sora_train.distributed.activations import BlockRunner
from sora_train.distributed.compilation import compile_blocks
from sora_train.distributed.engine import deepspeed_config
from sora_train.distributed.float8 import apply_float8
from sora_train.distributed.parallelize import compute_dtype, parallelize
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.distributed.topology import read_world
from sora_train.models.pack_layout import PackLayout
from sora_train.models.video_dit import VideoDiT, call_block
from sora_train.training.optim import build_optimizer

CPU = torch.device("cpu")
SIZE = ModelConfig(
    width=32, depth=2, heads=2, mlp_width=64, in_channels=4, out_channels=4, image_width=16,
    text=TextConfig(kind=TextKind.encoder, width=16),
)  # fmt: skip
NO_IMAGES = ModelConfig(
    width=32, depth=2, heads=2, mlp_width=64, in_channels=4, out_channels=4,
    text=TextConfig(kind=TextKind.encoder, width=16),
)  # fmt: skip


def model_of(config: ModelConfig = NO_IMAGES) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(config)
    for parameter in model.parameters():  # nothing at zero, so that every path counts
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.bfloat16()


def inputs_of(lengths, seed: int = 1):
    draw = torch.Generator().manual_seed(seed)
    text = [3] * len(lengths)
    tokens = torch.randn(sum(lengths), 16, generator=draw)
    positions = torch.randint(0, 9, (sum(lengths), 3), generator=draw)
    rows = torch.randn(sum(text), 16, generator=draw)
    return tokens, positions, torch.rand(len(lengths), generator=draw), rows, PackLayout.build(lengths, text)


def backward(model: VideoDiT, inputs):
    model.zero_grad()
    out = model(*inputs)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), {name: value.grad.float() for name, value in model.named_parameters()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.float8", reason="torchao is not installed: pip install 'sora_train[fp8]'")


def test_the_large_layers_become_float8_and_parameters_stay_what_they_are(torchao) -> None:
    model = model_of(SIZE)
    before = dict(model.named_parameters())
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    apply_float8(model, CPU, is_emulated=True)
    changed = linears - {name for name, module in model.named_modules() if type(module) is nn.Linear}
    # Not those that rows of text and images alone pass, and nothing outside the blocks.
    of_attention = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out", "attn2.to_q", "attn2.to_out"}
    large = {*of_attention, "ffn.up", "ffn.down"}
    assert changed == {f"blocks.{number}.{layer}" for number in range(SIZE.depth) for layer in large}
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in changed)
    after = dict(model.named_parameters())
    assert list(after) == list(before) == list(model.state_dict())
    assert all(after[name] is before[name] for name in before)
    build_optimizer(model, OptimConfig(), CPU)


@pytest.mark.parametrize("mode", [Checkpointing.none, Checkpointing.operations, Checkpointing.block])
def test_float8_is_close_to_bf16_and_really_is_float8(torchao, mode) -> None:
    plain, model, inputs = model_of(), model_of(), inputs_of((37, 1, 20))
    apply_float8(model, CPU, is_emulated=True)
    expected, expected_gradients = backward(plain, inputs)
    whole = backward(model, inputs)
    model.run_block = BlockRunner(dict.fromkeys(model.blocks, mode), None, call_block)
    got, gradients = backward(model, inputs)
    assert torch.equal(got, whole[0])
    assert all(torch.equal(gradients[name], whole[1][name]) for name in gradients)
    assert 1e-3 < distance(got, expected) < 0.1
    errors = sorted(distance(gradients[name], value) for name, value in expected_gradients.items())
    assert errors[len(errors) // 2] < 0.1
    assert errors[-1] < 0.3


def test_a_clip_does_not_change_with_its_neighbours(torchao) -> None:
    """One scale for all tokens of the pack would let the largest of them decide how the others are rounded."""
    model = model_of()
    apply_float8(model, CPU, is_emulated=True)
    inputs = inputs_of((12, 20))
    louder = (inputs[0].clone(), *inputs[1:])
    louder[0][12:] *= 1000
    with torch.no_grad():
        first, second = model(*inputs), model(*louder)
    assert torch.equal(first[:12], second[:12])
    assert not torch.equal(first[12:], second[12:])


@pytest.mark.slow
def test_float8_blocks_are_compiled_once_for_packs_of_all_lengths(torchao) -> None:
    torch.compiler.reset()
    compiled = 0
    aot = lookup_backend("aot_eager")

    def counting(graph, examples):
        nonlocal compiled
        compiled += 1
        return aot(graph, examples)

    plain, model = model_of(), model_of()
    apply_float8(plain, CPU, is_emulated=True)
    apply_float8(model, CPU, is_emulated=True)
    compile_blocks(model.blocks, CPU, counting)
    compiled, draw, counts = 0, random.Random(4), []
    for number in range(12):
        inputs = inputs_of([draw.randint(1, 40) for _ in range(draw.randint(1, 4))], seed=number)
        got, expected = backward(model, inputs), backward(plain, inputs)
        counts.append(compiled)
        assert distance(got[0], expected[0]) < 0.02
    assert 0 < counts[0] <= 12
    assert counts[-1] == counts[0], counts


def test_what_float8_cannot_do_is_said_in_one_line(monkeypatch) -> None:
    world, groups = read_world({}), SequenceGroups({})
    config = ParallelConfig(precision=Precision.fp8)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"precision=fp8 needs a CUDA device .* this run is on cpu: use .*=bf16$"):
            parallelize(model_of(), config, world, groups, PackSize(8, 3, 1), is_quiet=True)
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs torchao: pip install 'sora_train\[fp8\]'"):
        apply_float8(model_of(), CPU, is_emulated=True)
    odd = ModelConfig(width=24, heads=2, mlp_width=64, text=TextConfig(kind=TextKind.encoder, width=16))
    with pytest.raises(ConfigError, match=r"model.width=24 is no multiple of it"):
        apply_float8(model_of(odd), CPU, is_emulated=True)


def test_all_that_float8_holds_is_bf16() -> None:
    """Weights, gradients and activations; only products are float8."""
    for stage in range(4):
        fp8, bf16 = (ParallelConfig(zero_stage=stage, precision=each) for each in (Precision.fp8, Precision.bf16))
        assert deepspeed_config(fp8, OptimConfig()) == deepspeed_config(bf16, OptimConfig())
        assert states(1000, fp8, 2) == states(1000, bf16, 2)
    modes, pack = (Checkpointing.none, Checkpointing.operations), PackSize(50, 20, 3)
    held = [activation_bytes(NO_IMAGES, pack, modes, each) for each in (Precision.fp8, Precision.bf16)]
    assert held[0] == held[1]


def test_only_training_is_in_float8() -> None:
    """A model that is not trained (validation, samples) computes in bf16, on any device."""
    model = model_of()
    config = ParallelConfig(precision=Precision.fp8)
    assert compute_dtype(config) is torch.bfloat16
    parallelize(model, config, read_world({}), SequenceGroups({}), is_quiet=True)
    assert {type(module) for module in model.blocks.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
