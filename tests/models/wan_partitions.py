"""Run under torchrun by test_wan_partitions.py: each rank starts from a folder, at every ZeRO stage."""

import json
import sys
from pathlib import Path

import torch

from sora_train.config.initial import InitConfig
from sora_train.config.optim import EmaConfig, OptimConfig
from sora_train.config.parallel import ParallelConfig, Precision
from sora_train.distributed import runtime
from sora_train.distributed.engine import build_engine
from sora_train.distributed.partitions import fragments, optimizer_steps, reset_optimizer
from sora_train.models.video_dit import VideoDiT
from sora_train.models.wan_weights import WanWeights, load_wan
from sora_train.training.checkpoint import TrainState
from sora_train.training.ema import Ema
from sora_train.training.initial_weights import load_initial
from sora_train.training.optim import build_optimizer

OPTIM = OptimConfig()


def main(folder: str, out: str) -> None:
    world = runtime.start(threads=1)
    from deepspeed import zero  # after the start, which says on what it runs

    weights, wanted, init = WanWeights(folder), load_wan(folder), InitConfig(weights=folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.named_parameters()}
    results = []
    for stage in range(4):
        torch.manual_seed(stage)
        model = VideoDiT(weights.config)
        parallel = ParallelConfig(zero_stage=stage, precision=Precision.fp32)
        engine = build_engine(model, build_optimizer(model, OPTIM, world.device), parallel, OPTIM)
        held = fragments(engine)
        ema = Ema(held, EmaConfig())
        reset_optimizer(engine)
        before = [fragment.master.clone() for fragment in held]
        load_initial(init, engine, held, ema, TrainState(3), world)
        untouched = all(torch.equal(fragment.master, values) for fragment, values in zip(held, before, strict=True))
        load_initial(init, engine, held, ema, TrainState(), world)
        parameters = dict(engine.module.named_parameters())
        with zero.GatheredParameters(list(parameters.values())) if stage == 3 else torch.no_grad():
            wrong = [name for name, p in parameters.items() if not torch.equal(p.data, wanted.get_parameter(name).data)]
        averages = ema.gather(shapes)
        wrong += [name for name in shapes if not torch.equal(averages[name], wanted.get_parameter(name))]
        share = sum(fragment.length for fragment in held) / sum(p.numel() for p in wanted.parameters())
        steps = optimizer_steps(engine)
        results.append({"stage": stage, "wrong": wrong, "share": share, "untouched": untouched, "steps": steps})
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    runtime.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
