"""The model that validation looks through is the one that training computes with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sora_train.config.root import TrainConfig, build_config
from sora_train.distributed.sequence_parallel import SequenceGroups
from sora_train.distributed.topology import World
from sora_train.models.video_dit import VideoDiT
from sora_train.training import validation
from sora_train.training.tracking import Tracker, read_metrics

WORLD = World(global_rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_weights_are_in_the_precision_that_the_attention_kernel_was_chosen_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    model = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 16, "in_channels": 96, "out_channels": 96}
    values = {"run_dir": str(tmp_path), "data": {"shards": "x"}, "model": {**model, "text": {"width": 16, "heads": 2}}}
    parallel = {"parallel": {"precision": precision}, "tracking": {"wandb": "disabled"}}
    config = build_config(TrainConfig, {**values, **parallel})
    average = dict(VideoDiT(config.model).named_parameters())
    seen: list[Any] = []
    monkeypatch.setattr(validation, "parallelize", lambda model, *_, is_quiet: seen.append(model))
    encoders: Any = SimpleNamespace(codec=SimpleNamespace(shape=None), encode_text=list)
    loader: Any = SimpleNamespace(validation_packs=lambda clips: [])
    ema: Any = SimpleNamespace(each_whole=lambda shapes: iter(average.items()))
    tracker = Tracker(config, {}, enabled=True, start_step=0)
    validation.Validation(config, WORLD, loader, encoders, {}, SequenceGroups({})).run(ema, tracker, 3)
    tracker.close()
    for name, parameter in seen[0].named_parameters():
        assert torch.equal(parameter, average[name].to(dtype)), name
    assert {parameter.dtype for parameter in seen[0].parameters()} == {dtype}
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3}]
