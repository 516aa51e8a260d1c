"""Starts ranks on this machine: the torchrun command of a frozen configuration, its environment, and its end.

The command is a list of words handed to the kernel, never to a shell. What a rank's environment needs is set for the
children alone.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import torch

# torchrun hands these on to its ranks, which save a checkpoint and end (SIGUSR1 is Slurm's warning before the time
# limit; by default torchrun would die of it and leave its ranks behind).
SIGNALS = "SIGTERM,SIGINT,SIGUSR1"
# Seconds a rank may take to save that checkpoint before torchrun kills it; torchrun's own 30 are short for a big one.
SAVING_SECONDS = 600


def num_processes(processes_per_node: int) -> int:
    """Ranks on this machine: as configured, else one for each GPU, else one."""
    return processes_per_node or torch.cuda.device_count() or 1


def training_command(config_path: Path) -> list[str]:
    """The training's module and arguments, behind torchrun's own; `config_path` is a file of `save_config`."""
    folder, name = config_path.parent.resolve(), config_path.stem
    return ["-m", "sora_train.train", "--config-path", str(folder), "--config-name", name]


def local_command(processes: int, config_path: Path) -> list[str]:
    """torchrun on this machine alone, on a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*torchrun, f"--signals-to-handle={SIGNALS}", *training_command(config_path)]


def child_environment(processes: int, threads: int, on_cpu: bool) -> dict[str, str]:
    """What the ranks' environment has beyond ours; what the user has set stays.

    Args:
        processes: ranks on one machine.
        threads: torch threads of a rank, 0 to share this machine's cores among the ranks.
        on_cpu: no GPU: DeepSpeed is told so, since it would guess from what is installed.
    """
    values = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_SECONDS)}
    if on_cpu:
        threads = threads or max(1, num_cores() // processes)
        values |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return {key: value for key, value in values.items() if key not in os.environ}


def num_cores() -> int:
    """Cores this process may run on; all of them where the system cannot say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(command: list[str], environment: dict[str, str]) -> int:
    """Runs `command` with `environment` over ours until it ends; hands signals on. Returns its exit code.

    The child gets a session of its own, so that Ctrl-C in a terminal reaches its ranks once, through us and torchrun,
    and they save a checkpoint instead of dying of a second one.
    """
    # Tools that ranks look up by name (ninja, for DeepSpeed's CPU collective) lie beside our interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    child = subprocess.Popen(command, env={**os.environ, **environment, "PATH": path}, start_new_session=True)

    def hand_on(signal_number: int, frame: FrameType | None) -> None:
        child.send_signal(signal.SIGTERM if signal_number == signal.SIGHUP else signal_number)

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, hand_on) for number in handled}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code  # a shell's way of telling death by signal
