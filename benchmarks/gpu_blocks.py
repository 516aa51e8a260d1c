"""Blocks on one device: against a block written as one would with torch's own pieces, against padding, and where the
time goes."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_packs import Bench, Grid, PackOnDevice, mixed_packs, put
from benchmarks.gpu_training import Mode, Training, largest_of, randomize
from sora_train.config.model import ModelConfig
from sora_train.config.parallel import Checkpointing
from sora_train.models.attention_cores import sdpa_per_document
from sora_train.models.layers import Float32LayerNorm, per_token
from sora_train.models.pack_layout import PackLayout
from sora_train.models.rope import rotate, rotation
from sora_train.models.video_dit import call_block

DEPTH = 4
STOCK_BAR, PADDED_BAR, REST_BAR = 1.5, 3.0, 0.10


class StockBlock(nn.Module):
    """A Wan block as one writes it over `varlen_attn`, to be compiled whole: the same mathematics as ours."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, config.eps, is_affine) for is_affine in (False, True, False))
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(8))  # q, k, v, out of each attention
        self.qk_norms = nn.ModuleList(nn.RMSNorm(width, config.eps) for _ in range(4))
        self.up, self.down = nn.Linear(width, config.mlp_width), nn.Linear(config.mlp_width, width)
        self.table = nn.Parameter(torch.zeros(1, 6, width))

    def forward(
        self, x: Tensor, text: Tensor, modulation: Tensor, sample: Tensor, rope: Tensor, cu: Tensor, cu_text: Tensor,
        longest: int, longest_text: int,
    ) -> Tensor:  # fmt: skip
        """`rope`: cosines and sines [2, L, 1, K/2]."""
        shift, scale, gate, shift2, scale2, gate2 = (self.table + modulation)[sample].unbind(1)
        h = (self.norms[0](x.float()) * (1 + scale) + shift).to(x.dtype)
        x = (x + self.attend(0, h, h, rope, cu, cu, longest, longest) * gate).to(x.dtype)
        h = F.layer_norm(
            x.float(), x.shape[-1:], self.norms[1].weight.float(), self.norms[1].bias.float(), self.norms[1].eps
        ).to(x.dtype)
        x = x + self.attend(1, h, text, None, cu, cu_text, longest, longest_text)
        h = (self.norms[2](x.float()) * (1 + scale2) + shift2).to(x.dtype)
        return (x + self.down(F.gelu(self.up(h), approximate="tanh")) * gate2).to(x.dtype)

    def attend(
        self, which: int, rows: Tensor, source: Tensor, rope: Tensor | None, cu: Tensor, cu_keys: Tensor, longest: int,
        longest_keys: int,
    ) -> Tensor:  # fmt: skip
        """Self- (0) or cross-attention (1)."""
        to_q, to_k, to_v, to_out = self.linears[4 * which : 4 * which + 4]
        query = self.qk_norms[2 * which](to_q(rows)).unflatten(-1, (self.heads, -1))
        key = self.qk_norms[2 * which + 1](to_k(source)).unflatten(-1, (self.heads, -1))
        value = to_v(source).unflatten(-1, (self.heads, -1))
        if rope is not None:
            query, key = turn(query, rope), turn(key, rope)
        return to_out(stock_attention(query, key, value, cu, cu_keys, longest, longest_keys).flatten(-2))


def turn(heads: Tensor, rope: Tensor) -> Tensor:
    """RoPE on neighbouring channels, in real numbers."""
    even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * rope[0] - odd * rope[1], even * rope[1] + odd * rope[0]], -1).flatten(-2).type_as(heads)


def stock_attention(
    query: Tensor, key: Tensor, value: Tensor, cu: Tensor, cu_keys: Tensor, longest: int, longest_keys: int
) -> Tensor:
    """torch's `varlen_attn`; off CUDA, where it has no kernel, one SDPA a document."""
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(query, key, value, cu, cu_keys, longest, longest_keys)  # type: ignore[return-value]
    lengths, key_lengths = cu.diff().tolist(), cu_keys.diff().tolist()
    layout = PackLayout.build(lengths, key_lengths, query.device)
    return sdpa_per_document(query, key, value, layout, True)


