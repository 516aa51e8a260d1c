"""Who decays, who is orthogonalized, and Muon against torch's own on one process."""

import copy

import pytest
import torch
from torch import nn

from sora_train.config.model import ModelConfig, TextConfig
from sora_train.config.optim import OptimConfig, OptimizerKind
from sora_train.distributed.muon import Muon, Place, orthogonalized
from sora_train.models.video_dit import VideoDiT
from sora_train.training.optim import build_optimizer, parameter_groups

CPU = torch.device("cpu")
ADAMW = OptimConfig(weight_decay=0.1)
MUON = OptimConfig(kind=OptimizerKind.muon, weight_decay=0.1)
MODEL = ModelConfig(width=24, depth=1, heads=2, mlp_width=48, image_width=8, text=TextConfig(width=16, layers=1))


def names_by_group(config: OptimConfig) -> list[set[str]]:
    model = VideoDiT(MODEL)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    found = [{names[id(parameter)] for parameter in group["params"]} for group in groups]
    assert sum(map(len, found)) == len(names), "every parameter is in one group"
    return found


def test_matrices_decay_and_nothing_else() -> None:
    matrices, others = names_by_group(ADAMW)
    assert {"patch_embedding.weight", "blocks.0.attn1.to_q.weight", "time_embedding.project.weight"} <= matrices
    assert {"byte_text.embedding.weight", "byte_text.positions.weight"} <= others, "looked up, not multiplied with"
    assert {"scale_shift_table", "blocks.0.scale_shift_table", "blocks.0.norm2.weight", "proj_out.bias"} <= others
    assert [group["weight_decay"] for group in parameter_groups(VideoDiT(MODEL), ADAMW)] == [0.1, 0.0]


def test_muon_takes_the_matrices_of_blocks() -> None:
    muon, matrices, others = names_by_group(MUON)
    assert muon == {name for name in names_by_group(ADAMW)[0] if "blocks." in name}
    assert "byte_text.blocks.0.up.weight" in muon
    assert {"patch_embedding.weight", "proj_out.weight", "text_projection.linear_1.weight"} <= matrices
    assert others == names_by_group(ADAMW)[1]


def test_what_is_not_trained_is_in_no_group_and_no_group_is_empty() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    model[0].requires_grad_(False)
    (group,) = parameter_groups(model, MUON)
    assert group["params"] == [model[1].weight]


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonalized_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert 0.5 < values.min() <= values.max() < 1.3
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def test_muon_is_torchs_muon_bitwise_in_bf16() -> None:
    torch.manual_seed(3)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 5), nn.Linear(5, 5)])})
    twin = copy.deepcopy(model)
    optimizer = build_optimizer(model, MUON, CPU)
    assert isinstance(optimizer, Muon)
    optimizer.dtype = torch.bfloat16  # as on CUDA
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    places = [
        Place(str(number), tuple(matrix.shape), 0, matrix.numel(), number, 0) for number, matrix in enumerate(matrices)
    ]
    optimizer.locate(matrices, places)
    expected = [parameter for parameter in twin.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in twin.parameters() if parameter.ndim != 2]
    references = [
        torch.optim.Muon(expected, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.02, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    for step in range(4):
        draw = torch.Generator().manual_seed(step)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            other.grad = parameter.grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        optimizer.step()
        for reference in references:
            reference.step()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)
