"""Starts and ends this process's part in the world: device, threads, process groups."""

import logging
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from sora_train.distributed.topology import World, read_world


def start(threads: int = 0, timeout_seconds: float = 1800.0) -> World:
    """Joins the world torchrun describes, or makes a world of one.

    Args:
        threads: CPU threads of torch in this process; 0 shares the host's cores among its ranks.
        timeout_seconds: after which a collective that somebody did not join is an error.
    """
    world = read_world()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by deepspeed when it is first imported
    # DeepSpeed compiles a small CPU collective with ninja, which pip puts beside the interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // world.local_world_size))

    import deepspeed  # slow, and reads the environment set above

    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        verbose=False,
    )
    return world


def finish() -> NoReturn:
    """Leaves the world and ends the process, successfully.

    At once: the interpreter's own way out takes down the threads of gloo and DeepSpeed in no order, which now and then
    aborts a rank whose work is done and saved, and its launcher reports a failure.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
