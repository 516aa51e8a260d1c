"""Training steps on one device: the share of its peak that useful work makes up (MFU).

A step is what a rank does in a run of one: forward and backward of a pack in bf16, the norm of all gradients, clipping,
fused AdamW on fp32 masters, weights back to bf16. Plain torch, no engine: one device has nothing to partition.
"""

import copy
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_packs import Bench, Grid, PackOnDevice, contents, equal_packs, put
from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.parallel import Checkpointing, ParallelConfig, Precision
from sora_train.cost.flops import mfu
from sora_train.cost.memory import PackSize, num_parameters
from sora_train.distributed.compilation import CompiledForward, compile_blocks
from sora_train.distributed.parallelize import parallelize
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.distributed.topology import World
from sora_train.models.video_dit import VideoDiT

WAN_1_3B = ModelConfig(
    name="Wan 1.3B", width=1536, depth=30, heads=12, mlp_width=8960, text=TextConfig(kind=TextKind.encoder, width=4096)
)
# A block of a model of 7 billion parameters has 270 million: 26 would make 7, 32 is more than any device here holds.
CLASS_7B = replace(WAN_1_3B, name="7B class", width=4096, depth=32, heads=32, mlp_width=16_384)
WARM_UP, FEW, MIN_PACKINGS = 3, 4, 50
BARS = {"8k": 0.57, "32-37k": 0.48}
# Bytes a parameter: bf16 weight and gradient, fp32 master and two states of Adam; and the fp32 gradient, while a step
# is taken.
HELD, STEPPED = 16, 18


@dataclass(frozen=True)
class Mode:
    """How blocks run, and what is kept of them."""

    checkpointing: Checkpointing
    is_compiled: bool = True
    precision: Precision = Precision.bf16

    def __str__(self) -> str:
        compiled = "compiled" if self.is_compiled else "eager"
        return f"{compiled}, checkpointing={self.checkpointing.value}, {self.precision.value}"


class Training:
    """A model with random weights, and its optimizer."""

    def __init__(self, bench: Bench, config: ModelConfig, mode: Mode, largest: PackSize) -> None:
        self.bench, self.config = bench, config
        torch.manual_seed(0)
        with bench.device:
            self.model = randomize(VideoDiT(config)).to(bench.dtype)
        parallel = ParallelConfig(precision=mode.precision, checkpointing=mode.checkpointing)
        world = World(0, 1, 0, 1, bench.device)
        parallelize(self.model, parallel, world, SequenceGroups({}), largest, is_quiet=True)
        self.compiled = compiled(bench, self.model) if mode.is_compiled else None
        self.weights = list(self.model.parameters())
        self.masters = [weight.detach().float().requires_grad_() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, weight_decay=0.01, fused=True)

    def loss(self, pack: PackOnDevice) -> Tensor:
        """Forward alone."""
        tokens_LP, t_S, text_MD, target_LQ = contents(pack, self.config, self.bench.dtype)
        prediction_LQ = self.model(tokens_LP, pack.positions_L3, t_S, text_MD, pack.layout)
        return (prediction_LQ - target_LQ).square().mean()

    def step(self, pack: PackOnDevice) -> None:
        """One optimizer step on one pack."""
        self.loss(pack).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                weight.copy_(master)
                master.grad = None


def compiled(bench: Bench, model: VideoDiT) -> CompiledForward:
    """Blocks compiled as `parallel.compile` does it, with a backend that counts.

    Raises RuntimeError where there is no compiler.
    """
    assert bench.compiler is not None
    found = compile_blocks(model.blocks, bench.device, bench.compiler)
    if found is None:
        raise RuntimeError("there is no compiler here")
    model.run_block = found.or_as_it_is(model.run_block)
    return found


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Normal weights everywhere: zeros, as training starts with, are multiplied faster."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def modes(bench: Bench) -> list[Mode]:
    """What is compared, the likeliest to be best first."""
    eager = [Mode(kept, is_compiled=False) for kept in (Checkpointing.none, Checkpointing.operations)]
    if bench.compiler is None:
        return [*eager, Mode(Checkpointing.block, is_compiled=False)]
    found = [Mode(Checkpointing.none), Mode(Checkpointing.operations), eager[1], Mode(Checkpointing.block)]
    if bench.is_cuda and find_spec("torchao"):
        found.insert(2, Mode(Checkpointing.none, precision=Precision.fp8))
    return found


