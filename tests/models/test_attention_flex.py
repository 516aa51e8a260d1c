"""FlexAttention's blocks and mask, on the CPU. Its backward pass needs a CUDA device: test_attention_cores has that."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from sora_train.models import attention_flex
from sora_train.models.attention_cores import masked_sdpa
from sora_train.models.attention_flex import BLOCK, document_mask, flex_per_document
from sora_train.models.pack_layout import PackLayout

# At and beside the edges of blocks; documents over several blocks; several in one.
EDGES = [
    ([128], [1]),
    ([127, 1], [128, 256]),
    ([128, 128, 129], [1, 127, 128]),
    ([1] * 5, [300, 1, 1, 1, 1]),
    ([300, 2, 600, 1], [3, 400, 1, 129]),
    ([257], [513]),
]


def random_layouts(count):
    draw = random.Random(5)
    for _ in range(count):
        sizes = [draw.choice([1, 127, 128, 129, 256, draw.randint(2, 40), draw.randint(100, 400)]) for _ in range(14)]
        documents = draw.randint(1, 7)
        yield sizes[:documents], sizes[7 : 7 + documents]


PACKS = [*EDGES, *random_layouts(30)]


def sizes(layout, is_cross):
    return sum(layout.lengths), sum(layout.text_lengths if is_cross else layout.lengths)


@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("pack", PACKS, ids=str)
def test_blocks_are_those_of_the_whole_mask(pack, is_cross):
    """As torch finds them in the dense mask, for the forward pass and, by key blocks, for the backward pass."""
    layout = PackLayout.build(*pack)
    num_tokens, num_keys = sizes(layout, is_cross)
    keys = layout.sample_M if is_cross else layout.sample_L
    expected = create_block_mask(
        lambda batch, head, q, k: layout.sample_L[q] == keys[k], None, None, num_tokens, num_keys, device="cpu"
    )
    mask = document_mask(layout, is_cross)
    assert mask.shape == expected.shape == (1, 1, num_tokens, num_keys)
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(mask, f"{kind}_num_blocks")
        assert torch.equal(counts, getattr(expected, f"{kind}_num_blocks"))
        assert counts.dtype == torch.int32
        indices, expected_indices = getattr(mask, f"{kind}_indices"), getattr(expected, f"{kind}_indices")
        assert indices.dtype == torch.int32
        assert indices.shape == expected_indices.shape
        for row, count in enumerate(counts[0, 0].tolist()):
            assert indices[0, 0, row, :count].tolist() == sorted(expected_indices[0, 0, row, :count].tolist())
    assert torch.equal(
        create_mask(mask.mask_mod, None, None, num_tokens, num_keys, "cpu")[0, 0],
        layout.sample_L[:, None] == keys[None, :],
    )


@pytest.fixture
def eager(monkeypatch):
    """The mask without its blocks: torch's own unfused arithmetic."""
    monkeypatch.setattr(attention_flex, "compiled_flex", lambda: flex_attention)


def values(layout, is_cross, width=16):
    num_tokens, num_keys = sizes(layout, is_cross)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 2, width, generator=generator) for rows in (num_tokens, num_keys, num_keys)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("pack", EDGES, ids=str)
def test_values_equal_the_reference(pack, is_cross, eager):
    layout = PackLayout.build(*pack)
    tensors = values(layout, is_cross)
    got = flex_per_document(*tensors, layout, is_cross)
    torch.testing.assert_close(got, masked_sdpa(*tensors, layout, is_cross), atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_mask_is_made_once_a_layout(eager, monkeypatch):
    made = []

    def counting(layout, is_cross):
        made.append((layout.text_lengths, is_cross))
        return document_mask(layout, is_cross)

    monkeypatch.setattr(attention_flex, "document_mask", counting)
    layout = PackLayout.build([5, 3], [2, 4], image_lengths=[1, 1])
    for _ in range(3):
        for of, is_cross in ((layout, False), (layout, True), (layout.of_image, True)):
            flex_per_document(*values(of, is_cross), of, is_cross)
    assert made == [((2, 4), False), ((2, 4), True), ((1, 1), True)]


def test_nothing_is_asked_of_the_device(monkeypatch):
    """No value of a tensor is read while the mask is made: on a CUDA device each read waits for it."""
    layout = PackLayout.build([300, 2, 600, 1], [3, 400, 1, 129]).to("meta")
    for is_cross in (False, True):
        mask = document_mask(layout, is_cross)  # a meta tensor has no values to read
        assert mask.shape == (1, 1, *sizes(layout, is_cross))
        assert mask.kv_indices.shape[-1] == -(-sizes(layout, is_cross)[1] // BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("is_cross", [False, True])
def test_compiled_it_skips_blocks_and_gives_the_same(is_cross, monkeypatch):
    """The kernel visits the blocks it is told: without them values would be wrong. Sizes are fixed, since torch 2.13's
    code for a CPU does not compile for cross-attention of sizes that are symbols."""
    compiled = torch.compile(flex_attention, dynamic=False)
    monkeypatch.setattr(attention_flex, "compiled_flex", lambda: compiled)
    layout = PackLayout.build([300, 5, 128], [3, 200, 64])
    tensors = values(layout, is_cross)
    got = flex_per_document(*tensors, layout, is_cross)
    torch.testing.assert_close(got, masked_sdpa(*tensors, layout, is_cross), atol=2e-6, rtol=0)


def test_on_a_cpu_it_has_no_backward_pass():
    layout = PackLayout.build([5, 3], [2, 4])
    tensors = [x.requires_grad_() for x in values(layout, False)]
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(*(x.transpose(0, 1)[None] for x in tensors), block_mask=document_mask(layout, False))
