"""Tiny models with random weights (nothing left at zero, so that every path counts) and mixed packs."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.models.inputs import Conditioning
from sora_train.models.video_dit import VideoDiT

Model = TypeVar("Model", bound=nn.Module)

BYTES = ModelConfig(
    width=24, depth=2, heads=2, mlp_width=40, in_channels=4, out_channels=4,
    text=TextConfig(width=16, layers=1, heads=2, max_bytes=24),
)  # fmt: skip
ROWS = ModelConfig(
    width=24, depth=2, heads=2, mlp_width=40, in_channels=4, out_channels=4,
    text=TextConfig(kind=TextKind.encoder, width=16),
)  # fmt: skip

IMAGE = ModelConfig(
    width=24, depth=2, heads=2, mlp_width=40, in_channels=4, out_channels=4, condition_channels=3, image_width=10,
    text=TextConfig(kind=TextKind.encoder, width=16),
)  # fmt: skip


def randomize(model: Model, seed: int = 0) -> Model:
    """Keeps activations near 1 and every gradient well above rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
                parameter.normal_(std=1.0, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(mean=1.0, std=0.2, generator=generator)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 and "table" not in name else 25
                parameter.normal_(std=fan_in**-0.5, generator=generator)
    return model


@pytest.fixture
def randomized() -> Callable[[Model], Model]:
    return randomize


@pytest.fixture
def byte_model() -> VideoDiT:
    return randomize(VideoDiT(BYTES))


@pytest.fixture
def rows_model() -> VideoDiT:
    return randomize(VideoDiT(ROWS))


@pytest.fixture
def image_model() -> VideoDiT:
    return randomize(VideoDiT(IMAGE))


@pytest.fixture
def conditioning(samples: tuple[list[Tensor], Tensor, list[str]]) -> Conditioning:
    """Of the image model for the four samples: images of different size, none or some frames clean."""
    generator = torch.Generator().manual_seed(5)
    return Conditioning(
        latents=[torch.randn(3, *sample.shape[1:], generator=generator) for sample in samples[0]],
        image=[torch.randn(rows, 10, generator=generator) for rows in (3, 5, 1, 2)],
        clean_frames=[1, 0, 2, 1],
    )


@pytest.fixture
def samples() -> tuple[list[Tensor], Tensor, list[str]]:
    """Four samples, one of a single token: latents, t, captions."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 3, 4, 6), (4, 1, 2, 2), (4, 2, 8, 4), (4, 1, 6, 6)]
    latents = [torch.randn(shape, generator=generator) for shape in shapes]
    return latents, torch.tensor([0.9, 0.2, 0.5, 0.05]), ["a red circle", "", "日本, moving left", "still"]


@pytest.fixture
def text_rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(length, 16, generator=generator) for length in (5, 1, 7, 3)]
