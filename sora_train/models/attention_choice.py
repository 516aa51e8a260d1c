"""Which attention core runs: a pure function of the device, the precision, the widths of heads and what is installed.

The order of `FASTEST_FIRST` is that of public figures, until benchmarks say otherwise. On an H100, head width 128, no
mask, forward, 8k to 16k tokens, in TFLOP/s: FlashAttention-3 648, cuDNN 600, Triton 395, FlashAttention-2 370 (figure 5
of arXiv:2407.08608). FlashAttention-4 on Hopper equals 3 on one long sequence (74 ms each, forward and backward of 40k
tokens, FlashAttention-2 142 ms; ecmwf/anemoi-core#959) but had not closed the gap over variable lengths
(pytorch/torchtitan#4413); on a B200 it gives up to 1613 TFLOP/s, 1.3 times cuDNN (arXiv:2603.05451). flash-attn 2 and
torch's varlen_attn are one kernel. Two are not chosen unasked: cuDNN, which stops to build a plan for each new length
of a clip, and FlexAttention, which is Triton.
"""

import importlib.metadata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch.torch_version import TorchVersion

from sora_train.config.parallel import AttentionKind
from sora_train.config.root import ConfigError
from sora_train.models.attention_cores import (
    Core,
    cudnn_per_document,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    masked_sdpa,
    sdpa_per_document,
    torch_varlen,
)
from sora_train.models.attention_flex import flex_per_document

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Facts:
    """All that decides."""

    device: str  # its type
    dtype: torch.dtype
    capability: tuple[int, int] = (0, 0)  # of a CUDA device: (9, 0) is Hopper, (10, x) Blackwell
    head_widths: frozenset[int] = frozenset()
    versions: Mapping[str, str] = field(default_factory=dict)  # of installed packages, torch among them

    @staticmethod
    def gather(device: torch.device | str, dtype: torch.dtype, head_widths: Collection[int]) -> "Facts":
        """Looks at the device and at what is installed; imports no kernel."""
        device = torch.device(device)
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        versions = {"torch": str(torch.__version__)}
        # By the names of distributions: flash-attn-4 alone makes a folder `flash_attn` that has no FlashAttention-2.
        for package in ("flash-attn", "flash-attn-4"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        if find_spec("flash_attn_interface") is not None:
            versions["flash_attn_interface"] = "3"  # its distributions have had several names
        return Facts(device.type, dtype, capability, frozenset(head_widths), versions)

    @property
    def place(self) -> str:
        """In words."""
        capability = f" sm_{self.capability[0]}{self.capability[1]}" if self.device == "cuda" else ""
        return f"{self.device}{capability} in {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Kernel:
    """A core that is not for every machine, and what it takes."""

    kind: AttentionKind
    core: Core
    name: str
    package: str
    at_least: str
    install: str  # how to get it
    generations: tuple[int, ...]  # major compute capabilities, forward and backward
    takes_width: Callable[[int, int], bool] = lambda width, generation: width % 8 == 0 and width <= 256
    widths: str = "a multiple of 8 up to 256"
    dtypes: tuple[torch.dtype, ...] = HALVES
    is_operator: bool = True  # of torch's, so that selective checkpointing sees what it gives


FLASH_3 = Kernel(
    AttentionKind.flash3, flash_attention_3, "FlashAttention-3", "flash_attn_interface", "3",
    "build it from hopper/ of github.com/Dao-AILab/flash-attention", (9,),
)  # fmt: skip
FLASH_4 = Kernel(
    AttentionKind.flash4, flash_attention_4, "FlashAttention-4", "flash-attn-4", "4.0.0b36",
    "pip install 'sora_train[gpu]'", (9, 10),
    lambda width, generation: width % 8 == 0 and (width <= 128 or width == 256 or (width < 256 and generation == 9)),
    "a multiple of 8 up to 128 (Hopper: up to 256), or 256", is_operator=False,
)  # fmt: skip
FLASH_2 = Kernel(
    AttentionKind.flash2, flash_attention_2, "flash-attn", "flash-attn", "2.5", "pip install flash-attn",
    (8, 9, 10, 12),
)  # fmt: skip
VARLEN = Kernel(
    AttentionKind.varlen, torch_varlen, "torch varlen_attn", "torch", "2.10", "pip install 'torch>=2.10'",
    (8, 9, 10, 12),
)  # fmt: skip
CUDNN = Kernel(
    AttentionKind.cudnn, cudnn_per_document, "cuDNN SDPA per document", "torch", "2.8", "pip install 'torch>=2.8'",
    (8, 9, 10, 12), lambda width, generation: width % 8 == 0 and width <= 128, "a multiple of 8 up to 128",
)  # fmt: skip
FLEX = Kernel(
    AttentionKind.flex, flex_per_document, "FlexAttention, compiled", "torch", "2.8", "pip install 'torch>=2.8'",
    (8, 9, 10, 12), lambda width, generation: 16 <= width <= 256, "between 16 and 256", (*HALVES, torch.float32),
    is_operator=False,
)  # fmt: skip
FASTEST_FIRST = (FLASH_3, FLASH_4, FLASH_2, VARLEN)
BY_NAME = {kernel.kind: kernel for kernel in (*FASTEST_FIRST, CUDNN, FLEX)}


def choose_core(
    kind: AttentionKind, device: torch.device | str, dtype: torch.dtype, head_widths: Collection[int] = ()
) -> tuple[Core, str]:
    """The core for a device, the precision of its inputs and the model's head widths, and one line that says which
    it is and why.

    Raises:
        ConfigError: a kernel asked for by name cannot run here.
    """
    return choose(kind, Facts.gather(device, dtype, head_widths))


def choose(kind: AttentionKind, facts: Facts) -> tuple[Core, str]:
    """As `choose_core`, of facts."""
    if kind is AttentionKind.sdpa:
        return sdpa_per_document, f"SDPA per document, as configured ({facts.place})"
    if kind is AttentionKind.masked:
        return masked_sdpa, f"masked SDPA, as configured: quadratic in the pack ({facts.place})"
    if kind is not AttentionKind.auto:
        kernel = BY_NAME[kind]
        reason = refusal(kernel, facts)
        if reason:
            raise ConfigError(f"parallel.attention={kind.value}: {reason}: use parallel.attention=auto")
        return kernel.core, f"{kernel.name}, as configured ({facts.place})"
    refused: dict[str, list[str]] = {}  # the names that have a reason in common
    for kernel in FASTEST_FIRST:
        reason = refusal(kernel, facts)
        if reason is None:
            return kernel.core, f"{kernel.name} ({facts.place}){_but(refused)}"
        refused.setdefault(reason, []).append(kernel.kind.value)
    return sdpa_per_document, f"SDPA per document ({facts.place}){_but(refused)}"


def refusal(kernel: Kernel, facts: Facts) -> str | None:
    """Why a kernel cannot run, and what would help; None if it can."""
    if facts.device != "cuda":
        return f"needs CUDA, this is {facts.place}"
    if facts.dtype not in kernel.dtypes:
        return f"needs bf16, this is {facts.place}"
    if facts.capability[0] not in kernel.generations:
        return f"no kernels for {facts.place}"
    odd = sorted(width for width in facts.head_widths if not kernel.takes_width(width, facts.capability[0]))
    if odd:
        return f"no kernel for heads of width {odd[0]}, only for {kernel.widths}"
    version = facts.versions.get(kernel.package)
    if version is None:
        return f"not installed ({kernel.install})"
    if TorchVersion(version) < TorchVersion(kernel.at_least):
        return f"needs {kernel.package} >= {kernel.at_least}, this is {version} ({kernel.install})"
    return None


def hidden_kernel(core: Core) -> str | None:
    """The name of a core's kernel, if no dispatch mode of torch's sees it."""
    return next((each.name for each in BY_NAME.values() if each.core is core and not each.is_operator), None)


def _but(refused: Mapping[str, list[str]]) -> str:
    return "".join(f"; not {', '.join(names)}: {reason}" for reason, names in refused.items())
