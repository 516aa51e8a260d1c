"""Every figure of one CUDA device in one table: are its kernels right, and how much of its peak does training use?

    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1
    python benchmarks/gpu.py --parts check,attention,blocks,wan
    python benchmarks/gpu.py --parts 7b

Each part has a share of --seconds (530 by default) and writes its figures as soon as it has them: what a time limit
cuts off is lost, nothing else. Without --parts all run in one command, and the last may end before 50 packings; two
commands, as above, give each training figure its 50 packings also on a device with much memory. On a CPU it runs with
small sizes, to be tested: `--device cpu --scale 1024 --no-compile`.

It needs torch, triton, numpy and omegaconf, neither DeepSpeed nor a data set; torchao adds fp8, diffusers the padded
model it is compared with (without it, our own is padded, and the figure says so). Where nothing can be installed from
outside, wheels can be brought; these are pure Python (torchao too, but for kernels that are not used here):

    pip wheel --no-deps -w wheels omegaconf==2.3.1 antlr4-python3-runtime==4.9.3 diffusers==0.42.1 importlib_metadata
    pip download --no-deps --only-binary=:all: --platform any -d wheels torchao==0.18.0
    python -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site      # there

The first session on a device, in this order:
 1. `python -m pytest tests/models -m gpu -rs`                          what fails is not worth timing
 2. `python benchmarks/gpu.py --parts check,attention,blocks`           kernels; a glance at what compiles
 3. `python benchmarks/gpu.py --parts wan`, then `--parts 7b`           MFU; --depth bounds the blocks of 7b

MFU counts useful FLOPs (cost/flops.py: nothing padded, nothing computed again) over the dense bf16 peak of the device
as torch names it, for fp8 too; it is 0 where the peak is not known.
"""

import argparse
import functools
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # run as a file, not as a module
    sys.path.insert(0, str(ROOT))

from benchmarks import gpu_attention, gpu_blocks, gpu_training  # noqa: E402
from benchmarks.figure import Figure, print_table, write_json  # noqa: E402
from benchmarks.gpu_packs import Bench, CountingBackend  # noqa: E402
from sora_train.config.model import ModelConfig  # noqa: E402

# Shares of the time: of 530 seconds, 25, 65, 130, 140 and 170.
SHARES = {"check": 5.0, "attention": 13.0, "blocks": 26.0, "wan": 28.0, "7b": 34.0}


def parts_of(bench: Bench, wan: ModelConfig, large: ModelConfig, depth: int) -> dict[str, Callable[[], None]]:
    """By name, in the order in which they run."""

    def check() -> None:
        gpu_attention.check(bench)
        with bench.attempt("packed against one clip at a time"):
            gpu_training.check(bench, wan)

    def attention() -> None:
        for config in (large, wan):
            gpu_attention.speed(bench, config.heads)

    def blocks() -> None:
        todo: list[tuple[str, Callable[[], None]]] = [
            (f"{wan.name}: {measure.__name__}", functools.partial(measure, bench, wan))
            for measure in (gpu_blocks.against_stock, gpu_blocks.against_padding, gpu_blocks.pieces)
        ]
        for config, length in itertools.product((wan, large), gpu_training.BARS):
            packs = gpu_training.packs_of(bench, length)[:3]
            measure = functools.partial(gpu_blocks.shares, bench, config, length, packs)
            todo.append((f"{config.name}, {length}-token clips: shares of time", measure))
        for title, measure in todo:
            if bench.seconds_left < 0:
                print(f"  {title}: not measured, no time is left", flush=True)
                continue
            with bench.attempt(title):
                measure()

    def training(config: ModelConfig, max_depth: int) -> None:
        torch.compiler.reset()  # it gives up on code that it has compiled in eight forms
        end, tried = bench.deadline, gpu_training.modes(bench)
        for number, length in enumerate(gpu_training.BARS):
            # Longer clips take about twice as long for as many packings.
            bench.deadline = end if number else time.perf_counter() + bench.seconds_left / 3
            gpu_training.measure(bench, config, length, max_depth, tried)

    return {
        "check": check,
        "attention": attention,
        "blocks": blocks,
        "wan": lambda: training(wan, 0),
        "7b": lambda: training(large, depth),
    }


def write_table(figures: list[Figure], path: Path) -> None:
    """Markdown, as a page to read."""
    lines = ["| figure | value | bar | | conditions |", "| --- | --- | --- | --- | --- |"]
    for figure in figures:
        verdict = {True: "holds", False: "**misses**", None: ""}[figure.holds]
        conditions = figure.conditions.replace("|", "\\|")
        lines.append(f"| {figure.name} | {figure.value:.4g} {figure.unit} | {figure.bar} | {verdict} | {conditions} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Prints figures as they come; leaves with 1 when one misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/gpu-DEVICE-DATE.json")
    parser.add_argument("--table", type=Path, help="default: beside it, as Markdown")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", default=",".join(SHARES), help="which, separated by commas")
    parser.add_argument("--seconds", type=float, default=530, help="for all parts together")
    parser.add_argument("--packings", type=int, default=52, help="different packs that MFU is measured on")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--depth", type=int, default=0, help="most blocks of the 7B class; 0: as many as fit")
    parser.add_argument("--scale", type=int, default=1, help="divides tokens and widths; for tests")
    parser.add_argument("--no-compile", action="store_true", help="eager alone")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := set(names) - set(SHARES):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: the parts are {', '.join(SHARES)}")

    figures: list[Figure] = []
    bench = Bench(
        device=torch.device(arguments.device),
        compiler=None if arguments.no_compile else CountingBackend(arguments.backend),
        write=lambda figure: None,
        scale=arguments.scale,
        repeats=arguments.repeats,
        packings=arguments.packings,
        notes=[f"CUDA {torch.version.cuda}", date.today().isoformat()],
    )
    slug = re.sub(r"[^a-z0-9]+", "-", bench.device_name.lower()).strip("-")
    path = arguments.json or ROOT / "benchmarks" / "results" / f"gpu-{slug}-{date.today().isoformat()}.json"
    table = arguments.table or path.with_suffix(".md")

    def write(figure: Figure) -> None:
        figures.append(figure)
        print(json.dumps(asdict(figure)), flush=True)
        write_json(figures, path)
        write_table(figures, table)

    bench.write = write
    wan, large = (smaller(config, arguments.scale) for config in (gpu_training.WAN_1_3B, gpu_training.CLASS_7B))
    parts = parts_of(bench, wan, large, arguments.depth or (2 if arguments.scale > 1 else 0))
    shares, began = sum(SHARES[name] for name in names), time.perf_counter()
    spent = 0.0
    for name in SHARES:
        if name in names:
            spent += SHARES[name] / shares * arguments.seconds
            bench.deadline = began + spent  # what an earlier part left over is this one's
            print(f"\n{name}, until second {spent:.0f}", flush=True)
            with bench.attempt(name):
                parts[name]()
            print(f"{name} ended at second {time.perf_counter() - began:.0f}", flush=True)
    print_table(figures)
    raise SystemExit(any(figure.holds is False for figure in figures))


def smaller(config: ModelConfig, scale: int) -> ModelConfig:
    """The same model in little, for a device that is none."""
    if scale == 1:
        return config
    return replace(
        config, width=config.width // 16, heads=config.heads // 4, depth=2, mlp_width=config.mlp_width // 16,
        frequency_width=32, text=replace(config.text, width=32),
    )  # fmt: skip


if __name__ == "__main__":
    main()
