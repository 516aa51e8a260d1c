import json
import math
from pathlib import Path

import pytest
import torch
import wandb

from sora_train.config.parallel import ParallelConfig
from sora_train.config.root import ConfigError, TrainConfig, build_config
from sora_train.distributed.topology import World
from sora_train.training import metrics as metrics_module
from sora_train.training.metrics import CAPTION_KINDS, Means, Metrics, PackLoss
from sora_train.training.run import resolved
from sora_train.training.tracking import METRICS, Tracker, drop_after, read_metrics

WORLD = World(global_rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


def pack_loss(loss: float, t: list[float], losses: list[float], weights: list[float]) -> PackLoss:
    return PackLoss(
        loss=torch.tensor(loss, requires_grad=True),
        sample_loss_S=torch.tensor(losses),
        t_S=torch.tensor(t),
        weight_S=torch.tensor(weights),
        kind_S=torch.tensor([0, len(CAPTION_KINDS) - 1][: len(t)]),
        counts=torch.tensor([10, sum(weights), 5, 1e9], dtype=torch.float64),
        tried=len(weights),
    )


def test_losses_by_step_and_by_quarter_of_t() -> None:
    metrics = Metrics(WORLD, ParallelConfig())
    metrics.add(pack_loss(1.0, [0.1, 0.9], [2.0, 4.0], [1.0, 1.0]))
    metrics.add(pack_loss(0.5, [0.2, 0.95], [6.0, 100.0], [1.0, 0.0]))  # the last one was masked
    metrics.end_step()
    metrics.add(pack_loss(2.5, [1.0], [8.0], [1.0]))
    metrics.end_step()
    means = metrics.reduce()
    assert means.step_losses == [1.5, 2.5]
    assert means.loss == 2.0
    assert means.values["loss_t1of4"] == 4.0
    assert means.values["loss_t4of4"] == 6.0
    assert "loss_t2of4" not in means.values
    assert means.values["tokens_per_step"] == 15.0
    assert means.values["loss_caption_original_short"] == (2.0 + 6.0 + 8.0) / 3
    assert means.values["loss_caption_none"] == 4.0, "the masked one does not count"
    assert (means.clips, means.failed, means.values["failed_clips"]) == (4, 1, 1)
    assert "mfu" not in means.values, "the peak of a CPU is not known and not guessed"
    metrics.add(pack_loss(7.0, [0.1], [7.0], [1.0]))
    metrics.end_step()
    assert metrics.reduce().step_losses == [7.0], "the sums start anew"


def test_validation_and_saving_do_not_slow_the_steps_down(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 52.0, 54.0, 54.0])  # start, pause begins, pause ends, reduce, anew
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: next(clock))
    metrics = Metrics(WORLD, ParallelConfig())
    metrics.add(pack_loss(1.0, [0.1], [2.0], [1.0]))
    metrics.end_step()
    with metrics.paused():
        pass
    means = metrics.reduce()
    assert means.values["step_seconds"] == 4.0
    assert means.values["tokens_per_second"] == 2.5


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    metrics = Metrics(WORLD, ParallelConfig())
    metrics.add(pack_loss(math.nan, [0.1], [math.nan], [1.0]))
    metrics.end_step()
    with pytest.raises(FloatingPointError, match="not finite"):
        metrics.reduce()


def tracker(folder: Path, start_step: int) -> Tracker:
    values = {"run_dir": str(folder), "steps": 10, "data": {"shards": "x"}, "tracking": {"wandb": "disabled"}}
    config = build_config(TrainConfig, values)
    return Tracker(config, resolved(config), enabled=True, start_step=start_step)


def test_a_line_a_step_and_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    means = {"tokens_per_second": 1.0, "step_seconds": 0.1}
    first = tracker(tmp_path, 0)
    first.log(3, Means([3.0, 2.0, 1.0], means, 5, 0), {"learning_rate": 0.1})
    first.log(5, Means([0.5, 0.4], means, 5, 0), {})
    first.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    second = tracker(tmp_path, 4)
    second.log(6, Means([0.4, 0.3], means, 5, 0), {})
    second.close()
    rows = read_metrics(tmp_path / METRICS)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5), (5, 0.4), (6, 0.3)]
    assert rows[2]["learning_rate"] == 0.1
    assert "tokens_per_second" not in rows[1]


def test_a_gradient_norm_that_overflowed_is_null(tmp_path: Path) -> None:
    track = tracker(tmp_path, 0)
    means = Means([1.0], {"tokens_per_second": 1.0, "step_seconds": 0.1}, 5, 0)
    track.log(1, means, {"gradient_norm": math.inf})
    track.close()
    assert "Infinity" not in (tmp_path / METRICS).read_text()
    assert read_metrics(tmp_path / METRICS)[0]["gradient_norm"] is None


def test_validation_stands_in_the_same_file(tmp_path: Path) -> None:
    track = tracker(tmp_path, 0)
    track.log_validation(5, {"held_out_loss": 0.25}, {"a cat": tmp_path / "00.mp4"})
    track.close()
    assert read_metrics(tmp_path / METRICS) == [{"step": 5, "held_out_loss": 0.25, "samples": {"00.mp4": "a cat"}}]


def test_wandb_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", refuse)
    values = {"run_dir": str(tmp_path), "data": {"shards": "x"}, "tracking": {"wandb": "online"}}
    with pytest.raises(ConfigError, match=r"tracking\.wandb=online: No API key configured\. Use"):
        Tracker(build_config(TrainConfig, values), {}, enabled=True, start_step=0)


def test_dropping_from_nothing_is_nothing(tmp_path: Path) -> None:
    drop_after(tmp_path / METRICS, 3)
    assert not (tmp_path / METRICS).exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    config = build_config(TrainConfig, {"run_dir": str(tmp_path / "run"), "data": {"shards": "x"}})
    silent = Tracker(config, {}, enabled=False, start_step=0)
    silent.log(1, Means([1.0], {}, 5, 0), {})
    silent.close()
    assert not (tmp_path / "run").exists()
    assert json.dumps(resolved(config))
