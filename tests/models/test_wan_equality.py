"""The transformer against diffusers' WanTransformer3DModel with the same weights, and the sizes Wan published."""

import pytest
import torch

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.models.video_dit import VideoDiT, predict

RENAMED = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.linear_1",
    "condition_embedder.time_embedder.linear_2": "time_embedding.linear_2",
    "condition_embedder.time_proj": "time_embedding.project",
    "condition_embedder.text_embedder": "text_projection",
    "to_out.0": "to_out",
    "ffn.net.0.proj": "ffn.up",
    "ffn.net.2": "ffn.down",
}


def renamed(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def pair(randomized, heads: int, head_width: int):
    torch.manual_seed(0)
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=head_width, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=40, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    randomized(theirs)
    config = ModelConfig(
        width=heads * head_width, depth=2, heads=heads, mlp_width=40, in_channels=4, out_channels=4, frequency_width=32,
        text=TextConfig(kind=TextKind.encoder, width=16),
    )  # fmt: skip
    ours = VideoDiT(config)
    state = {renamed(name): value for name, value in theirs.state_dict().items()}
    state["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
    ours.load_state_dict(state, strict=True)
    return theirs, ours


@pytest.mark.parametrize(("heads", "head_width"), [(2, 12), (3, 16)])
@pytest.mark.parametrize(("t", "tolerance"), [(0.004, 1e-5), (0.6, 5e-5), (1.0, 5e-5)])
def test_outputs_equal_diffusers(randomized, heads, head_width, t, tolerance):
    theirs, ours = pair(randomized, heads, head_width)
    latents, text = torch.randn(2, 4, 3, 6, 8), torch.randn(2, 7, 16)
    levels = torch.tensor([t, t / 2])
    with torch.no_grad():
        expected = theirs(latents, levels * 1000, text).sample
        got = torch.stack(predict(ours, list(latents), levels, list(text)))
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def test_gradients_equal_diffusers(randomized):
    theirs, ours = pair(randomized, 2, 12)
    latents, text = torch.randn(2, 4, 2, 4, 6), torch.randn(2, 5, 16)
    levels, weights = torch.tensor([0.001, 0.005]), torch.randn(2, 4, 2, 4, 6)
    (theirs(latents, levels * 1000, text).sample * weights).sum().backward()
    (torch.stack(predict(ours, list(latents), levels, list(text))) * weights).sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        gradient = mine[renamed(name)].grad.reshape(parameter.shape)
        difference = (gradient - parameter.grad).norm() / (parameter.grad.norm() + 1e-3)
        assert difference < 1e-5, name


@pytest.mark.parametrize(
    ("width", "depth", "heads", "mlp_width", "parameters"),
    [(1536, 30, 12, 8960, 1_418_996_800), (5120, 40, 40, 13824, 14_288_491_584)],
    ids=["1.3B", "14B"],
)
def test_parameter_counts_are_wans(width, depth, heads, mlp_width, parameters):
    text = TextConfig(kind=TextKind.encoder, width=4096)
    with torch.device("meta"):
        model = VideoDiT(ModelConfig(width=width, depth=depth, heads=heads, mlp_width=mlp_width, text=text))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
