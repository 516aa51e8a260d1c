"""What is applied from outside changes neither values nor gradients: only what is kept, where, and how often it is
computed; counted, never timed."""

import logging
import random
from dataclasses import replace

import pytest
import torch
from allocations import Allocations
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.parallel import AttentionKind, Checkpointing, ParallelConfig, Precision
from sora_train.config.root import ConfigError
from sora_train.cost.memory import GIB, PackSize, activation_bytes, working_bytes
from sora_train.distributed.activations import BlockRunner
from sora_train.distributed.compilation import compile_blocks
from sora_train.distributed.offload import Away, Offload
from sora_train.distributed.parallelize import parallelize
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.distributed.topology import read_world
from sora_train.models.attention_choice import BY_NAME
from sora_train.models.attention_cores import Core, masked_sdpa
from sora_train.models.pack_layout import PackLayout
from sora_train.models.video_dit import VideoDiT, call_block

CPU = torch.device("cpu")
WORLD, NO_GROUPS = read_world({}), SequenceGroups({})
# Wan's shape (1.3B: 1536 wide, MLP of 8960, 12 heads, 30 blocks), a sixteenth as wide.
WAN = ModelConfig(
    width=96, depth=4, heads=4, mlp_width=560, in_channels=4, out_channels=4,
    text=TextConfig(kind=TextKind.encoder, width=32),
)  # fmt: skip
LENGTHS, TEXT = (100, 1, 190), (7, 3, 9)
DTYPES = (torch.float32, torch.bfloat16)
aten = torch.ops.aten
# The counter knows no fused attention of the CPU.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, out_shape=None, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, out_shape=None, **_: (
        sdpa_backward_flop_count(*shapes[:4])
    ),
}


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(config)
    for parameter in model.parameters():  # nothing at zero, so that every path counts
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def inputs_of(lengths, text, config=WAN):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(text), config.text.width, generator=generator)
    tokens = torch.randn(sum(lengths), 4 * config.in_channels, generator=generator)
    positions = torch.randint(0, 9, (sum(lengths), 3), generator=generator)
    return tokens, positions, torch.rand(len(lengths), generator=generator), rows, PackLayout.build(lengths, text)


def gradients(model: VideoDiT, inputs) -> tuple[Tensor, dict[str, Tensor], int, int]:
    """Prediction and gradients; bytes kept between the passes; FLOPs of both."""
    model.zero_grad()
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        with Allocations(list(model.parameters())) as allocations:
            out = model(*inputs)
        kept = allocations.alive
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return out.detach(), found, kept, counter.get_total_flops()


