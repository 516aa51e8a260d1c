"""Guidance: two predictions of the same samples, with and without their text, as one."""

from collections.abc import Sequence

from torch import Tensor


def guided(with_text: Tensor, without_text: Tensor, scale: float) -> Tensor:
    """without + scale (with - without) (Ho & Salimans 2022, arXiv:2207.12598); 1 is the prediction with text."""
    return without_text + scale * (with_text - without_text)


def guided_samples(with_text: Sequence[Tensor], without_text: Sequence[Tensor], scale: float) -> list[Tensor]:
    """`guided` for each sample of a list."""
    return [guided(a, b, scale) for a, b in zip(with_text, without_text, strict=True)]
