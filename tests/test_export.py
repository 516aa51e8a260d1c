"""Weights of a checkpoint for others to load, from pieces of several ranks, a file at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from wan_folder import random_model, tiny_model

from sora_train import export as export_module
from sora_train.config.model import ModelConfig, TextConfig
from sora_train.config.root import ConfigError, TrainConfig, build_config, load_config
from sora_train.export import export, export_weights
from sora_train.models.video_dit import VideoDiT, predict
from sora_train.models.wan_weights import load_wan
from sora_train.training.fragment_files import FORMAT_VERSION, MANIFEST, PieceReader, digest, entry_of
from sora_train.training.run import resolved

BYTES = ModelConfig(width=16, depth=1, heads=2, mlp_width=16, text=TextConfig(width=8, layers=1, heads=2, max_bytes=9))


def save_checkpoint(run_dir: Path, average: VideoDiT, last: VideoDiT | None, ranks: int = 2) -> None:
    """As training writes it: each rank a part of every parameter. Without `last`, an average alone."""
    folder = run_dir / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    values = {"data": {"shards": "x"}, "model": resolved(TrainConfig(model=average.config))["model"]}
    entries, pieces = [], []
    for rank in range(ranks):
        tensors, held = {}, []
        for kind, model in (("ema", average), ("master", last)):
            for name, parameter in (model.named_parameters() if model is not None else ()):
                size = parameter.numel()
                start, stop = size * rank // ranks, size * (rank + 1) // ranks
                if start < stop:
                    tensors[f"{kind}/{name}@{start}"] = parameter.detach().flatten()[start:stop].clone()
                    held += [(name, start, stop)] if kind == "ema" else []
        save_file(tensors, folder / f"rank-{rank:05d}.safetensors")
        entries.append(entry_of(folder / f"rank-{rank:05d}.safetensors"))
        pieces.append(held)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "step": 7, "files": entries, "pieces": pieces,
        "parameters": {name: list(p.shape) for name, p in average.named_parameters()},
        "config": resolved(build_config(TrainConfig, values)), "data_sha256": {},
    }  # fmt: skip
    manifest = json.loads(json.dumps(manifest))
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": digest(manifest)}))


def test_a_wan_model_is_what_diffusers_loads(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    average, last = random_model(tiny_model(), 3), random_model(tiny_model(), 4)
    save_checkpoint(tmp_path / "run", average, last)
    for kind, model in (("ema", average), ("master", last)):
        out = tmp_path / kind
        line = export_weights(tmp_path / "run", out, kind, max_shard_bytes=20_000)
        assert line.endswith("weights after step 7, for diffusers' WanTransformer3DModel")
        theirs, report = diffusers.WanTransformer3DModel.from_pretrained(out, output_loading_info=True)
        assert not any(report.values()), report
        assert len(list(out.glob("*.safetensors"))) > 3
        torch.manual_seed(0)
        latents, rows, t = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 7, 12), torch.tensor([0.03125])
        (ours,) = predict(model, list(latents), t, list(rows))
        torch.testing.assert_close(ours, theirs(latents, t * 1000, rows).sample[0], atol=1e-5, rtol=1e-5)
        for name, parameter in load_wan(out).named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_model_that_reads_bytes_comes_with_its_config(tmp_path: Path) -> None:
    model = random_model(BYTES, 0)
    save_checkpoint(tmp_path / "run", model, model, ranks=3)
    line = export_weights(tmp_path / "run", tmp_path / "out")
    assert "config.yaml (model.text.kind=bytes" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.yaml", "model.safetensors"]
    built = VideoDiT(load_config(TrainConfig, tmp_path / "out" / "config.yaml").model)
    built.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    for name, parameter in built.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_no_more_than_a_file_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read and not yet written, in bytes; a tensor larger than a file is one of its own."""
    model = random_model(tiny_model(), 0)
    save_checkpoint(tmp_path / "run", model, model)
    held, most = [0], [0]
    fill, save = PieceReader.fill, export_module.write_wan.__globals__["save_file"]

    def counted_fill(self: PieceReader, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        held[0] += into.nbytes
        most[0] = max(most[0], held[0])
        fill(self, kind, name, start, into)

    def counted_save(tensors: Any, *others: Any, **more: Any) -> None:
        held[0] -= sum(tensor.nbytes for tensor in tensors.values())
        save(tensors, *others, **more)

    monkeypatch.setattr(PieceReader, "fill", counted_fill)
    monkeypatch.setitem(export_module.write_wan.__globals__, "save_file", counted_save)
    export_weights(tmp_path / "run", tmp_path / "out", max_shard_bytes=20_000)
    assert held == [0]
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert most[0] <= max(20_000, largest) < sum(parameter.nbytes for parameter in model.parameters()) / 3


def test_an_average_alone_has_no_last_weights(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run", random_model(BYTES, 0), None)
    with pytest.raises(ConfigError, match="holds an average alone: leave --raw out"):
        export_weights(tmp_path / "run", tmp_path / "new", "master")
    export_weights(tmp_path / "run", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    save_checkpoint(tmp_path / "run", random_model(BYTES, 0), None)
    monkeypatch.setitem(export_module.write_wan.__globals__, "save_file", full)
    with pytest.raises(ConfigError, match=r"new cannot be written \(I/O error: No space left on device"):
        export_weights(tmp_path / "run", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_nothing_is_overwritten_and_mistakes_are_one_line(tmp_path: Path) -> None:
    model = random_model(BYTES, 0)
    save_checkpoint(tmp_path / "run", model, model)
    app = typer.Typer()
    app.command()(export)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for arguments, says in (
        (["run", "out"], f"error: {tmp_path / 'out'} exists: give a folder that does not\n"),
        (["nothing", "new"], "holds no whole checkpoint: give the directory of a run that has saved one\n"),
        (["run", "out/mine/new"], "cannot be written"),
    ):
        result = CliRunner().invoke(app, [str(tmp_path / name) for name in arguments])
        assert result.exit_code == 2, result.output
        assert says in result.output
        assert result.output.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    result = CliRunner().invoke(app, [str(tmp_path / "run"), str(tmp_path / "new"), "--raw"])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'new'}: weights after step 7" in result.output
    with pytest.raises(ConfigError, match="exists"):
        export_weights(tmp_path / "run", tmp_path / "new")
