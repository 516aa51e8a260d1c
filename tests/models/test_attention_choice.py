"""Which attention core runs where: a table, and the line that says why."""

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from sora_train.config.parallel import AttentionKind
from sora_train.config.root import ConfigError
from sora_train.models import attention_choice
from sora_train.models.attention import Attention, apply_core
from sora_train.models.attention_choice import BY_NAME, Facts, choose, choose_core
from sora_train.models.attention_cores import (
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    masked_sdpa,
    sdpa_per_document,
    torch_varlen,
)

AMPERE, ADA, HOPPER, BLACKWELL, RTX_50, VOLTA = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (7, 0)
BF16 = torch.bfloat16
NOTHING = {"torch": "2.13.0+cu130"}
OLD = {"torch": "2.9.1"}
OLD_FLASH = NOTHING | {"flash-attn": "1.0.9", "flash-attn-4": "4.0.0b9"}
FLASH_2 = NOTHING | {"flash-attn": "2.8.3"}
FLASH_3 = NOTHING | {"flash_attn_interface": "3"}
FLASH_4 = NOTHING | {"flash-attn-4": "4.0.0b36"}
ALL = FLASH_2 | FLASH_3 | FLASH_4


def facts(capability, versions, widths=(128,), dtype=BF16):
    return Facts("cuda", dtype, capability, frozenset(widths), versions)


@pytest.mark.parametrize(
    ("of", "core", "said"),
    [
        # Installed or not.
        (facts(HOPPER, NOTHING), torch_varlen, "flash3: not installed (build it"),
        (facts(HOPPER, NOTHING), torch_varlen, "flash4: not installed (pip install 'sora_train[gpu]')"),
        (facts(HOPPER, FLASH_2), flash_attention_2, "flash4: not installed"),
        (facts(HOPPER, FLASH_3), flash_attention_3, "FlashAttention-3 (cuda sm_90 in bfloat16)"),
        (facts(HOPPER, FLASH_4), flash_attention_4, "flash3: not installed"),
        (facts(HOPPER, FLASH_2 | FLASH_4), flash_attention_4, "FlashAttention-4"),
        (facts(HOPPER, ALL), flash_attention_3, "FlashAttention-3"),
        (facts(HOPPER, OLD), sdpa_per_document, "varlen: needs torch >= 2.10, this is 2.9.1"),
        (facts(HOPPER, OLD | {"flash-attn": "2.8.3"}), flash_attention_2, "flash-attn"),
        (facts(HOPPER, OLD_FLASH), torch_varlen, "flash2: needs flash-attn >= 2.5, this is 1.0.9"),
        (facts(HOPPER, OLD_FLASH), torch_varlen, "flash4: needs flash-attn-4 >= 4.0.0b36, this is 4.0.0b9"),
        (facts(HOPPER, NOTHING | {"flash-attn-4": "4.0.0"}), flash_attention_4, "FlashAttention-4"),
        # Right for the device.
        (facts(AMPERE, ALL), flash_attention_2, "not flash3, flash4: no kernels for cuda sm_80"),
        (facts(AMPERE, NOTHING), torch_varlen, "flash2: not installed"),
        (facts(ADA, FLASH_3 | FLASH_4), torch_varlen, "no kernels for cuda sm_89"),
        (facts(BLACKWELL, ALL), flash_attention_4, "not flash3: no kernels for cuda sm_100"),
        (facts(BLACKWELL, NOTHING), torch_varlen, "flash4: not installed"),
        (facts(RTX_50, ALL), flash_attention_2, "not flash3, flash4: no kernels for cuda sm_120"),
        (facts(VOLTA, ALL), sdpa_per_document, "not flash3, flash4, flash2, varlen: no kernels for cuda sm_70"),
        # The type of inputs.
        (facts(HOPPER, ALL, dtype=torch.float16), flash_attention_3, "in float16"),
        (facts(HOPPER, ALL, dtype=torch.float32), sdpa_per_document, "needs bf16, this is cuda sm_90 in float32"),
        # Widths of heads, of the model's and of its text encoder's.
        (facts(HOPPER, ALL, (64, 128)), flash_attention_3, "FlashAttention-3"),
        (facts(HOPPER, ALL, (256,)), flash_attention_3, "FlashAttention-3"),
        (facts(HOPPER, FLASH_4, (192,)), flash_attention_4, "FlashAttention-4"),
        (facts(BLACKWELL, FLASH_4, (192,)), torch_varlen, "not flash4: no kernel for heads of width 192"),
        (facts(BLACKWELL, FLASH_4, (256,)), flash_attention_4, "FlashAttention-4"),
        (facts(HOPPER, ALL, (128, 12)), sdpa_per_document, "no kernel for heads of width 12, only for a multiple of 8"),
        (facts(HOPPER, ALL, (264,)), sdpa_per_document, "no kernel for heads of width 264"),
        # No CUDA.
        (Facts("cpu", BF16, versions=ALL), sdpa_per_document, "needs CUDA, this is cpu in bfloat16"),
        (Facts("mps", torch.float32, versions=NOTHING), sdpa_per_document, "needs CUDA, this is mps in float32"),
    ],
)  # fmt: skip
def test_auto_takes_the_fastest_that_is_right_and_says_why(of, core, said):
    got, line = choose(AttentionKind.auto, of)
    assert got is core
    assert said in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("kind", "of", "said"),
    [
        (AttentionKind.flash2, facts(HOPPER, NOTHING), r"flash2: not installed \(pip install flash-attn\)"),
        (AttentionKind.flash3, facts(BLACKWELL, ALL), "flash3: no kernels for cuda sm_100"),
        (AttentionKind.flash4, facts(AMPERE, ALL), "flash4: no kernels for cuda sm_80"),
        (AttentionKind.flash4, facts(BLACKWELL, ALL, (192,)), "flash4: no kernel for heads of width 192, only for"),
        (AttentionKind.varlen, facts(HOPPER, OLD), r"varlen: needs torch >= 2.10, this is 2.9.1"),
        (AttentionKind.varlen, facts(HOPPER, ALL, dtype=torch.float32), "varlen: needs bf16"),
        (AttentionKind.cudnn, facts(HOPPER, ALL, (256,)), "cudnn: no kernel for heads of width 256"),
        (AttentionKind.cudnn, facts(VOLTA, ALL), "cudnn: no kernels for cuda sm_70"),
        (AttentionKind.flex, facts(HOPPER, ALL, (12,)), "flex: no kernel for heads of width 12, only for between 16"),
        *[(kind, Facts("cpu", BF16, versions=ALL), f"{kind.value}: needs CUDA, this is cpu") for kind in BY_NAME],
    ],
)
def test_a_kernel_that_cannot_run_is_refused(kind, of, said):
    with pytest.raises(ConfigError, match=f"^parallel.attention={said}.*: use parallel.attention=auto$"):
        choose(kind, of)


