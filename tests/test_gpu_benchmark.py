"""The benchmark of one CUDA device runs whole on a CPU, in little; what it measures with is right."""

import csv
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no package that is installed

from benchmarks import gpu_blocks, gpu_packs, gpu_training  # noqa: E402
from benchmarks.figure import Figure  # noqa: E402
from benchmarks.gpu import smaller  # noqa: E402
from benchmarks.gpu_packs import Bench, clip_near, equal_packs, grid_of, mixed_packs  # noqa: E402
from sora_train.cost.flops import peak_flops, step_flops  # noqa: E402

WAN = smaller(gpu_training.WAN_1_3B, 1024)


class Known(Bench):
    """A CPU that passes for a device whose peak is known."""

    @property
    def peak(self) -> float:
        return peak_flops("NVIDIA H200")


def bench_of(kind: type[Bench] = Bench, **settings) -> tuple[Bench, list[Figure]]:
    found: list[Figure] = []
    return kind(torch.device("cpu"), None, found.append, scale=1024, repeats=1, **settings), found


def test_packs_are_different_and_of_the_length_they_are_called() -> None:
    bench, _ = bench_of()
    assert bench.packings >= 50
    for length, low, high, clips in (("8k", 7_400, 8_600, 2), ("32-37k", 32_000, 37_000, 1)):
        bench.scale = 1
        packs = gpu_training.packs_of(bench, length)
        assert len({tuple(pack) for pack in packs}) == len(packs) == bench.packings + 3
        assert all(low <= math.prod(clip) <= high for pack in packs for clip in pack)
        assert {len(pack) for pack in packs} == {clips}
    assert clip_near(10, 12, random.Random(0))
    assert equal_packs(3, 7, 8, 16, seed=1) == equal_packs(3, 7, 8, 16, seed=1)
    with pytest.raises(ValueError, match="50 different packs of clips of 7 to 8 tokens: there are"):
        equal_packs(50, 7, 8, 8, seed=1)


def test_the_web_mix_has_the_tokens_of_its_own_table() -> None:
    folder = ROOT / "benchmarks" / "workloads"
    with (folder / "web_mix.csv").open() as sizes, (folder / "web_mix_tokens.csv").open() as tokens:
        for size, expected in zip(csv.DictReader(sizes), csv.DictReader(tokens), strict=True):
            assert math.prod(grid_of(size, 1)) == int(expected["tokens_480p_10s"]), size
    packs = mixed_packs(50, 32_768, 1, seed=1)
    assert max(sum(map(math.prod, pack)) for pack in packs) <= 32_768
    assert any(clip[0] == 1 for pack in packs for clip in pack), "images among them"
    assert len({len(pack) for pack in packs}) > 3


def test_padding_is_to_the_largest_of_a_batch() -> None:
    clips = [(2, 3, 3), (1, 6, 2), (4, 1, 1), (9, 9, 9)]
    batches = gpu_blocks.padded_batches(clips, limit=72)
    assert batches == [clips[:2], [clips[2]], [clips[3]]]  # 2 x 6 x 3 twice is 72; three would be 4 x 6 x 3 each
    assert gpu_blocks.padded(batches[0]) == (2, 6, 3)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2>", "matrix products"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1", "attention"),
        ("triton_poi_fused__to_copy_add_mul_native_layer_norm_3", "the rest"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "the rest"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel: str, kind: str) -> None:
    assert gpu_blocks.kind_of(kernel) == kind


def test_mfu_is_useful_flops_over_the_peak_of_a_known_device_and_nothing_of_another(monkeypatch) -> None:
    assert gpu_training.MIN_PACKINGS >= 50
    monkeypatch.setattr(gpu_training, "MIN_PACKINGS", 10)
    # Half a second for each four packs that are timed.
    monkeypatch.setattr(Bench, "seconds", lambda self, work: work() or 0.5)
    mode = gpu_training.modes(bench_of()[0])[0]
    grids = equal_packs(13, 20, 40, 64, seed=2)
    lengths = [math.prod(clip) for clips in grids[3:] for clip in clips]
    flops = sum(step_flops(WAN, length, 1) for length in lengths)  # what warms up is not counted
    for kind in (Known, Bench):
        bench, (figures) = bench_of(kind)
        rate = gpu_training.run(bench, WAN, mode, grids, "MFU", bar=0.57)
        (figure,) = figures
        assert "; 10 packings of " in figure.conditions
        assert f"; {sum(lengths) / 1.5:.4g} tokens/s, {flops / 1.5 / 1e12:.4g} TFLOP/s;" in figure.conditions
        if kind is Known:
            assert figure.value == rate == pytest.approx(flops / 1.5 / 989e12)
            assert (figure.bar, figure.holds) == (">= 0.57", False)
        else:
            assert (figure.value, figure.holds) == (0, None)
            assert rate == pytest.approx(flops / 1.5)
    bench, (figures) = bench_of(Known, deadline=time.perf_counter())
    gpu_training.run(bench, WAN, mode, grids, "MFU", bar=0.57)
    assert figures[0].holds is None, "time ran out before so many packings"
    assert "; 4 packings of" in figures[0].conditions


