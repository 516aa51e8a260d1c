"""What a CUDA device must give: the model in packs, kernels, compiled blocks, float8, the optimizer, offloading.

Kernels alone are held to float64 in test_attention_cores.py; here the whole model runs on each.
"""

import copy
import random
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from conftest import ROWS, randomize
from torch import Tensor
from torch._dynamo import lookup_backend

from sora_train.config.optim import OptimConfig
from sora_train.config.parallel import AttentionKind, Checkpointing, ParallelConfig, Precision
from sora_train.config.root import ConfigError
from sora_train.cost.memory import PackSize
from sora_train.distributed.activations import BlockRunner
from sora_train.distributed.compilation import compile_blocks
from sora_train.distributed.float8 import MIN_CAPABILITY, apply_float8
from sora_train.distributed.offload import Offload
from sora_train.distributed.parallelize import parallelize
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.distributed.topology import World
from sora_train.models.attention import apply_core
from sora_train.models.layers import per_token
from sora_train.models.pack_layout import PackLayout
from sora_train.models.video_dit import VideoDiT, call_block, predict
from sora_train.training.optim import build_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
CUDA = torch.device("cuda")
# Heads of width 64, which every kernel takes.
WIDE = replace(ROWS, width=256, heads=4, mlp_width=512)


def on_cuda(dtype: torch.dtype = torch.bfloat16) -> VideoDiT:
    return randomize(VideoDiT(WIDE)).to(CUDA, dtype)


def inputs_of(lengths, seed: int = 0, device: torch.device = CUDA):
    draw = torch.Generator().manual_seed(seed)
    text = [draw_length % 7 + 1 for draw_length in lengths]
    tokens = torch.randn(sum(lengths), 16, generator=draw).to(device)
    positions = torch.randint(0, 30, (sum(lengths), 3), generator=draw).to(device)
    rows = torch.randn(sum(text), 16, generator=draw).to(device)
    t_S = torch.rand(len(lengths), generator=draw).to(device)
    return tokens, positions, t_S, rows, PackLayout.build(lengths, text, device)


def backward(model: VideoDiT, inputs) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(*inputs)
    (out * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).sum().backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return out.detach(), found


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    assert a.isfinite().all()
    return float((a - b).norm() / b.norm())


def gradient_distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return distance(*(torch.cat([found[name].flatten() for name in expected]) for found in (got, expected)))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_pack_equals_its_clips_one_by_one(dtype, bound) -> None:
    model = on_cuda(dtype)
    apply_core(model, AttentionKind.auto, CUDA, dtype)
    draw = torch.Generator().manual_seed(1)
    shapes = [(4, 3, 4, 6), (4, 1, 2, 2), (4, 5, 16, 8), (4, 1, 6, 6)]
    latents = [torch.randn(shape, generator=draw).to(CUDA) for shape in shapes]
    text = [torch.randn(rows, 16, generator=draw).to(CUDA) for rows in (5, 1, 7, 3)]
    t_S = torch.tensor([0.9, 0.2, 0.5, 0.05], device=CUDA)
    packed = predict(model, latents, t_S, text)
    for number, sample in enumerate(latents):
        (alone,) = predict(model, [sample], t_S[number : number + 1], [text[number]])
        assert distance(packed[number], alone) < bound