@pytest.mark.parametrize("kind", [kind for kind in AttentionKind if kind is not AttentionKind.auto])
def test_a_kernel_asked_for_is_what_runs(kind):
    core, line = choose(kind, facts(HOPPER, ALL))
    own = {AttentionKind.sdpa: sdpa_per_document, AttentionKind.masked: masked_sdpa}
    assert core is (own[kind] if kind in own else BY_NAME[kind].core)
    assert "as configured" in line


def test_flex_runs_in_float32_on_cuda():
    core, _ = choose(AttentionKind.flex, facts(HOPPER, NOTHING, dtype=torch.float32))
    assert core is BY_NAME[AttentionKind.flex].core


def test_auto_on_cpu():
    core, line = choose_core(AttentionKind.auto, "cpu", torch.float32, [64])
    assert core is sdpa_per_document
    faster = "flash3, flash4, flash2, varlen"
    assert line == f"SDPA per document (cpu in float32); not {faster}: needs CUDA, this is cpu in float32"


def test_flash_attn_4_alone_is_no_flash_attn_2(monkeypatch):
    """Both fill the folder `flash_attn`: only the names of what was installed tell them apart."""

    def version(name):
        if name == "flash-attn-4":
            return "4.0.0b36"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(attention_choice.importlib.metadata, "version", version)
    monkeypatch.setattr(attention_choice, "find_spec", lambda name: object() if name == "flash_attn" else None)
    gathered = Facts.gather("cpu", BF16, [64])
    assert gathered.versions == {"torch": str(torch.__version__), "flash-attn-4": "4.0.0b36"}
    monkeypatch.setattr(attention_choice, "find_spec", lambda name: object())
    assert "flash_attn_interface" in Facts.gather("cpu", BF16, [64]).versions


def test_the_device_is_asked_for_its_generation(monkeypatch):
    asked = []
    cuda = SimpleNamespace(get_device_capability=lambda device: asked.append(device) or HOPPER)
    monkeypatch.setattr(attention_choice.torch, "cuda", cuda)
    assert Facts.gather("cuda:3", BF16, []).capability == HOPPER
    assert asked == [torch.device("cuda:3")]


@pytest.mark.parametrize(("width", "heads", "odd"), [(24, 2, 12), (528, 2, 264)])
def test_one_core_for_all_heads_of_a_model(monkeypatch, width, heads, odd):
    """Kernels crash on a width they do not take, and only on the device: one odd module decides for all."""
    monkeypatch.setattr(Facts, "gather", lambda device, dtype, widths: facts(HOPPER, NOTHING, widths, dtype))
    model = torch.nn.ModuleList([Attention(width, heads, 1e-6), Attention(64, 4, 1e-6)])
    reason = apply_core(model, AttentionKind.auto, "cuda", BF16)
    assert {module.core for module in model} == {sdpa_per_document}
    assert f"no kernel for heads of width {odd}" in reason
    with pytest.raises(ConfigError, match=f"no kernel for heads of width {odd}"):
        apply_core(model, AttentionKind.varlen, "cuda", BF16)
    apply_core(model[1], AttentionKind.varlen, "cuda", BF16)
    assert model[1].core is torch_varlen
