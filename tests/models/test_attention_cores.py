import pytest
import torch

from sora_train.config.parallel import AttentionKind
from sora_train.config.root import ConfigError
from sora_train.models.attention import Attention, apply_core
from sora_train.models.attention_cores import choose_core, masked_sdpa, sdpa_per_document, torch_varlen
from sora_train.models.pack_layout import PackLayout

LENGTHS, TEXT_LENGTHS = (5, 1, 8), (2, 4, 1)


def exact(query, key, value, query_lengths, key_lengths):
    """Softmax attention in float64, one document at a time, written out."""
    parts = zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths), strict=True)
    out = []
    for q, k, v in parts:
        scores = torch.einsum("lnk,mnk->nlm", q, k) / q.shape[-1] ** 0.5
        out.append(torch.einsum("nlm,mnk->lnk", scores.softmax(-1), v))
    return torch.cat(out)


@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("core", [sdpa_per_document, masked_sdpa])
def test_cores_equal_float64(core, is_cross):
    generator = torch.Generator().manual_seed(0)
    key_lengths = TEXT_LENGTHS if is_cross else LENGTHS
    shapes = [(sum(LENGTHS), 2, 8), (sum(key_lengths), 2, 8), (sum(key_lengths), 2, 8)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    expected = exact(*inputs, LENGTHS, key_lengths)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    rounded = [x.detach().float().requires_grad_() for x in inputs]
    got = core(*rounded, PackLayout.build(LENGTHS, TEXT_LENGTHS), is_cross)
    gradients = torch.autograd.grad((got * weights.float()).sum(), rounded)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-6, rtol=0)


def test_layout_knows_where_documents_begin():
    layout = PackLayout.build(LENGTHS, TEXT_LENGTHS)
    assert layout.cu_seqlens.tolist() == [0, 5, 6, 14]
    assert layout.cu_text.tolist() == [0, 2, 6, 7]
    assert layout.cu_seqlens.dtype == layout.cu_text.dtype == torch.int32  # what the kernels take
    assert layout.sample_L.tolist() == [0] * 5 + [1] + [2] * 8
    assert layout.sample_M.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert layout.of_text.lengths == TEXT_LENGTHS
    assert layout.of_text.sample_L.tolist() == layout.sample_M.tolist()


def test_layout_of_images_puts_them_where_the_text_was():
    layout = PackLayout.build(LENGTHS, TEXT_LENGTHS, image_lengths=(3, 1, 2))
    images = layout.of_image
    assert (images.lengths, images.text_lengths) == (LENGTHS, (3, 1, 2))
    assert images.cu_text.tolist() == [0, 3, 4, 6]
    assert images.sample_M.tolist() == [0, 0, 0, 1, 2, 2]
    assert images.cu_seqlens is layout.cu_seqlens
    moved = layout.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert all(tensor.is_meta for tensor in tensors)
    with pytest.raises(ValueError, match="no image rows"):
        _ = PackLayout.build(LENGTHS, TEXT_LENGTHS).of_image
    for bad in ((3, 1), (3, 0, 2)):
        with pytest.raises(ValueError, match="needs an image row"):
            PackLayout.build(LENGTHS, TEXT_LENGTHS, image_lengths=bad)


@pytest.mark.parametrize(("lengths", "text_lengths"), [((), ()), ((3,), (1, 1)), ((3, 0), (1, 1)), ((3, 1), (1, 0))])
def test_layout_refuses_empty_documents(lengths, text_lengths):
    with pytest.raises(ValueError, match="needs"):
        PackLayout.build(lengths, text_lengths)


def test_auto_takes_sdpa_on_cpu_and_says_why():
    core, reason = choose_core(AttentionKind.auto, "cpu", torch.float32)
    assert core is sdpa_per_document
    assert "CUDA" in reason


@pytest.mark.parametrize("kind", [AttentionKind.flash, AttentionKind.varlen])
def test_a_kernel_that_cannot_run_here_is_refused(kind):
    with pytest.raises(ConfigError, match=f"parallel.attention={kind.value} needs CUDA"):
        choose_core(kind, "cpu", torch.bfloat16)
    with pytest.raises(ConfigError, match="needs CUDA and bf16"):
        choose_core(kind, "cuda", torch.float32)


def test_auto_takes_the_variable_length_kernels_on_cuda(monkeypatch):
    monkeypatch.setattr(
        "sora_train.models.attention_cores.find_spec", lambda name: None if "flash" in name else object()
    )
    core, reason = choose_core(AttentionKind.auto, "cuda", torch.bfloat16)
    assert core.__name__ == "torch_varlen"
    assert "varlen" in reason
    monkeypatch.setattr("sora_train.models.attention_cores.find_spec", lambda name: object())
    assert choose_core(AttentionKind.auto, "cuda", torch.bfloat16)[0].__name__ == "flash_attention"
    monkeypatch.setattr("sora_train.models.attention_cores.find_spec", lambda name: None)
    assert choose_core(AttentionKind.auto, "cuda", torch.bfloat16)[0] is sdpa_per_document
    with pytest.raises(ConfigError, match="not installed"):
        choose_core(AttentionKind.flash, "cuda", torch.bfloat16)


@pytest.mark.parametrize(("width", "heads", "odd"), [(24, 2, 12), (528, 2, 264)])
def test_heads_that_no_kernel_takes_get_none(monkeypatch, width, heads, odd):
    """Both kernels crash on a width that is no multiple of 8 or over 256, and only on the device."""
    monkeypatch.setattr("sora_train.models.attention_cores.find_spec", lambda name: object())
    model = torch.nn.ModuleList([Attention(width, heads, 1e-6), Attention(64, 4, 1e-6)])
    reason = apply_core(model, AttentionKind.auto, "cuda", torch.bfloat16)
    assert {module.core for module in model} == {sdpa_per_document}
    assert f"no kernel takes heads of width [{odd}]" in reason
    with pytest.raises(ConfigError, match="use a multiple of 8 up to 256"):
        apply_core(model, AttentionKind.varlen, "cuda", torch.bfloat16)
    apply_core(model[1], AttentionKind.varlen, "cuda", torch.bfloat16)
    assert model[1].core is torch_varlen


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [AttentionKind.auto, AttentionKind.varlen])
@pytest.mark.parametrize("is_cross", [False, True])
def test_cuda_kernels_equal_float64(kind, is_cross):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    core, _ = choose_core(kind, "cuda", torch.bfloat16)
    key_lengths = TEXT_LENGTHS if is_cross else LENGTHS
    shapes = [(sum(LENGTHS), 2, 64), (sum(key_lengths), 2, 64), (sum(key_lengths), 2, 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    expected = exact(*(x.double() for x in inputs), LENGTHS, key_lengths)
    got = core(*inputs, PackLayout.build(LENGTHS, TEXT_LENGTHS, "cuda"), is_cross)
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=0)
    gradients = torch.autograd.grad(got.sum(), inputs)
    for a, b in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=5e-2, rtol=0)
