"""Every attention core against float64, value and gradient; documents that change nothing in their neighbours; what the
kernels of other packages are handed. What needs a CUDA device waits for one."""

import inspect
import random
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from sora_train.config.parallel import AttentionKind
from sora_train.config.root import ConfigError
from sora_train.models import attention_cores
from sora_train.models.attention_choice import choose_core
from sora_train.models.attention_cores import (
    cudnn_per_document,
    equal_neighbours,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    masked_sdpa,
    powers_of_two,
    sdpa_per_document,
    torch_varlen,
)
from sora_train.models.pack_layout import PackLayout

LENGTHS, TEXT_LENGTHS = (5, 1, 8), (2, 4, 1)
CORES = [sdpa_per_document, masked_sdpa, cudnn_per_document]
# Documents of tokens, texts of rows: alone, of one token each, large beside small, equal neighbours, unequal texts.
PACKS = [
    (LENGTHS, TEXT_LENGTHS),
    ((7,), (3,)),
    ((1, 1, 1), (1, 2, 1)),
    ((300, 1, 2, 65), (1, 77, 3, 3)),
    ((4, 4, 4, 4, 4, 6, 6, 4), (3, 3, 3, 3, 3, 3, 2, 2)),
]


def exact(query, key, value, query_lengths, key_lengths):
    """Softmax attention in float64, one document at a time, written out."""
    parts = zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths), strict=True)
    out = []
    for q, k, v in parts:
        scores = torch.einsum("lnk,mnk->nlm", q, k) / q.shape[-1] ** 0.5
        out.append(torch.einsum("nlm,mnk->lnk", scores.softmax(-1), v))
    return torch.cat(out)


def inputs_of(lengths, key_lengths, seed=0, width=8, heads=2):
    """Queries, keys and values in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = (sum(lengths), sum(key_lengths), sum(key_lengths))
    return [torch.randn(n, heads, width, generator=generator, dtype=torch.float64).requires_grad_() for n in rows]


def disagreement(core, lengths, text_lengths, is_cross, *, device="cpu", dtype=torch.float32, width=8, seed=0):
    """Of a core from float64: the largest difference of values, and of gradients, over the largest (at least 1)."""
    key_lengths = text_lengths if is_cross else lengths
    # What the core sees is exact for the reference too: only its own arithmetic counts.
    inputs = [x.detach().to(dtype).double().requires_grad_() for x in inputs_of(lengths, key_lengths, seed, width)]
    expected = exact(*inputs, lengths, key_lengths)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    rounded = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    got = core(*rounded, PackLayout.build(lengths, text_lengths, device), is_cross)
    gradients = torch.autograd.grad((got * weights.to(device)).sum(), rounded)
    assert got.shape == expected.shape
    assert got.dtype == dtype
    off = [
        float((a.detach().cpu().double() - b).abs().max() / b.abs().max().clamp(min=1))
        for a, b in zip((got, *gradients), (expected.detach(), *expected_gradients), strict=True)
    ]
    return off[0], max(off[1:])


@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("core", CORES)
def test_cores_equal_float64(core, pack, is_cross):
    values, gradients = disagreement(core, *pack, is_cross)
    assert values < 1e-6
    assert gradients < 2e-6


def random_pack(draw, largest=40):
    """One to nine documents, now and then of one token, or like the one before."""
    lengths, text_lengths = [], []
    for _ in range(draw.randint(1, 9)):
        is_twin = bool(lengths) and draw.random() < 0.4
        lengths.append(lengths[-1] if is_twin else draw.choice([1, draw.randint(2, largest)]))
        text_lengths.append(text_lengths[-1] if is_twin else draw.choice([1, draw.randint(2, 12)]))
    return tuple(lengths), tuple(text_lengths)


@pytest.mark.parametrize("core", CORES)
def test_cores_equal_float64_on_thirty_random_packs(core):
    draw = random.Random(7)
    for seed in range(30):
        pack = random_pack(draw)
        for is_cross in (False, True):
            values, gradients = disagreement(core, *pack, is_cross, seed=seed)
            assert values < 2e-6, (pack, is_cross)
            assert gradients < 4e-6, (pack, is_cross)


def kept_document(core, tensors, layout, is_cross, kept):
    """Value and the three gradients of one document in a pack, of a weighted sum of its outputs alone."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    rows, key_rows = layout.sample_L == kept, (layout.sample_M if is_cross else layout.sample_L) == kept
    out = core(*tensors, layout, is_cross)[rows]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (out * weights).sum().backward()
    query, key, value = tensors
    return out.detach(), query.grad[rows], key.grad[key_rows], value.grad[key_rows]


