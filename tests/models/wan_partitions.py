"""Run under torchrun by test_wan_partitions.py: each rank fills what it holds from a folder, at every ZeRO stage."""

import json
import sys
from pathlib import Path

import torch

from sora_train.config.optim import OptimConfig
from sora_train.config.parallel import ParallelConfig, Precision
from sora_train.distributed import runtime
from sora_train.distributed.engine import build_engine
from sora_train.distributed.partitions import apply_loaded, fragments
from sora_train.models.video_dit import VideoDiT
from sora_train.models.wan_weights import WanWeights, load_wan
from sora_train.training.optim import build_optimizer

OPTIM = OptimConfig()


def main(folder: str, out: str) -> None:
    world = runtime.start(threads=1)
    from deepspeed import zero  # after the start, which says on what it runs

    weights, wanted = WanWeights(folder), load_wan(folder)
    results = []
    for stage in range(4):
        torch.manual_seed(stage)
        model = VideoDiT(weights.config)
        parallel = ParallelConfig(zero_stage=stage, precision=Precision.fp32)
        engine = build_engine(model, build_optimizer(model, OPTIM, world.device), parallel, OPTIM)
        held = fragments(engine)
        weights.fill((fragment.name, fragment.start, fragment.master) for fragment in held)
        apply_loaded(engine, 0)
        parameters = dict(engine.module.named_parameters())
        with zero.GatheredParameters(list(parameters.values())) if stage == 3 else torch.no_grad():
            wrong = [name for name, p in parameters.items() if not torch.equal(p.data, wanted.get_parameter(name).data)]
        share = sum(fragment.length for fragment in held) / sum(p.numel() for p in wanted.parameters())
        results.append({"stage": stage, "wrong": wrong, "share": share})
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    runtime.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
