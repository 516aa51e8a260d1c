"""Trains a video diffusion transformer: the loop, from the first line to the last.

    torchrun --nproc_per_node 8 -m sora_train.train data.shards=DIR name=my_run model=b
    python -m sora_train.train …            a world of one, on a laptop

To resume, run the same command again. `launch.submit` starts this on one machine or many.
"""

import torch

from sora_train.config.command import hydra_app
from sora_train.config.parallel import regroups
from sora_train.config.root import TrainConfig
from sora_train.cost.memory import largest_pack
from sora_train.data.loader import build_loader
from sora_train.distributed import runtime
from sora_train.distributed.engine import accumulate, build_engine, gradient_norm, set_learning_rate
from sora_train.distributed.parallelize import build_groups, check_memory, parallelize
from sora_train.distributed.partitions import fragments
from sora_train.encoders.video_codec import codec_shape
from sora_train.models.video_dit import VideoDiT
from sora_train.training import run
from sora_train.training.checkpoint import Checkpoints, TrainState
from sora_train.training.ema import Ema
from sora_train.training.ema_snapshots import Snapshots
from sora_train.training.initial_weights import load_initial
from sora_train.training.metrics import Metrics
from sora_train.training.optim import build_optimizer
from sora_train.training.quarantine import Quarantine
from sora_train.training.resilience import AgreedStop
from sora_train.training.schedule import learning_rate
from sora_train.training.step import build_encoders, diffusion_loss
from sora_train.training.tracking import Tracker
from sora_train.training.validation import Validation


@hydra_app(TrainConfig, "train")
def main(config: TrainConfig) -> None:
    """Trains until `config.steps`, or until a signal stops all ranks after the same step."""
    facts = run.check(config)  # what can be wrong is said before a device is touched
    world = runtime.start(config.threads)
    run_dir = run.open_run_dir(config, world)
    check_memory(config, world)
    groups = build_groups(config, world)

    # build
    encoders = build_encoders(config, world)
    quarantine = Quarantine(run_dir, config.data.max_bad_share)
    loader = build_loader(
        config.data,
        config.model,
        codec_shape(config.codec),
        config.diffusion.timesteps,
        config.seed,
        world.global_rank,
        world.world_size,
        largest_group=config.parallel.largest_group,
        regroups_within_step=regroups(config.parallel, world.device.type == "cuda"),
        masked=quarantine.masked,
        codec_identity=encoders.codec.identity,
        text_identity=encoders.text_identity,
    )
    torch.manual_seed(config.seed)
    model = VideoDiT(config.model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parallelize(model, config.parallel, world, groups, largest_pack(config, world.world_size))
    engine = build_engine(model, build_optimizer(model, config.optim, world.device), config.parallel, config.optim)
    held = fragments(engine)
    ema = Ema(held, config.ema)
    validation = Validation(config, world, loader, encoders, shapes, groups)
    checkpoints = Checkpoints(run_dir, config.checkpoint, world, engine=engine, held=held, ema=ema, facts=facts)
    state = checkpoints.load_latest()  # to resume, run the same command again
    load_initial(config.init, engine, held, ema, state, world)  # open weights, where a new run starts from such
    snapshots = Snapshots(run_dir, world, ema, shapes=shapes, facts=facts, step=state.step)
    tracker = Tracker(config, facts["config"], enabled=world.is_main, start_step=state.step)
    metrics = Metrics(world, config.parallel)
    stop = AgreedStop()
    saved = state

    while state.step < config.steps and not stop.agreed(checkpoints.has_failed):
        rate = learning_rate(state.step, config.steps, config.optim)
        set_learning_rate(engine, rate)

        # one optimizer step
        for pack in metrics.timed(loader.packs(state.step)):  # the same number on every rank
            pack = pack.to(world.device)
            pack_loss = diffusion_loss(engine, pack, encoders, config.model, config.diffusion, groups)
            accumulate(engine, pack_loss.loss, is_last=pack.is_last)  # boundary and scaling live there
            metrics.add(pack_loss)  # stays on the device
            quarantine.add(state.step, pack.failures)
        ema.update(state.step)
        metrics.end_step()
        state = state.next()

        # maintenance
        is_save = due(config.checkpoint.save_every, state) or state.step == config.steps
        if is_save or due(config.tracking.log_every, state):
            means = metrics.reduce()
            tracker.log(state.step, means, {"learning_rate": rate, **gradient_norm(engine), **checkpoints.figures()})
            quarantine.check(means.failed, means.clips)
        with metrics.paused():  # throughput is that of training
            if due(config.validation.evaluate_every, state):
                validation.run(ema, tracker, state.step)
            if due(config.ema.snapshot_every, state):
                snapshots.save(state.step)
            if is_save:
                checkpoints.save(state)  # waits for the copy alone: it is written while training goes on
                saved = state

    if metrics.has_steps:
        tracker.log(state.step, metrics.reduce(), {})
    if state != saved:  # a signal came between two checkpoints
        checkpoints.save(state)
    checkpoints.wait()
    tracker.close()
    loader.close()
    run.close_run_dir(run_dir, world, "finished" if state.step >= config.steps else "stopped", state.step)
    runtime.finish()


def due(every: int, state: TrainState) -> bool:
    """Whether something done every so many steps (0: never) is due after the steps done."""
    return every > 0 and state.step % every == 0


if __name__ == "__main__":
    main()
