"""Where one process stands among the others: integers from the launcher's environment, nothing else."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sora_train.config.root import ConfigError


@dataclass(frozen=True)
class World:
    """This process's place. `global_rank` counts over all hosts, `local_rank` on this one."""

    global_rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for all."""
        return self.global_rank == 0

    @property
    def device_name(self) -> str:
        """As torch names it: what the peak of its arithmetic is looked up by."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """The place torchrun gave this process; outside torchrun, a world of one.

    Raises:
        ConfigError: more processes on this host than CUDA devices.
    """
    local_rank = int(environment.get("LOCAL_RANK", 0))
    local_world_size = int(environment.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    # DeepSpeed obeys this variable: a model on CUDA under an engine on the CPU would be neither.
    if torch.cuda.is_available() and environment.get("DS_ACCELERATOR") != "cpu":
        if local_world_size > torch.cuda.device_count():
            raise ConfigError(
                f"--nproc_per_node is {local_world_size}, but this host has {torch.cuda.device_count()} CUDA devices"
            )
        device = torch.device("cuda", local_rank)
    return World(
        global_rank=int(environment.get("RANK", 0)),
        world_size=int(environment.get("WORLD_SIZE", 1)),
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=device,
    )
