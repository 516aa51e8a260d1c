"""Wan's weights in and out: diffusers' folders load, ours load there, pieces are read alone, mistakes are one line."""

import json
import pickle
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn
from wan_family import VARIANTS, Inputs, build_theirs

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.config.root import ConfigError
from sora_train.models import wan_weights
from sora_train.models.video_dit import VideoDiT, predict
from sora_train.models.wan_weights import WanWeights, expert_boundary, load_wan, save_wan

CONFIG = ModelConfig(
    width=24, depth=2, heads=2, mlp_width=40, in_channels=4, out_channels=4, condition_channels=3, image_width=10,
    text=TextConfig(kind=TextKind.encoder, width=16),
)  # fmt: skip
SINGLE, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def model(randomized):
    return randomized(VideoDiT(CONFIG))


@pytest.fixture
def folder(model, tmp_path):
    save_wan(model, tmp_path / "wan", max_shard_bytes=20_000)
    return tmp_path / "wan"


def same(ours, other):
    mine, theirs = ours.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    return all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("shard_bytes", [10**9, 8_000], ids=["one file", "shards"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_round_trip_through_diffusers_is_bitwise(randomized, variant, tmp_path, shard_bytes):
    diffusers = pytest.importorskip("diffusers")
    theirs = randomized(build_theirs(variant, 5))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    ours = load_wan(tmp_path / "theirs")
    save_wan(ours, tmp_path / "ours", max_shard_bytes=shard_bytes)
    assert (tmp_path / "ours" / INDEX).is_file() == (shard_bytes < 10**9)
    assert not list(tmp_path.glob(".writing*"))

    again, report = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert same(theirs, again)
    settings = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    settings = json.loads(json.dumps(settings)) | {"rope_max_seq_len": 1024}
    assert {key: value for key, value in again.config.items() if not key.startswith("_")} == settings

    again.save_pretrained(tmp_path / "again")
    back = load_wan(tmp_path / "again")
    assert same(ours, back)
    assert back.config == ours.config
    inputs, levels = Inputs.draw(variant, theirs, 0), torch.tensor([0.3, 0.7])
    pack = list(inputs.latents), levels, list(inputs.text), inputs.conditioning()
    for a, b in zip(predict(ours, *pack), predict(back, *pack), strict=True):
        assert torch.equal(a, b)


def test_our_sizes_come_back(model, folder):
    back = load_wan(folder)
    assert same(model, back)
    assert back.config == ModelConfig(**{**vars(CONFIG), "name": "wan"})
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in back.parameters())
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert max(path.stat().st_size for path in folder.glob("*.safetensors")) < 25_000


def test_precision_is_chosen_on_loading_and_kept_on_saving(model, folder, tmp_path):
    half = load_wan(folder, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16())
    save_wan(half, tmp_path / "half")
    assert same(half, load_wan(tmp_path / "half", dtype=torch.bfloat16))
    assert WanWeights(tmp_path / "half").read("proj_out.weight", 3, 4).dtype == torch.bfloat16


def test_what_is_loaded_is_not_the_file(model, folder):
    """Memory-mapped is how it is read, not how it is kept: a file written over must not change a model in training."""
    loaded, piece = load_wan(folder), WanWeights(folder).read("proj_out.weight", 3, 30)
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
    assert same(model, loaded)
    assert torch.equal(piece, model.proj_out.weight.detach().flatten()[3:33])


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_every_rank_reads_its_pieces_alone(model, folder, ranks, monkeypatch):
    """As ZeRO-3 cuts them: an equal part of every flattened parameter for each rank, the last one short or empty."""
    asked = []
    opened = wan_weights._opened

    class Recorder:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.inside = self.file.__enter__()
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def get_slice(self, name):
            piece = self.inside.get_slice(name)

            class Rows:
                def __getitem__(self, rows):
                    asked.append(piece[rows].numel())
                    return piece[rows]

            return Rows()

    weights = WanWeights(folder)
    monkeypatch.setattr(wan_weights, "_opened", lambda path: Recorder(opened(path)))
    whole = {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}
    filled = {name: torch.full_like(values, torch.nan, dtype=torch.float64) for name, values in whole.items()}
    for rank in range(ranks):
        asked.clear()
        pieces = []
        for name, values in filled.items():
            part = -(-values.numel() // ranks)
            start = min(part * rank, values.numel())
            pieces.append((name, start, values[start : start + part]))
        weights.fill(pieces)
        assert len(asked) == len(pieces)
        for (name, _, view), count in zip(pieces, asked, strict=True):
            shape = weights.shapes[name]
            assert count <= view.numel() + 2 * torch.Size(shape[1:]).numel(), f"{name}: more than the rows it lies in"
    for name, values in filled.items():
        assert torch.equal(values.float(), whole[name]), name


def test_reading_names_what_is_wrong(folder):
    weights = WanWeights(folder)
    assert pickle.loads(pickle.dumps(weights)).read("proj_out.bias").shape == (16,)  # for another process
    with pytest.raises(KeyError):
        weights.read("proj_out.gain")
    for start, length in ((-1, 2), (10, 7), (17, None)):
        with pytest.raises(ValueError, match=r"of proj_out\.bias, which has 16"):
            weights.read("proj_out.bias", start, length)
    assert weights.read("proj_out.bias", 16).numel() == 0


def pipeline(folder, tmp_path, boundary):
    """As Wan 2.2 A14B is laid out: two experts, the second with other weights."""
    pipe = tmp_path / "pipe"
    shutil.copytree(folder, pipe / "transformer")
    other = load_wan(folder)
    with torch.no_grad():
        nn.init.ones_(other.proj_out.bias)
    save_wan(other, pipe / "transformer_2")
    (pipe / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": boundary}))
    return pipe


def test_experts_are_chosen_by_noise(model, folder, tmp_path):
    pipe = pipeline(folder, tmp_path, 0.875)
    assert same(load_wan(pipe, "high"), model)
    assert (load_wan(pipe, expert="low").proj_out.bias == 1).all()
    assert expert_boundary(pipe) == 0.875
    with pytest.raises(ConfigError, match="two experts: give expert=high or expert=low"):
        load_wan(pipe)
    with pytest.raises(ConfigError, match="expert=medium is not known: use high or low"):
        load_wan(pipe, "medium")
    with pytest.raises(ConfigError, match="is one transformer"):
        load_wan(folder, "low")
    shutil.rmtree(pipe / "transformer_2")
    assert expert_boundary(pipe) is None
    assert same(load_wan(pipe), model)
    with pytest.raises(ConfigError, match="has one transformer: give no expert"):
        load_wan(pipe, "high")
    with pytest.raises(ConfigError, match="boundary_ratio=None is not between 0 and 1"):
        expert_boundary(pipeline(folder, tmp_path / "none", None))


def rewrite(path, change):
    """Changes the tensors of a file."""
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def settings(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BREAKAGES = {
    "no folder": (shutil.rmtree, "is no folder here"),
    "no config": (lambda f: (f / "config.json").unlink(), r"holds no config\.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    "odd config": (lambda f: (f / "config.json").write_text("[]"), "holds no settings"),
    "class": (lambda f: settings(f, _class_name="WanVACETransformer3DModel"), "is of a WanVACETransformer3DModel"),
    "unknown field": (lambda f: settings(f, window=3), "window=3 is not known here"),
    "kind of field": (lambda f: settings(f, num_layers="2"), "num_layers='2' is not of the kind of 40"),
    "patch": (lambda f: settings(f, patch_size=[1, 2]), r"patch_size=\[1, 2\] is not"),
    "norm": (lambda f: settings(f, qk_norm="layer_norm"), "qk_norm=layer_norm is not known"),
    "channels": (lambda f: settings(f, out_channels=9), "in_channels=7 is below out_channels=9"),
    "image": (lambda f: settings(f, added_kv_proj_dim=7), "added_kv_proj_dim=7 with image_dim=10 is not Wan's"),
    "half an image": (lambda f: settings(f, image_dim=None), "added_kv_proj_dim=24 with image_dim=None"),
    "heads": (lambda f: settings(f, attention_head_dim=11, added_kv_proj_dim=22), "model.width=22"),
    "another size": (lambda f: settings(f, num_layers=3), "lacks blocks.2.attn1.norm_k.weight, .* and 29 more"),
    "fewer layers": (lambda f: settings(f, num_layers=1), "has the unknown blocks.1.attn1.norm_k.weight"),
    "shape": (lambda f: settings(f, ffn_dim=41), r"is F32 \(40, 24\), its config.json asks for floating \(41, 24\)"),
    "quantised": (
        lambda f: rewrite(f / SINGLE, lambda t: t.update({"proj_out.bias": torch.zeros(16, dtype=torch.int8)})),
        r"proj_out.bias is I8 \(16,\)",
    ),
    "missing": (lambda f: rewrite(f / SINGLE, lambda t: t.pop("proj_out.bias")), r"lacks proj_out\.bias:"),
    "unknown": (
        lambda f: rewrite(f / SINGLE, lambda t: t.update({"gain": torch.zeros(1)})),
        "has the unknown gain:",
    ),
    "lora": (
        lambda f: rewrite(f / SINGLE, lambda t: t.update({"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1)})),
        "holds blocks.0.attn1.to_q.lora_A.weight, weights of a LoRA: merge it",
    ),
    "truncated": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-8]), "cannot be read"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "holds no safetensors"),
    "pickled": (
        lambda f: (f / SINGLE).rename(f / "diffusion_pytorch_model.bin"),
        r"diffusion_pytorch_model\.bin is pickled, which can run code: convert it to safetensors",
    ),
    "no index": (
        lambda f: (shutil.copy(f / SINGLE, f / "b.safetensors"), (f / SINGLE).rename(f / "a.safetensors")),
        "holds 2 safetensors but no diffusion_pytorch_model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_mistakes_are_one_line(model, tmp_path, name):
    save_wan(model, tmp_path / "wan")
    change, message = BREAKAGES[name]
    change(tmp_path / "wan")
    with pytest.raises(ConfigError, match=message) as caught:
        load_wan(tmp_path / "wan")
    assert "\n" not in str(caught.value)


def index(folder, change):
    path = folder / INDEX
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("weight_map"), "holds no weight_map"),
        (lambda v: v["weight_map"].update(gain="gone.safetensors"), r"names gone\.safetensors, which is not there"),
        (lambda v: v["weight_map"].update(gain="../outside.safetensors"), "names ../outside.safetensors, which is not"),
        (lambda v: v["weight_map"].update(gain="config.bin"), r"config\.bin is pickled"),
        (lambda v: v["weight_map"].update(gain=min(v["weight_map"].values())), "lacks gain, which"),
    ],
)
def test_an_index_that_is_wrong_is_refused(folder, change, message):
    (folder.parent / "outside.safetensors").write_bytes(b"")
    (folder / "config.bin").write_bytes(b"")
    index(folder, change)
    with pytest.raises(ConfigError, match=message):
        load_wan(folder)


def test_a_tensor_that_diffusers_skips_is_skipped(model, tmp_path):
    save_wan(model, tmp_path / "wan")
    rewrite(
        tmp_path / "wan" / SINGLE,
        lambda tensors: tensors.update({"blocks.0.attn2.norm_added_q.weight": torch.zeros(24)}),
    )
    assert same(model, load_wan(tmp_path / "wan"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": TextConfig(width=16, heads=2)}, "model.text.kind=bytes: diffusers' WanTransformer3DModel knows only"),
        ({"qk_norm": False}, "model.qk_norm=False"),
        ({"rope_theta": 100.0}, "model.rope_theta=100.0: .* only 10000.0"),
        ({"out_channels": 8}, "model.out_channels=8: .* only 4"),
    ],
)
def test_what_diffusers_has_not_is_not_saved(tmp_path, changed, message):
    with pytest.raises(ConfigError, match=message):
        save_wan(VideoDiT(ModelConfig(**{**vars(CONFIG), **changed})), tmp_path / "wan")
    assert not list(tmp_path.iterdir())


def test_a_save_is_whole_or_absent(model, tmp_path, monkeypatch):
    target = tmp_path / "wan"
    with torch.device("meta"):
        partitioned = VideoDiT(CONFIG)
    with pytest.raises(ValueError, match="is not whole here"):
        save_wan(partitioned, target)

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(wan_weights, "save_file", full)
        with pytest.raises(ConfigError, match=r"cannot be written \(No space"):
            save_wan(model, target)
    assert not list(tmp_path.iterdir())
    target.mkdir()  # empty: as a tool may have made it
    save_wan(model, target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", SINGLE]
    with pytest.raises(ConfigError, match="exists: give a folder that does not"):
        save_wan(model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["wan"]