def packs_of(bench: Bench, length: str) -> list[list[Grid]]:
    """Different packs of about 8k-token clips, or of one clip of 32k to 37k."""
    low, high, limit = (7_400, 8_600, 17_200) if length == "8k" else (32_000, 37_000, 37_000)
    return equal_packs(bench.packings + 3, low // bench.scale, high // bench.scale, limit // bench.scale, seed=3)


def measure(bench: Bench, config: ModelConfig, length: str, max_depth: int, modes_to_try: Sequence[Mode]) -> None:
    """MFU of every mode on a few packs, and of the best on all."""
    grids = packs_of(bench, length)
    rates: dict[Mode, tuple[float, ModelConfig]] = {}
    budget = bench.seconds_left
    for mode in modes_to_try:
        if rates and bench.seconds_left < 0.6 * budget:
            break
        title = f"{config.name}, {length}-token clips, {mode}"
        with bench.attempt(title):
            sized = fitting(bench, config, mode, grids, max_depth)
            rates[mode] = run(bench, sized, mode, grids[: WARM_UP + FEW], f"{title}: MFU on a few packs"), sized
    if not rates:
        return
    best = max(rates, key=lambda mode: rates[mode][0])
    title = f"{config.name}, {length}-token clips: MFU"
    with bench.attempt(title):
        run(bench, rates[best][1], best, grids, title, BARS[length])


def run(
    bench: Bench, config: ModelConfig, mode: Mode, grids: Sequence[Sequence[Grid]], title: str, bar: float | None = None
) -> float:
    """Records and returns useful FLOPs a second of all packs but the first, which warm up, over the peak; where the
    peak is not known, MFU is 0 and what is returned is FLOPs a second."""
    packs = [put(clips, config, bench.text_rows, bench.device) for clips in grids]
    bench.reset_peak()
    training = Training(bench, config, mode, largest_of(packs))
    for pack in packs[:WARM_UP]:
        training.step(pack)
    before, done, seconds = num_graphs(bench), 0, 0.0
    for start in range(WARM_UP, len(packs), FEW):  # looks at the clock, and waits for the device, now and then
        if done and bench.seconds_left < 0:
            break
        some = packs[start : start + FEW]
        seconds += bench.seconds(functools.partial(steps, training, some))
        done += len(some)
    counted = packs[WARM_UP : WARM_UP + done]
    flops, tokens = sum(pack.flops for pack in counted), [pack.tokens for pack in counted]
    fell_back = training.compiled is not None and training.compiled.has_failed
    conditions = (
        f"{mode}{' BUT FELL BACK TO EAGER' if fell_back else ''}; width {config.width}, {config.depth} blocks, "
        f"{num_parameters(config) / 1e9:.3g}B parameters; {done} packings of {min(tokens)} to {max(tokens)} tokens, "
        f"{bench.text_rows} text rows a clip; {sum(tokens) / seconds:.4g} tokens/s, {flops / seconds / 1e12:.4g} "
        f"TFLOP/s; peak {bench.peak_gib:.3g} GiB; {num_graphs(bench) - before} graphs compiled meanwhile; AdamW and "
        "clipping in every step"
    )
    rate = mfu(flops, seconds, bench.peak)
    held_to = bar if done >= MIN_PACKINGS and bench.peak else None
    if bar is not None and held_to is None:
        conditions += f"; not held to {bar}: fewer than {MIN_PACKINGS} packings, or a device whose peak is not known"
    bench.record(title, rate, "of the dense bf16 peak", conditions, at_least=held_to)
    return rate or flops / seconds


def steps(training: Training, packs: Sequence[PackOnDevice]) -> None:
    """One for each pack."""
    for pack in packs:
        training.step(pack)


def num_graphs(bench: Bench) -> int:
    """Compiled so far."""
    return bench.compiler.graphs if bench.compiler else 0


def largest_of(packs: Sequence[PackOnDevice]) -> PackSize:
    """The most of everything."""
    return PackSize(
        max(p.tokens for p in packs), max(p.text_rows for p in packs), max(p.layout.num_samples for p in packs)
    )


# --- as many blocks as fit


@dataclass(frozen=True)
class Held:
    """Bytes of activations, seen on a model of two blocks."""

    block: int  # kept of one
    edge: int  # kept outside the blocks
    working: int  # beside what is kept, at the peak


def fitting(
    bench: Bench, config: ModelConfig, mode: Mode, grids: Sequence[Sequence[Grid]], max_depth: int
) -> ModelConfig:
    """As many blocks as fit: from what two hold and work in; then tried on the largest pack, and fewer if it fails."""
    limit = min(config.depth, max_depth or config.depth)
    clips = max(grids, key=lambda clips: sum(map(math.prod, clips)))
    largest = put(clips, config, bench.text_rows, bench.device)
    held = probe(bench, replace(config, depth=min(2, limit)), mode, largest)
    bench.reset_peak()
    if not bench.is_cuda:
        return replace(config, depth=limit)
    one = num_parameters(replace(config, depth=2)) - num_parameters(replace(config, depth=1))
    outside = num_parameters(config) - config.depth * one
    room = 0.95 * torch.cuda.mem_get_info(bench.device)[0]  # the rest is what the allocator cannot use
    in_pass = (room - HELD * outside - held.edge - held.working) / (HELD * one + held.block)
    in_step = (room - STEPPED * outside) / (STEPPED * one)
    depth = max(1, min(limit, int(in_pass), int(in_step)))
    while depth > 1 and not fits(bench, replace(config, depth=depth), mode, largest):
        depth -= max(1, depth // 12)
    return replace(config, depth=depth)


def probe(bench: Bench, config: ModelConfig, mode: Mode, pack: PackOnDevice) -> Held:
    """What blocks hold, after a first step, which compiles: its time is recorded where anything was compiled."""
    before = num_graphs(bench)
    training = Training(bench, config, mode, largest_of([pack]))
    began = time.perf_counter()
    training.step(pack)
    record_compilation(bench, config, began, before)
    if not bench.is_cuda:
        return Held(0, 0, 0)
    places: list[int] = []
    run_block = training.model.run_block

    def watched(block: nn.Module, *inputs: Any) -> Any:
        out = run_block(block, *inputs)
        places.append(torch.cuda.memory_allocated(bench.device))
        return out

    training.model.run_block = watched
    bench.reset_peak()
    start = torch.cuda.memory_allocated(bench.device)
    training.loss(pack).backward()
    kept = places[-1] - places[0] if len(places) > 1 else places[0] - start
    peak = torch.cuda.max_memory_allocated(bench.device)
    return Held(kept, max(0, places[0] - start - kept), max(0, peak - places[1 if len(places) > 1 else 0]))


def record_compilation(bench: Bench, config: ModelConfig, began: float, graphs: int) -> None:
    """The time since `began`, if more was compiled than so many graphs."""
    if bench.is_cuda:
        torch.cuda.synchronize(bench.device)
    if more := num_graphs(bench) - graphs:
        conditions = f"{more} graphs, which all blocks share; the compiler's own cache on disk may have had some"
        bench.record(f"{config.name}: first pass, compiling", time.perf_counter() - began, "s", conditions)


def fits(bench: Bench, config: ModelConfig, mode: Mode, pack: PackOnDevice) -> bool:
    """Two steps: the second has the optimizer's states."""
    try:
        training = Training(bench, config, mode, largest_of([pack]))
        steps(training, [pack, pack])
        torch.cuda.synchronize(bench.device)
        answer = True
    except torch.OutOfMemoryError:
        answer = False
    training = None  # type: ignore[assignment]
    bench.reset_peak()
    return answer


def check(bench: Bench, config: ModelConfig) -> None:
    """Packed equals one clip at a time, compiled equals eager, on this device: in bf16, to a few of its roundings."""
    sized = replace(config, depth=min(config.depth, 2))
    clips: list[Grid] = [(3, 8, 10), (1, 1, 1), (2, 12, 6), (1, 20, 20)]
    rows = bench.text_rows
    pack = put(clips, sized, rows, bench.device)
    training = Training(bench, sized, Mode(Checkpointing.none, is_compiled=False), largest_of([pack]))
    tokens_LP, t_S, text_MD, _ = contents(pack, sized, bench.dtype)
    with torch.no_grad():
        packed = training.model(tokens_LP, pack.positions_L3, t_S, text_MD, pack.layout)
        parts, start = [], 0
        for number, clip in enumerate(clips):
            alone = put([clip], sized, rows, bench.device)
            text = text_MD[number * rows : (number + 1) * rows]
            some = tokens_LP[start : start + alone.tokens]
            parts.append(training.model(some, alone.positions_L3, t_S[number : number + 1], text, alone.layout))
            start += alone.tokens
    bench.record("packed against one clip at a time", distance(packed, torch.cat(parts)), "relative",
                 f"{sized.name}, 2 blocks, clips of 240, 1, 144 and 400 tokens, bf16", at_most=2e-2)  # fmt: skip
    if bench.compiler is None:
        return
    out = [training.model(tokens_LP, pack.positions_L3, t_S, text_MD, pack.layout)]
    out[0].square().sum().backward()
    eager = [weight.grad for weight in training.weights]
    model = copy.deepcopy(training.model).requires_grad_()
    model.zero_grad()
    began, before = time.perf_counter(), num_graphs(bench)
    compiled(bench, model)
    out.append(model(tokens_LP, pack.positions_L3, t_S, text_MD, pack.layout))
    out[1].square().sum().backward()
    record_compilation(bench, sized, began, before)
    pairs = [(weight.grad, grad) for weight, grad in zip(model.parameters(), eager, strict=True) if grad is not None]
    norms = torch.stack([torch.stack([(a.float() - b.float()).norm(), b.float().norm()]) for a, b in pairs])
    total = norms.square().sum(0).sqrt()
    bench.record("compiled against eager, values", distance(out[1].detach(), out[0].detach()), "relative",
                 f"{sized.name}, 2 blocks, bf16", at_most=2e-2)  # fmt: skip
    bench.record("compiled against eager, gradients", float(total[0] / total[1]), "relative",
                 f"{sized.name}, 2 blocks, bf16, all parameters together", at_most=5e-2)  # fmt: skip


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, in norm; infinite where a value is not finite."""
    found = float((a.float() - b.float()).norm() / b.float().norm())
    return found if found == found else float("inf")
