"""Packs to measure on: which clips, how long, and the tensors a model takes; and the clock that measures them."""

import csv
import gc
import math
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend

from benchmarks.figure import Figure
from sora_train.config.model import ModelConfig
from sora_train.cost.flops import peak_flops, step_flops
from sora_train.models.pack_layout import PackLayout

WEB_MIX = Path(__file__).parent / "workloads" / "web_mix.csv"
Grid = tuple[int, int, int]  # tokens of a clip along time, height and width
ASPECTS = (9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9)


class CountingBackend:
    """A compiler that counts the graphs it is given; one for all, since each gets compiled code of its own."""

    def __init__(self, name: str) -> None:
        self._compile: Callable[..., Any] = lookup_backend(name)
        self.graphs = 0

    def __call__(self, graph: Any, examples: Any) -> Any:
        """As torch.compile asks it to."""
        self.graphs += 1
        return self._compile(graph, examples)


@dataclass
class Bench:
    """What every part is given: where it runs, when it must end, and where its figures go."""

    device: torch.device
    compiler: "CountingBackend | None"  # None: nothing is compiled
    write: Callable[[Figure], None]
    scale: int = 1  # lengths of clips and packs are divided by it
    repeats: int = 7
    packings: int = 52
    deadline: float = math.inf  # of the part that runs, on time.perf_counter
    notes: list[str] = field(default_factory=list)  # said in the conditions of every figure
    dtype: torch.dtype = torch.bfloat16

    @property
    def is_cuda(self) -> bool:
        """Whether there is a device to wait for, and memory of its own."""
        return self.device.type == "cuda"

    @property
    def device_name(self) -> str:
        """As torch names it."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu"

    @property
    def peak(self) -> float:
        """Dense bf16 FLOPs a second; 0 when it is not known."""
        return peak_flops(self.device_name)

    @property
    def text_rows(self) -> int:
        """Of a clip: Wan pads texts to 512."""
        return max(1, 512 // self.scale)

    @property
    def seconds_left(self) -> float:
        """Of the part that runs."""
        return self.deadline - time.perf_counter()

    def bar(self, value: float) -> float | None:
        """What a CUDA device is held to; a CPU is not."""
        return value if self.is_cuda else None

    def record(
        self,
        name: str,
        value: float,
        unit: str,
        conditions: str,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """One figure, written at once."""
        bar = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}" if at_most is not None else ""
        holds = value >= at_least if at_least is not None else value <= at_most if at_most is not None else None
        if not math.isfinite(value):
            value, conditions = 1e30, f"not finite; {conditions}"
        place = f"{self.device_name}, torch {torch.__version__}, {str(self.dtype).removeprefix('torch.')}"
        self.write(Figure(name, value, unit, bar, holds, "; ".join([conditions, place, *self.notes])))

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails in here is told, and becomes a figure that misses its bar; what comes after it goes on."""
        try:
            yield
        except Exception as error:  # whatever it is: the device is at hand for minutes
            traceback.print_exc()
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            self.record(f"{name}: runs", 0, "", f"{type(error).__name__}: {reason}"[:300], at_least=1)
        self.reset_peak()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call: between events on the device's stream, or on a CPU by the clock."""
        if not self.is_cuda:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def median_seconds(self, work: Callable[[], object]) -> float:
        """Of `repeats` calls, after two that are not counted."""
        for _ in range(2):
            work()
        times = sorted(self.seconds(work) for _ in range(self.repeats))
        return times[len(times) // 2]

    def reset_peak(self) -> None:
        """Gives back what is cached and forgets the most that was held."""
        gc.collect()  # compiled blocks hold themselves
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak_gib(self) -> float:
        """The most that was held since `reset_peak`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.is_cuda else 0.0


def clip_near(low: int, high: int, draw: random.Random) -> Grid:
    """A clip of `low` to `high` tokens, of any aspect, with more or fewer frames."""
    while True:
        area = high / draw.uniform(2, 30)
        rows = max(1, round(math.sqrt(area / draw.choice(ASPECTS))))
        columns = max(1, round(area / rows))
        frames = draw.randint(low, high) // (rows * columns)
        if frames and low <= frames * rows * columns <= high:
            return frames, rows, columns


def equal_packs(count: int, low: int, high: int, limit: int, seed: int) -> list[list[Grid]]:
    """Different packs of clips of about the same length, as many as fit in `limit` tokens.

    Raises ValueError when there are hardly so many.
    """
    draw, found = random.Random(seed), dict[tuple[Grid, ...], None]()
    for _ in range(100 * count):
        if len(found) == count:
            break
        clips: list[Grid] = []
        while True:
            clip = clip_near(low, high, draw)
            if sum(map(math.prod, clips)) + math.prod(clip) > limit:
                break
            clips.append(clip)
        found[tuple(clips)] = None
    if len(found) < count:
        raise ValueError(f"{count} different packs of clips of {low} to {high} tokens: there are {len(found)}")
    return [list(clips) for clips in found]


def mixed_packs(count: int, limit: int, scale: int, seed: int) -> list[list[Grid]]:
    """Different packs drawn from the web mix at up to 480 x 854 pixels and 10 s (see workloads/README.md): images and
    clips of all lengths together. Frames, rows and columns are divided so that tokens shrink by `scale`."""
    with WEB_MIX.open() as file:
        sizes = [grid_of(row, scale) for row in csv.DictReader(file)]
    draw, packs = random.Random(seed), list[list[Grid]]()
    for _ in range(100 * count):
        if len(packs) == count:
            break
        pack: list[Grid] = []
        while sum(map(math.prod, pack)) + math.prod(clip := draw.choice(sizes)) <= limit:
            pack.append(clip)
        if pack and pack not in packs:
            packs.append(pack)
    if len(packs) < count:
        raise ValueError(f"{count} different packs of at most {limit} tokens: there are {len(packs)}")
    return packs


def grid_of(row: dict[str, str], scale: int) -> Grid:
    """16 frames a second for at most 10 s, latent frames 1 + (frames - 1) // 4; pixels scaled down to the budget with
    the aspect kept; one token for 16 x 16 pixels."""
    fps = float(row["fps"])  # 0 of an image
    frames = max(1, int(16 * min(10.0, int(row["num_frames"]) / fps))) if fps else 1
    height, width = int(row["height"]), int(row["width"])
    shrink = min(1.0, math.sqrt(480 * 854 / (height * width))) / math.cbrt(scale)
    time_tokens = 1 + (frames - 1) // 4
    return (
        max(1, round(time_tokens / math.cbrt(scale))) if time_tokens > 1 else 1,
        max(1, int(height * shrink) // 16),
        max(1, int(width * shrink) // 16),
    )


@dataclass(frozen=True)
class PackOnDevice:
    """One pack without its contents, which are drawn anew each time."""

    layout: PackLayout
    positions_L3: Tensor
    text_rows: int
    flops: int  # useful, forward and backward

    @property
    def tokens(self) -> int:
        """L."""
        return sum(self.layout.lengths)


def put(clips: Sequence[Grid], config: ModelConfig, text_rows: int, device: torch.device) -> PackOnDevice:
    """`text_rows` a clip: Wan attends to 512."""
    lengths = [math.prod(clip) for clip in clips]
    positions = [torch.cartesian_prod(*(torch.arange(size) for size in clip)).view(-1, 3) for clip in clips]
    return PackOnDevice(
        layout=PackLayout.build(lengths, [text_rows] * len(clips), device),
        positions_L3=torch.cat(positions).to(device),
        text_rows=text_rows * len(clips),
        flops=sum(step_flops(config, length, text_rows) for length in lengths),
    )


def contents(pack: PackOnDevice, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy patches, t, text and what is to be predicted, random: zeros would run faster."""
    device = pack.positions_L3.device
    volume = config.patch_frames * config.patch_height * config.patch_width
    return (
        torch.randn(pack.tokens, config.in_channels * volume, device=device, dtype=dtype),
        torch.rand(pack.layout.num_samples, device=device),
        torch.randn(pack.text_rows, config.text.width, device=device, dtype=dtype),
        torch.randn(pack.tokens, config.out_channels * volume, device=device),
    )