def against_stock(bench: Bench, config: ModelConfig) -> None:
    """Forward and backward of a few blocks over packs of the web mix: ours compiled, the stock ones compiled whole.

    Every pack is run twice and the second time counts: whoever compiles anew for it has done so.
    """
    sized = replace(config, depth=min(DEPTH, config.depth))
    packs = mixed(bench, sized)
    training = Training(bench, sized, Mode(Checkpointing.none, bench.compiler is not None), largest_of(packs))
    with bench.device:
        stock = randomize(nn.ModuleList(StockBlock(sized) for _ in range(sized.depth))).to(bench.dtype)
    stock_block = torch.compile(call_block, backend=bench.compiler) if bench.compiler else call_block
    ours, theirs = [], []
    for _ in range(2):
        ours, theirs = [], []
        for pack in packs:
            inputs = block_inputs(pack, sized, bench)
            ours.append(bench.seconds(functools.partial(run_ours, training, pack, inputs)))
            rope = torch.stack([inputs[3].real, inputs[3].imag])
            layout = pack.layout
            arguments = (
                stock_block, stock, *inputs[:3], layout.sample_L, rope, layout.cu_seqlens, layout.cu_text,
                max(layout.lengths), max(layout.text_lengths),
            )  # fmt: skip
            theirs.append(bench.seconds(functools.partial(run_stock, *arguments)))
    tokens = sum(pack.tokens for pack in packs)
    how = "both compiled" if bench.compiler else "NEITHER COMPILED"
    kernel = "varlen_attn" if bench.is_cuda else "SDPA a document, for want of varlen_attn"
    bench.record(
        f"{config.name}: our blocks against stock ones on {kernel}", sum(theirs) / sum(ours), "times as fast",
        f"{sized.depth} blocks of width {sized.width}, {how}, forward and backward, {len(packs)} packs of the web mix; "
        f"{tokens / sum(ours):.4g} against {tokens / sum(theirs):.4g} tokens/s", at_least=bench.bar(STOCK_BAR),
    )  # fmt: skip


