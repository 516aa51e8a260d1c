"""RMSNorm with its own backward pass: torch's values and gradients, and less kept for them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sora_train.models.norms import RMSNorm


def case(dtype: torch.dtype) -> tuple[RMSNorm, Tensor, Tensor]:
    """A norm, rows of very different size, one of them zero, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(24, eps=1e-3)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.3, generator=generator)
    rows = torch.randn(9, 24, generator=generator) * torch.logspace(-3, 3, 9)[:, None]
    rows[4] = 0
    return norm.to(dtype), rows.to(dtype).requires_grad_(), torch.randn(9, 24, generator=generator).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_values_and_gradients_are_those_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    norm, rows, grad = case(dtype)
    out = norm(rows)
    got = (out, *torch.autograd.grad(out, (rows, norm.weight), grad))
    wide_rows, wide_weight = (x.detach().double().requires_grad_() for x in (rows, norm.weight))
    expected = F.rms_norm(wide_rows, (24,), wide_weight, 1e-3)
    exact = (expected, *torch.autograd.grad(expected, (wide_rows, wide_weight), grad.double()))
    for mine, theirs in zip(got, exact, strict=True):
        assert mine.dtype is dtype
        error = (mine.double() - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-9)
        assert error.max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_are_kept_as_they_came_and_a_number_each(dtype: torch.dtype) -> None:
    norm, rows, _ = case(dtype)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(rows)
    assert sorted(tensor.nbytes for tensor in kept) == sorted((rows.nbytes, norm.weight.nbytes, 4 * len(rows)))


def test_other_devices_take_torchs_kernel() -> None:
    out = RMSNorm(8, eps=1e-6, device="meta")(torch.empty(3, 8, device="meta", requires_grad=True))
    assert out.shape == (3, 8)
    assert "ClosedForm" not in type(out.grad_fn).__name__