def check_isolation(core, pack, is_cross, kept, poison, *, device="cpu", dtype=torch.float32, width=8):
    layout = PackLayout.build(*pack, device)
    key_lengths = pack[1] if is_cross else pack[0]
    tensors = [x.detach().to(device, dtype) for x in inputs_of(pack[0], key_lengths, width=width)]
    samples = (layout.sample_L, *[layout.sample_M if is_cross else layout.sample_L] * 2)
    poisoned = [
        torch.where((of == kept)[:, None, None], x, torch.full_like(x, poison))
        for x, of in zip(tensors, samples, strict=True)
    ]
    clean = kept_document(core, tensors, layout, is_cross, kept)
    for a, b in zip(kept_document(core, poisoned, layout, is_cross, kept), clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("pack", [pack for pack in PACKS if len(pack[0]) > 1])
@pytest.mark.parametrize(("core", "poison"), [
    (sdpa_per_document, torch.nan), (cudnn_per_document, torch.nan), (masked_sdpa, 1e4),
])  # fmt: skip
def test_other_documents_change_nothing(core, poison, pack, is_cross):
    """Bitwise. The mask of the reference adds minus infinity to other documents' scores, which a NaN survives."""
    for kept in (0, len(pack[0]) - 2, len(pack[0]) - 1):
        check_isolation(core, pack, is_cross, kept, poison)


@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("core", CORES)
def test_order_of_documents_changes_nothing(core, is_cross):
    lengths, text_lengths = PACKS[-1]
    order = [5, 0, 7, 2, 1, 6, 4, 3]
    key_lengths = text_lengths if is_cross else lengths
    query, key, value = (x.detach().float() for x in inputs_of(lengths, key_lengths))
    straight = core(query, key, value, PackLayout.build(lengths, text_lengths), is_cross).split(lengths)
    turned = [
        torch.cat([x.split(parts)[i] for i in order])
        for x, parts in ((query, lengths), (key, key_lengths), (value, key_lengths))
    ]
    layout = PackLayout.build([lengths[i] for i in order], [text_lengths[i] for i in order])
    got = core(*turned, layout, is_cross).split(layout.lengths)
    for place, i in enumerate(order):
        torch.testing.assert_close(got[place], straight[i], atol=1e-6, rtol=0)


def test_equal_neighbours_go_together_and_keep_their_order():
    batches = list(equal_neighbours((4, 4, 4, 6, 6, 4), (2, 2, 2, 2, 1, 2)))
    assert batches == [(3, 4, 2), (1, 6, 2), (1, 6, 1), (1, 4, 2)]
    assert list(powers_of_two([(7, 4, 2), (1, 6, 2), (8, 3, 3)])) == [
        (4, 4, 2), (2, 4, 2), (1, 4, 2), (1, 6, 2), (8, 3, 3)
    ]  # fmt: skip


def test_one_call_for_equal_neighbours(monkeypatch):
    """And cuDNN, which builds a plan for each shape, sees powers of two only."""
    shapes = []
    sdpa = F.scaled_dot_product_attention

    def counting(query, key, value):
        shapes.append((tuple(query.shape), key.shape[2]))
        return sdpa(query, key, value)

    monkeypatch.setattr(attention_cores.F, "scaled_dot_product_attention", counting)
    lengths, text_lengths = (4, 4, 4, 6), (3, 3, 2, 2)
    layout = PackLayout.build(lengths, text_lengths)
    query, key = torch.randn(18, 2, 8), torch.randn(10, 2, 8)
    sdpa_per_document(query, query, query, layout, False)
    assert shapes == [((3, 2, 4, 8), 4), ((1, 2, 6, 8), 6)]
    shapes.clear()
    sdpa_per_document(query, key, key, layout, True)
    assert shapes == [((2, 2, 4, 8), 3), ((1, 2, 4, 8), 2), ((1, 2, 6, 8), 2)]
    shapes.clear()
    cudnn_per_document(query, query, query, layout, False)
    assert shapes == [((2, 2, 4, 8), 4), ((1, 2, 4, 8), 4), ((1, 2, 6, 8), 6)]


def varlen_reference(q, k, v, cu_q, cu_k, max_q, max_k):
    """What variable-length kernels promise, and what they demand of their arguments."""
    assert all(x.dtype == torch.int32 and x.dim() == 1 and x.device == q.device for x in (cu_q, cu_k))
    assert type(max_q) is int
    assert type(max_k) is int
    lengths, key_lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (sum(lengths), sum(key_lengths)) == (q.shape[0], k.shape[0])
    assert (max_q, max_k) == (max(lengths), max(key_lengths))
    return exact(q, k, v, lengths, key_lengths)


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """The signature of flash_attn 2.8."""
    assert (dropout_p, softmax_scale, causal, window_size) == (0.0, None, False, (-1, -1))
    return varlen_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """The signature of FlashAttention-3's flash_attn_interface."""
    assert (seqused_q, seqused_k, softmax_scale, causal, window_size) == (None, None, None, False, (-1, -1))
    return varlen_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def flash_3_first(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """Its first releases returned the log of the sum of exponentials too."""
    return flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), torch.zeros(q.shape[1], q.shape[0])


def flash_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    return_lse=False,
):  # fmt: skip
    """The signature of flash-attn-4 4.0.0b36: always two results."""
    assert (qv, seqused_q, seqused_k, page_table, softmax_scale, causal) == (None, None, None, None, None, False)
    out = varlen_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return out, torch.zeros(q.shape[1], q.shape[0]) if return_lse else None


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize(
    ("core", "module", "kernel"),
    [
        (flash_attention_2, "flash_attn", flash_2),
        (flash_attention_3, "flash_attn_interface", flash_3),
        (flash_attention_3, "flash_attn_interface", flash_3_first),
        (flash_attention_4, "flash_attn.cute", flash_4),
    ],
)
def test_what_the_kernels_of_packages_are_handed(core, module, kernel, is_cross, pack, monkeypatch):
    stub = types.ModuleType(module)
    stub.flash_attn_varlen_func = kernel
    monkeypatch.setitem(sys.modules, module, stub)
    if "." in module:
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    values, gradients = disagreement(core, *pack, is_cross, dtype=torch.float64)
    assert max(values, gradients) < 1e-12