def mixed(bench: Bench, config: ModelConfig) -> list[PackOnDevice]:
    """A few packs of the web mix."""
    grids = mixed_packs(min(12, bench.packings), 32_768 // bench.scale, bench.scale, seed=11)
    return [put(clips, config, bench.text_rows, bench.device) for clips in grids]


def block_inputs(pack: PackOnDevice, config: ModelConfig, bench: Bench) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, text, modulation and rotation as blocks get them, the first three with gradients."""
    def rows(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, device=bench.device, dtype=dtype).requires_grad_()

    return (
        rows(pack.tokens, config.width, dtype=bench.dtype),
        rows(pack.text_rows, config.width, dtype=bench.dtype),
        rows(pack.layout.num_samples, 6, config.width, dtype=torch.float32),
        rotation(pack.positions_L3, config.width // config.heads, config.rope_theta),
    )


def run_ours(training: Training, pack: PackOnDevice, inputs: tuple[Tensor, ...]) -> None:
    """All blocks, forward and backward."""
    tokens_LD, text_MD, modulation_R6D, turned = inputs
    out = tokens_LD
    for block in training.model.blocks:
        out = training.model.run_block(block, out, text_MD, modulation_R6D, pack.layout.sample_L, turned, pack.layout)
    out.backward(torch.ones_like(out))


def run_stock(call: Callable[..., Tensor], blocks: nn.ModuleList, tokens: Tensor, *others: Any) -> None:
    """All blocks, forward and backward."""
    for block in blocks:
        tokens = call(block, tokens, *others)
    tokens.backward(torch.ones_like(tokens))


# --- padding


def padded_batches(clips: Sequence[Grid], limit: int) -> list[list[Grid]]:
    """Clips in their order, in batches of at most `limit` tokens when each is padded to the largest time, height and
    width of its batch; one clip is always a batch."""
    batches: list[list[Grid]] = []
    for clip in clips:
        if batches and math.prod(padded(larger := [*batches[-1], clip])) * len(larger) <= limit:
            batches[-1].append(clip)
        else:
            batches.append([clip])
    return batches


def padded(clips: Sequence[Grid]) -> Grid:
    """The size that all of them fit in."""
    time, height, width = (max(sizes) for sizes in zip(*clips, strict=True))
    return time, height, width


def against_padding(bench: Bench, config: ModelConfig) -> None:
    """Tokens that are not padding, a second, forward and backward: ours packed and compiled; padded batches, eager."""
    sized = replace(config, depth=min(DEPTH, config.depth))
    limit = 40_960 // bench.scale
    grids = mixed_packs(min(8, bench.packings), 32_768 // bench.scale, bench.scale, seed=12)
    packs = [put(clips, sized, bench.text_rows, bench.device) for clips in grids]
    training = Training(bench, sized, Mode(Checkpointing.none, bench.compiler is not None), largest_of(packs))
    tokens = sum(pack.tokens for pack in packs)

    def ours() -> None:
        for pack in packs:
            training.loss(pack).backward()
            training.model.zero_grad()

    ours()
    rate = tokens / bench.seconds(ours)
    whose, run = padded_model(bench, sized)
    batches = [batch for clips in grids for batch in padded_batches(clips, limit)]

    def theirs() -> None:
        for batch in batches:
            run(batch)

    theirs()
    padded_rate = tokens / bench.seconds(theirs)
    share = tokens / sum(math.prod(padded(batch)) * len(batch) for batch in batches)
    bench.record(
        f"{config.name}: packed against padded", rate / padded_rate, "times the real tokens/s",
        f"{sized.depth} blocks, {len(packs)} packs of the web mix, {rate:.4g} tokens/s packed; {whose}, eager, "
        f"{len(batches)} batches of up to {limit} padded tokens, {share:.2g} of them real: {padded_rate:.4g} tokens/s",
        at_least=bench.bar(PADDED_BAR),
    )  # fmt: skip


def padded_model(bench: Bench, config: ModelConfig) -> tuple[str, Callable[[list[Grid]], None]]:
    """What runs a padded batch forward and backward, and whose it is: diffusers' where it is installed."""
    if find_spec("diffusers"):
        from diffusers import WanTransformer3DModel

        with bench.device:
            theirs = WanTransformer3DModel(
                num_attention_heads=config.heads, attention_head_dim=config.width // config.heads,
                ffn_dim=config.mlp_width, num_layers=config.depth, text_dim=config.text.width,
            )  # fmt: skip
        randomize(theirs).to(bench.dtype)

        def run(clips: list[Grid]) -> None:
            frames, height, width = padded(clips)
            latents = torch.randn(
                len(clips), config.in_channels, frames, 2 * height, 2 * width, device=bench.device, dtype=bench.dtype
            )
            text = torch.randn(len(clips), bench.text_rows, config.text.width, device=bench.device, dtype=bench.dtype)
            t = torch.rand(len(clips), device=bench.device) * 1000
            (out,) = theirs(latents, t, text, return_dict=False)
            (out.float() - torch.randn_like(out, dtype=torch.float32)).square().mean().backward()
            theirs.zero_grad()

        return "diffusers' WanTransformer3DModel", run
    one = put([(1, 1, 1)], config, 1, bench.device)
    training = Training(bench, config, Mode(Checkpointing.none, False), largest_of([one]))
    for block in training.model.blocks:
        block.attn1.core = block.attn2.core = sdpa_per_document

    def run_ours_padded(clips: list[Grid]) -> None:
        pack = put([padded(clips)] * len(clips), config, bench.text_rows, bench.device)
        training.loss(pack).backward()
        training.model.zero_grad()

    return "our own model on padded clips, diffusers not being installed", run_ours_padded


# --- where the time goes


# In names of kernels, in this order: cuDNN's and flash's attention kernels are named after CUTLASS too.
WORDS = {
    "attention": ("flash", "fmha", "attention", "attn", "sdpa"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitk", "aten::mm", "addmm", "::bmm"),
}


def kind_of(kernel: str) -> str:
    """Of a kernel (or on a CPU, of an operation): attention, a matrix product, or the rest."""
    name = kernel.lower()
    return next((kind for kind, words in WORDS.items() if any(word in name for word in words)), "the rest")


def time_by_kind(bench: Bench, work: Callable[[], object]) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Seconds of kernels by kind, and of each kernel of the rest, the longest first."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_cuda else [])]
    with profile(activities=activities) as found:
        work()
        if bench.is_cuda:
            torch.cuda.synchronize(bench.device)
    kinds, rest = dict.fromkeys(("matrix products", "attention", "the rest"), 0.0), dict[str, float]()
    for event in found.key_averages():
        # What compiled code calls its regions is no kernel, and holds the time of those in it.
        if event.is_user_annotation or (bench.is_cuda and event.device_type != DeviceType.CUDA):
            continue
        seconds = (event.self_device_time_total if bench.is_cuda else event.self_cpu_time_total) / 1e6
        kinds[kind_of(event.key)] += seconds
        if kind_of(event.key) == "the rest":
            rest[event.key] = rest.get(event.key, 0.0) + seconds
    return kinds, sorted(rest.items(), key=lambda item: -item[1])


def shares(bench: Bench, config: ModelConfig, length: str, grids: Sequence[Sequence[Grid]]) -> None:
    """Of a block's time, forward and backward: matrix products, attention, the rest."""
    sized = replace(config, depth=min(2, config.depth))
    packs = [put(clips, sized, bench.text_rows, bench.device) for clips in grids]
    for is_compiled in (True, False) if bench.compiler else (False,):
        training = Training(bench, sized, Mode(Checkpointing.none, is_compiled), largest_of(packs))
        some = [(pack, block_inputs(pack, sized, bench)) for pack in packs]
        for pack, inputs in some:
            run_ours(training, pack, inputs)

        def work(training: Training = training, some: Any = some) -> None:
            for pack, inputs in some:
                run_ours(training, pack, inputs)

        kinds, rest = time_by_kind(bench, work)
        total = sum(kinds.values())
        how = "compiled" if is_compiled else "eager"
        longest = ", ".join(f"{name[:60]} {seconds / total:.1%}" for name, seconds in rest[:4])
        bench.record(
            f"{config.name}, {length}-token clips: time of a block that is no matrix product, {how}",
            kinds["the rest"] / total, "of kernel time",
            f"{', '.join(f'{name} {seconds / total:.1%}' for name, seconds in kinds.items())}; of the rest: {longest}",
            at_most=bench.bar(REST_BAR) if is_compiled else None,
        )  # fmt: skip


# --- the pieces between matrix products


def pieces(bench: Bench, config: ModelConfig) -> None:
    """Norm and modulation, and QK-norm and RoPE: eager, compiled, and the least that memory allows."""
    length, width, heads = 32_768 // bench.scale, config.width, config.heads
    draw = functools.partial(torch.randn, device=bench.device)
    x = draw(length, width, dtype=bench.dtype).requires_grad_()
    grad = draw(length, width, dtype=bench.dtype)
    shift_RD, scale_RD = draw(4, width).requires_grad_(), draw(4, width).requires_grad_()
    row_L = torch.randint(4, (length,), device=bench.device).sort().values
    turned = rotation(torch.randint(0, 60, (length, 3), device=bench.device), width // heads, config.rope_theta)
    with bench.device:
        norm = Float32LayerNorm(width, config.eps, elementwise_affine=False)
        rms = nn.RMSNorm(width, eps=config.eps).to(bench.dtype)

    def modulate(x: Tensor) -> Tensor:
        return torch.addcmul(per_token(shift_RD, row_L), norm(x), per_token(1 + scale_RD, row_L)).to(x.dtype)

    def norm_and_turn(x: Tensor) -> Tensor:
        return rotate(rms(x).unflatten(-1, (heads, -1)), turned).flatten(-2)

    rope = torch.stack([turned.real, turned.imag])

    def norm_and_turn_in_reals(x: Tensor) -> Tensor:
        # Inductor leaves complex products to torch's own kernels, and fuses these.
        return turn(rms(x).unflatten(-1, (heads, -1)), rope).flatten(-2)

    source = torch.randn(2**28 // bench.scale, device=bench.device, dtype=bench.dtype)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / bench.median_seconds(lambda: target.copy_(source))
    bench.record("copy within the device", bandwidth / 1e12, "TB/s", "bytes read and written")
    # x in and y out; then x and its gradient's source in, the gradient out.
    least = 5 * length * width * x.element_size() / bandwidth

    def both(function: Callable[[Tensor], Tensor]) -> None:
        function(x).backward(grad)
        x.grad = None

    functions = {
        "norm and modulation": modulate,
        "QK-norm and RoPE": norm_and_turn,
        "QK-norm and RoPE in real numbers": norm_and_turn_in_reals,
    }
    for name, function in functions.items():
        runs = {"eager": function}
        if bench.compiler:
            runs["compiled"] = torch.compile(function, dynamic=True, backend=bench.compiler)
        for how, run in runs.items():
            with bench.attempt(f"{name}, {how}"):
                seconds = bench.median_seconds(functools.partial(both, run))
                bench.record(
                    f"{config.name}: {name}, {how}", seconds * 1e3, "ms",
                    f"{length} x {width}, forward and backward; {seconds / least:.3g} times what a copy of the same "
                    "bytes takes",
                )  # fmt: skip
