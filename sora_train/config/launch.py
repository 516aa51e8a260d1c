"""Settings of a launch: the training run, where it shall run, and whether only to show what would be done."""

from dataclasses import dataclass, field
from enum import Enum

from sora_train.config.root import TrainConfig


class ClusterKind(Enum):
    local = "local"  # this machine
    slurm = "slurm"  # sbatch


@dataclass(frozen=True)
class ClusterConfig:
    kind: ClusterKind = ClusterKind.local
    # Machines. kind=local runs on one; `launch/templates/torchrun.sh.j2` (dry_run=true) is for several by hand.
    nodes: int = 1
    # Ranks on each machine; 0: one for each GPU of this machine, one without a GPU.
    processes_per_node: int = 0
    # The rest is Slurm's. Empty leaves a setting to the cluster's default.
    partition: str = ""
    account: str = ""
    time_limit: str = "24:00:00"
    # GPUs asked for on each machine; 0 asks for none and trains on CPU.
    gpus_per_node: int = 8
    cpus_per_node: int = 0
    # Port of the rendezvous on the first machine.
    rendezvous_port: int = 29500
    # Seconds before the time limit at which Slurm sends SIGUSR1: the run saves a checkpoint and ends.
    warn_seconds: int = 300
    # Further options of sbatch, as in ["--exclusive", "--qos=high"].
    options: list[str] = field(default_factory=list)
    # Shell lines run before the training, as in ["module load cuda/12.8"]: the only setting read by a shell.
    setup: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SubmitConfig(TrainConfig):
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    # Print what would be started or submitted; write and start nothing.
    dry_run: bool = False