def backward(model: VideoDiT, inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Prediction and gradients, with nobody looking on: the compiler stands back from what it does not know."""
    model.zero_grad()
    out = model(*inputs)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def run_in(model: VideoDiT, mode: Checkpointing, offload: Offload | None = None):
    model.run_block = BlockRunner(dict.fromkeys(model.blocks, mode), offload, call_block)
    return gradients(model, inputs_of(LENGTHS, TEXT))


def assert_same(got, expected) -> None:
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(got[1][name], gradient), name


def assert_close(got, expected) -> None:
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    # Gradients that vanish but for rounding (of queries, where a text has one row) are held to the largest.
    floor = 1e-6 * max(float(gradient.norm()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + floor, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_keep_little_and_compute_little_again(dtype: torch.dtype) -> None:
    """At most 40% of the bytes, for at most 10% more FLOPs; and whole blocks less still, for a third more FLOPs."""
    model = model_of(WAN, dtype)
    none = run_in(model, Checkpointing.none)
    operations = run_in(model, Checkpointing.operations)
    block = run_in(model, Checkpointing.block)
    assert_same(operations, none)
    assert_same(block, none)
    assert operations[2] <= 0.40 * none[2]
    assert none[3] < operations[3] <= 1.10 * none[3]
    assert block[2] < 0.6 * operations[2]
    assert 1.25 * none[3] < block[3] < 1.34 * none[3]


def test_attention_is_not_computed_again_whichever_operator_does_it() -> None:
    """A kernel is known by the name of its operator; masked attention runs on the same one."""
    model = model_of(WAN)
    for each in model.blocks:
        each.attn1.core = each.attn2.core = masked_sdpa
    none, operations = run_in(model, Checkpointing.none), run_in(model, Checkpointing.operations)
    assert_same(operations, none)
    again = operations[3] - none[3]
    assert again == 2 * WAN.depth * sum(LENGTHS) * WAN.width * WAN.mlp_width, "the widening product, nothing else"


@pytest.mark.parametrize("mode", [Checkpointing.operations, Checkpointing.block])
@pytest.mark.parametrize("kind", [AttentionKind.flash4, AttentionKind.flash3])
def test_attention_that_cannot_be_kept_is_told_of(caplog, monkeypatch, mode, kind) -> None:
    def choose(*_: object) -> tuple[Core, str]:
        return BY_NAME[kind].core, "chosen"

    monkeypatch.setattr("sora_train.models.attention.choose_core", choose)
    with caplog.at_level(logging.WARNING):
        config = ParallelConfig(precision=Precision.fp32, checkpointing=mode)
        parallelize(VideoDiT(WAN), config, WORLD, NO_GROUPS, PackSize(8, 1, 1))
    told = [record.message for record in caplog.records if "computes it again" in record.message]
    is_recomputed = kind is AttentionKind.flash4 and mode is Checkpointing.operations
    assert [("FlashAttention-4" in line) for line in told] == [True] * is_recomputed


@pytest.mark.parametrize("mode", [Checkpointing.operations, Checkpointing.block])
def test_what_is_kept_goes_to_the_host_and_comes_back(mode: Checkpointing) -> None:
    model = model_of(WAN)
    none, on_device = run_in(model, Checkpointing.none), run_in(model, mode)
    offload = Offload(CPU, min_bytes=4096)
    hosts: list[int] = []
    start = Away.__init__

    def count(self, *arguments):
        start(self, *arguments)
        hosts.append(self.host.nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Away, "__init__", count)
        away = run_in(model, mode, offload)
    assert_same(away, none)
    assert offload.moved_bytes == sum(hosts)
    inputs = WAN.depth * sum(LENGTHS) * WAN.width * 4
    expected = inputs * (1 if mode is Checkpointing.block else 10)
    # Softmax statistics of single documents and rows of text stay: they are small.
    assert expected <= offload.moved_bytes <= 1.1 * expected
    # The host's copies are allocations of this process too; without them, what went out is gone from the device.
    assert away[2] - sum(hosts) <= on_device[2] - 0.95 * expected


def test_the_way_back_begins_a_block_ahead() -> None:
    """While a block is computed again, what the block before it kept is already on its way."""
    offload = Offload(CPU, min_bytes=0)
    tensors = [torch.full((4,), float(number)) for number in range(3)]
    away = []
    for tensor in tensors:
        with offload.of_block(tensor):
            away.append(offload.put(tensor))
    assert torch.equal(away[2].get(), tensors[2])
    assert away[1]._back is not None
    assert away[0]._back is None
    away[1].get()
    assert away[0]._back is not None


def test_a_budget_takes_the_cheapest_blocks_that_fit() -> None:
    pack = PackSize(sum(LENGTHS), sum(TEXT), len(LENGTHS))
    modes = {mode: (mode,) * WAN.depth for mode in Checkpointing if mode is not Checkpointing.budget}
    needs = {
        mode: activation_bytes(WAN, pack, each, Precision.fp32) + working_bytes(WAN, pack, each, Precision.fp32)
        for mode, each in modes.items()
    }
    for mode in modes:
        model = model_of(WAN)
        config = ParallelConfig(
            precision=Precision.fp32, checkpointing=Checkpointing.budget, activation_memory_gib=needs[mode] / GIB
        )
        parallelize(model, config, WORLD, NO_GROUPS, pack, is_quiet=True)
        chosen = [Checkpointing.none] * WAN.depth
        if isinstance(model.run_block, BlockRunner):
            chosen = [model.run_block.modes[block] for block in model.blocks]
        assert chosen == list(modes[mode]) or mode is Checkpointing.block
        assert gradients(model, inputs_of(LENGTHS, TEXT))[2] <= needs[mode]
    with pytest.raises(ConfigError, match=r"activation_memory_gib=1e-05 does not hold a pack of 291 tokens"):
        parallelize(model_of(WAN), replace(config, activation_memory_gib=1e-5), WORLD, NO_GROUPS, pack, is_quiet=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpointing": Checkpointing.budget}, "a budget needs both"),
        ({"activation_memory_gib": 2.0}, "a budget needs both"),
        ({"offload_activations": True}, "parallel.checkpointing=none keeps"),
    ],
)
def test_settings_that_do_nothing_together_are_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        parallelize(model_of(WAN), ParallelConfig(**settings), WORLD, NO_GROUPS, PackSize(8, 1, 1))


def test_compiled_blocks_are_refused_where_ranks_reduce_gradients_as_they_come() -> None:
    world, pack = replace(WORLD, world_size=2, local_world_size=2), PackSize(8, 1, 1)
    for stage in (2, 3):
        config = ParallelConfig(compile=True, zero_stage=stage)
        with pytest.raises(ConfigError, match=f"parallel.zero_stage={stage} on 2 ranks: use"):
            parallelize(model_of(WAN), config, world, NO_GROUPS, pack, is_quiet=True)
        parallelize(model_of(WAN), config, world, NO_GROUPS, is_quiet=True)  # nothing is trained


@pytest.mark.parametrize("stage", [1, 2])
def test_what_float8_is_advised_is_not_refused(caplog, monkeypatch, stage) -> None:
    monkeypatch.setattr("sora_train.distributed.parallelize.apply_float8", lambda model, device: None)
    world = replace(WORLD, world_size=2, local_world_size=2)
    with caplog.at_level(logging.WARNING):
        config = ParallelConfig(precision=Precision.fp8, zero_stage=stage)
        parallelize(model_of(WAN), config, world, NO_GROUPS, PackSize(8, 1, 1))
    (line,) = [record.message for record in caplog.records if "fp8" in record.message]
    assert "parallel.compile=true" in line
    assert ("parallel.zero_stage=1" in line) == (stage == 2)


def test_a_model_that_is_not_trained_gets_a_kernel_only() -> None:
    model = model_of(WAN)
    config = ParallelConfig(checkpointing=Checkpointing.block, attention=AttentionKind.masked, compile=True)
    parallelize(model, config, WORLD, NO_GROUPS, is_quiet=True)
    assert model.run_block is call_block
    assert model.blocks[0].attn1.core is masked_sdpa


SMALL = replace(WAN, width=16, depth=2, heads=2, mlp_width=32)


def random_pack(draw: random.Random) -> tuple[list[int], list[int]]:
    """One to five documents; now and then a single one, or of a single token."""
    lengths = [draw.choice([1, draw.randint(2, 60)]) for _ in range(draw.randint(1, 5))]
    return lengths, [draw.choice([1, draw.randint(2, 9)]) for _ in lengths]


@pytest.mark.slow
def test_fifty_packs_compile_what_the_first_one_did() -> None:
    """Every piece of a block is compiled once, in the first pack, for packs of all lengths and however activations are
    kept, and once more where a t a token comes instead of one a clip; values and gradients equal those of blocks that
    are not compiled. What is counted is graphs handed to the backend, one for each piece of a block between its cores:
    blocks share them."""
    torch.compiler.reset()
    compiled = 0
    aot = lookup_backend("aot_eager")

    def counting(graph, examples):
        nonlocal compiled
        compiled += 1
        return aot(graph, examples)

    plain, model = model_of(SMALL), model_of(SMALL)
    compile_blocks(model.blocks, CPU, counting)
    draw, counts, packs = random.Random(3), [], [([4, 4], [4, 4])]  # sizes that are equal by chance
    packs += [random_pack(draw) for _ in range(45)]
    packs += [([1], [1]), ([16], [7]), ([40], [16]), ([1, 1], [3, 3])]  # one token; as many as the model is wide
    assert len({tuple(lengths) for lengths, _ in packs}) >= 45
    compiled = 0
    for number, (lengths, text) in enumerate(packs):
        mode = (Checkpointing.none, Checkpointing.operations, Checkpointing.block)[number // 8 % 3]
        model.run_block = BlockRunner(dict.fromkeys(model.blocks, mode), None, call_block)
        got = backward(model, inputs_of(lengths, text))
        counts.append(compiled)
        if number % 4 == 0 or number >= 46:
            assert_close(got, backward(plain, inputs_of(lengths, text)))
    assert 0 < counts[0] <= 12, "pieces between attention cores, of self- and of cross-attention"
    assert counts[-1] == counts[0], counts
    for lengths, text in packs[1:11]:
        tokens, positions, _, rows, layout = inputs_of(lengths, text)
        each = tokens, positions, torch.linspace(0, 1, sum(lengths)), rows, layout
        assert_close(backward(model, each), backward(plain, each))
    assert counts[-1] < compiled <= 2 * counts[0], "a second form, no third"
    counts[0] = compiled

    # With operations, compiled blocks keep what attention gave: it runs between their pieces.
    model.run_block = BlockRunner(dict.fromkeys(model.blocks, Checkpointing.operations), None, call_block)
    with CountAttention() as count:
        backward(model, inputs_of([5, 3], [2, 2]))
    assert count.calls == SMALL.depth * 2 * 2, "blocks, self and cross, documents; the backward pass adds none"
    assert compiled == counts[0]


class CountAttention(TorchDispatchMode):
    """How often SDPA ran forward."""

    calls = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


def test_without_a_compiler_blocks_run_as_they_are_and_a_line_says_so(caplog) -> None:
    from torch._inductor import config as inductor

    torch.compiler.reset()
    plain, model = model_of(SMALL), model_of(SMALL)
    with caplog.at_level(logging.WARNING), inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        config = ParallelConfig(compile=True, precision=Precision.fp32)
        parallelize(model, config, WORLD, NO_GROUPS, PackSize(8, 1, 1), is_quiet=True)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("parallel.compile: blocks run as they are, not compiled: ")
    assert "no-such-compiler" in line
    inputs = inputs_of([5, 3], [2, 2])
    assert_same(backward(model, inputs), backward(plain, inputs))


@pytest.mark.parametrize("pieces", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", [Checkpointing.none, Checkpointing.operations])
def test_a_block_that_cannot_be_compiled_runs_as_it_is_and_a_line_says_so(caplog, mode, pieces) -> None:
    """Also when a later piece of it fails, after the first attention has run and what it gave is kept."""
    torch.compiler.reset()
    aot = lookup_backend("aot_eager")
    calls = 0

    def failing(graph, examples):
        nonlocal calls
        calls += 1
        if calls > 1 + pieces:  # the trial at the start goes well
            raise RuntimeError("no kernel for this")
        return aot(graph, examples)

    plain, model = model_of(SMALL), model_of(SMALL)
    with caplog.at_level(logging.WARNING):
        compiled = compile_blocks(model.blocks, CPU, failing)
        runner = BlockRunner(dict.fromkeys(model.blocks, mode), None, call_block)
        model.run_block = compiled.or_as_it_is(runner)
        for _ in range(2):
            inputs = inputs_of([5, 3], [2, 2])
            assert_same(backward(model, inputs), backward(plain, inputs))
    assert calls == 2 + pieces
    (line,) = [record.message for record in caplog.records if "parallel.compile" in record.message]
    assert "no kernel for this" in line


def test_an_error_of_a_blocks_own_is_raised_as_it_is(caplog) -> None:
    """Not taken for a fault of the compiler; and memory that ran out is not asked for again."""
    torch.compiler.reset()
    model = model_of(SMALL)
    compiled = compile_blocks(model.blocks, CPU, "eager")
    model.run_block = compiled.or_as_it_is(model.run_block)
    calls = 0

    def broken(*_: object) -> Tensor:
        nonlocal calls
        calls += 1
        raise (torch.OutOfMemoryError if calls == 1 else RuntimeError)("of the block's own")

    model.blocks[0].attn1.core = torch.compiler.disable(broken)
    for error, expected_calls in ((torch.OutOfMemoryError, 1), (RuntimeError, 3)):
        with caplog.at_level(logging.WARNING), pytest.raises(error, match="of the block's own"):
            backward(model, inputs_of([5, 3], [2, 2]))
        assert calls == expected_calls
    assert not [record for record in caplog.records if "parallel.compile" in record.message]