def test_what_fails_is_a_figure_and_the_rest_goes_on(capsys) -> None:
    bench, figures = bench_of()
    with bench.attempt("a part"):
        raise RuntimeError("no kernel for this\nand more")
    (figure,) = figures
    assert (figure.name, figure.value, figure.holds) == ("a part: runs", 0, False)
    assert figure.conditions.startswith("RuntimeError: no kernel for this; cpu")
    assert "no kernel for this" in capsys.readouterr().err
    bench.record("a check", math.inf, "relative", "values that are not finite", at_most=0.1)
    assert (figures[-1].holds, figures[-1].value) == (False, 1e30)


def test_a_stock_block_computes_what_ours_does() -> None:
    """The same weights, the same packs: the comparison is of one mathematics."""
    bench, _ = bench_of(dtype=torch.float32)
    pack = gpu_packs.put([(2, 3, 2), (1, 1, 1), (1, 4, 4)], WAN, 3, bench.device)
    mode = gpu_training.Mode(gpu_training.Checkpointing.none, False, gpu_training.Precision.fp32)
    training = gpu_training.Training(bench, WAN, mode, gpu_training.largest_of([pack]))
    block = training.model.blocks[0]
    stock = gpu_blocks.StockBlock(WAN)
    linears = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out]
    linears += [block.attn2.to_q, block.attn2.to_k, block.attn2.to_v, block.attn2.to_out]
    pairs = list(zip(stock.linears, linears, strict=True))
    pairs += [(stock.up, block.ffn.up), (stock.down, block.ffn.down), (stock.norms[1], block.norm2)]
    qk_norms = (block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q, block.attn2.norm_k)
    pairs += list(zip(stock.qk_norms, qk_norms, strict=True))
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    stock.table.data.copy_(block.scale_shift_table)
    tokens, text, modulation, turned = gpu_blocks.block_inputs(pack, WAN, bench)
    layout, rope = pack.layout, torch.stack([turned.real, turned.imag])
    lengths = max(layout.lengths), max(layout.text_lengths)
    got = stock(tokens, text, modulation, layout.sample_L, rope, layout.cu_seqlens, layout.cu_text, *lengths)
    expected = block(tokens, text, modulation, layout.sample_L, turned, layout)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_whole_benchmark_runs_on_a_cpu(tmp_path) -> None:
    out, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--scale", "1024", "--no-compile"]
    command += ["--repeats", "1", "--packings", "4", "--json", str(out), "--table", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    figures = json.loads(out.read_text())
    assert all(set(figure) == {"name", "value", "unit", "bar", "holds", "conditions"} for figure in figures)
    assert len(table.read_text().splitlines()) == len(figures) + 2
    by_name = {figure["name"]: figure for figure in figures}
    assert len(by_name) == len(figures)
    assert not [name for name in by_name if name.endswith(": runs")], "a part that failed"
    for model in ("Wan 1.3B", "7B class"):
        for length in ("8k", "32-37k"):
            figure = by_name[f"{model}, {length}-token clips: MFU"]
            assert (figure["value"], figure["holds"]) == (0, None), "the peak of a CPU is not known"
    for core in ("sdpa", "masked"):
        assert by_name[f"core {core}, self-attention: distance from float64"]["holds"]
    assert by_name["packed against one clip at a time"]["holds"]
    assert {"Wan 1.3B: packed against padded", "copy within the device"} <= set(by_name)
    assert "Wan 1.3B: QK-norm and RoPE in real numbers, eager" in by_name
    assert any(name.startswith("Wan 1.3B: our blocks against stock ones") for name in by_name)
    assert any(name.startswith("attention sdpa, one clip") for name in by_name)