@pytest.mark.parametrize("kind", [kind for kind in AttentionKind if kind is not AttentionKind.auto])
def test_the_model_is_the_same_on_every_kernel(kind) -> None:
    """In bf16: values and gradients, documents of one token among them."""
    plain, model, inputs = on_cuda(), on_cuda(), inputs_of((300, 1, 77, 128))
    apply_core(plain, AttentionKind.sdpa, CUDA, torch.bfloat16)
    try:
        apply_core(model, kind, CUDA, torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    (got, gradients), (expected, expected_gradients) = backward(model, inputs), backward(plain, inputs)
    assert distance(got, expected) < 2e-2
    assert gradient_distance(gradients, expected_gradients) < 5e-2


def test_bf16_is_near_fp32() -> None:
    """As validation computes: weights rounded, no gradients; modulation, norms and rotation in fp32 inside."""
    exact, model, inputs = on_cuda(torch.float32), on_cuda(), inputs_of((300, 1, 77, 128))
    world = World(0, 1, 0, 1, CUDA)
    parallelize(model, ParallelConfig(precision=Precision.bf16), world, SequenceGroups({}), is_quiet=True)
    with torch.no_grad():
        assert distance(model(*inputs), exact(*inputs)) < 3e-2


def test_a_compiled_model_takes_packs_of_all_lengths_without_compiling_anew() -> None:
    torch.compiler.reset()
    graphs, inductor = 0, lookup_backend("inductor")

    def counting(graph, examples):
        nonlocal graphs
        graphs += 1
        return inductor(graph, examples)

    plain, model = on_cuda(), on_cuda()
    for each in (plain, model):
        apply_core(each, AttentionKind.auto, CUDA, torch.bfloat16)
    compiled = compile_blocks(model.blocks, CUDA, counting)
    assert compiled is not None
    model.run_block = compiled.or_as_it_is(model.run_block)
    draw, counts, graphs = random.Random(2), [], 0
    for number in range(12):
        inputs = inputs_of([draw.choice([1, draw.randint(2, 400)]) for _ in range(draw.randint(1, 6))] + [5], number)
        (got, gradients), (expected, expected_gradients) = backward(model, inputs), backward(plain, inputs)
        assert distance(got, expected) < 2e-2
        assert gradient_distance(gradients, expected_gradients) < 5e-2
        counts.append(graphs)
    assert not compiled.has_failed
    assert 0 < counts[0] == counts[-1], counts


@pytest.mark.parametrize("mode", [Checkpointing.operations, Checkpointing.block])
def test_what_goes_to_the_host_comes_back_unharmed(mode) -> None:
    """Copies on a stream of their own, while the memory of what went out is given to others: a race would show."""
    model, inputs = on_cuda(torch.float32), inputs_of((900, 1, 600))
    model.run_block = BlockRunner(dict.fromkeys(model.blocks, mode), None, call_block)
    expected = backward(model, inputs)
    offload = Offload(CUDA, min_bytes=0)
    model.run_block = BlockRunner(dict.fromkeys(model.blocks, mode), offload, call_block)
    for _ in range(5):
        got, gradients = backward(model, inputs)
        assert torch.equal(got, expected[0])
        assert gradient_distance(gradients, expected[1]) < 1e-5  # sums of gradients have no fixed order
    assert offload.moved_bytes > 5 * 1500 * WIDE.width * 4 * WIDE.depth


def test_fused_adamw_equals_the_plain_one() -> None:
    config = OptimConfig()
    there, here = on_cuda(torch.float32), randomize(VideoDiT(WIDE))
    optimizers = [build_optimizer(there, config, CUDA), build_optimizer(here, config, torch.device("cpu"))]
    for step in range(3):
        for model, optimizer in zip((there, here), optimizers, strict=True):
            draw = torch.Generator().manual_seed(step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.device)
            optimizer.step()
    for a, b in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-6, rtol=1e-5)


def test_modulation_sums_its_gradient_in_a_fixed_order() -> None:
    """What resume is bitwise by: thousands of tokens add to one row."""
    rows = torch.randn(3, 64, device=CUDA, requires_grad=True)
    row_L = torch.randint(3, (20_000,), device=CUDA)
    weights = torch.randn(20_000, 64, device=CUDA)
    found = [torch.autograd.grad(per_token(rows, row_L), rows, weights)[0] for _ in range(5)]
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_float8_products_equal_emulated_ones() -> None:
    """Of packs of any length: none is a multiple of what float8 products need."""
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        pytest.skip("no float8 products on this device")
    plain = on_cuda()
    model, emulated = copy.deepcopy(plain), copy.deepcopy(plain)
    apply_float8(model, CUDA)
    apply_float8(emulated, CUDA, is_emulated=True)
    for lengths in ((37, 1, 20), (1,), (333, 17)):
        inputs = inputs_of(lengths)
        (got, gradients), (expected, expected_gradients) = backward(model, inputs), backward(emulated, inputs)
        assert distance(got, expected) < 2e-2
        assert gradient_distance(gradients, expected_gradients) < 5e-2
        assert 1e-3 < distance(got, backward(plain, inputs)[0]) < 0.1


def test_every_setting_together_trains() -> None:
    """What `parallelize` applies at once: kernel, compiler, recomputation, host memory."""
    model, inputs = on_cuda(), inputs_of((300, 40, 77))
    config = ParallelConfig(compile=True, checkpointing=Checkpointing.operations, offload_activations=True)
    plain = backward(on_cuda(), inputs)
    parallelize(model, config, World(0, 1, 0, 1, CUDA), SequenceGroups({}), PackSize(417, 20, 3), is_quiet=True)
    got, gradients = backward(model, inputs)
    assert distance(got, plain[0]) < 2e-2
    assert gradient_distance(gradients, plain[1]) < 5e-2