@pytest.mark.parametrize("is_cross", [False, True])
def test_what_torch_varlen_is_handed(is_cross, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="needs torch >= 2.10")
    signature = inspect.signature(varlen.varlen_attn)

    def kernel(*args, **kwargs):
        names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
        given = signature.bind(*args, **kwargs).arguments
        assert tuple(given) == names
        return varlen_reference(*given.values())

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    values, gradients = disagreement(torch_varlen, LENGTHS, TEXT_LENGTHS, is_cross, dtype=torch.float64)
    assert max(values, gradients) < 1e-12


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


def test_a_layout_keeps_what_cores_work_out_and_a_copy_does_not():
    layout = PackLayout.build(LENGTHS, TEXT_LENGTHS, image_lengths=(3, 1, 2))
    layout.memo["mask"] = 1
    assert layout.memo == {"mask": 1}
    assert layout.of_image is layout.of_image  # or every block would work it out anew
    assert layout.of_image.memo == {}
    assert layout.to("meta").memo == {}


@pytest.mark.parametrize(("lengths", "text_lengths"), [((), ()), ((3,), (1, 1)), ((3, 0), (1, 1)), ((3, 1), (1, 0))])
def test_layout_refuses_empty_documents(lengths, text_lengths):
    with pytest.raises(ValueError, match="needs"):
        PackLayout.build(lengths, text_lengths)


def core_on_cuda(kind):
    """The core, or a skip that says why there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    try:
        return choose_core(kind, "cuda", torch.bfloat16, [64, 128])[0]
    except ConfigError as error:
        pytest.skip(str(error))


CUDA_KINDS = [kind for kind in AttentionKind if kind is not AttentionKind.masked]
LARGE = [*PACKS, ((1000, 129, 1, 128, 128, 128, 515), (77, 1, 512, 3, 3, 3, 130))]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("kind", CUDA_KINDS)
def test_cuda_kernels_equal_float64(kind, is_cross, width):
    core = core_on_cuda(kind)
    for pack in LARGE:
        values, gradients = disagreement(core, *pack, is_cross, device="cuda", dtype=torch.bfloat16, width=width)
        assert values < 1e-2, pack
        assert gradients < 2e-2, pack


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CUDA_KINDS)
def test_cuda_kernels_equal_float64_on_thirty_random_packs(kind):
    core, draw = core_on_cuda(kind), random.Random(7)
    for seed in range(30):
        pack = random_pack(draw, 400)
        for is_cross in (False, True):
            off = disagreement(core, *pack, is_cross, device="cuda", dtype=torch.bfloat16, width=64, seed=seed)
            assert max(off) < 2e-2, (pack, is_cross)


@pytest.mark.gpu
@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("kind", CUDA_KINDS)
def test_other_documents_change_nothing_on_cuda(kind, is_cross):
    """Bitwise where the backward pass adds in a fixed order; values always."""
    core = core_on_cuda(kind)
    poison = 1e4 if kind is AttentionKind.flex else torch.nan
    for pack in LARGE[2:]:
        layout = PackLayout.build(*pack, "cuda")
        tensors = [x.detach().to("cuda", torch.bfloat16) for x in inputs_of(pack[0], pack[is_cross], width=64)]
        samples = (layout.sample_L, *[layout.sample_M if is_cross else layout.sample_L] * 2)
        for kept in (0, len(pack[0]) - 2):
            poisoned = [
                torch.where((of == kept)[:, None, None], x, torch.full_like(x, poison))
                for x, of in zip(tensors, samples, strict=True)
            ]
            value, *gradients = kept_document(core, poisoned, layout, is_cross, kept)
            expected, *expected_gradients = kept_document(core, tensors, layout, is_cross, kept)
            assert torch.equal(value, expected)
            for a, b in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
def test_cudnn_runs_on_cudnn():
    core = core_on_cuda(AttentionKind.cudnn)
    query = torch.randn(256, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layout = PackLayout.build([128, 128], [1, 1], "cuda")
    with torch.profiler.profile() as profile:
        core(query, query, query, layout, False).sum().backward()
    names = {event.name for event in profile.events()}
    assert "aten::_scaled_dot_product_cudnn_attention" in names
