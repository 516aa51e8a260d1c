"""Submits a frozen configuration to Slurm: fills the sbatch script and hands it to `sbatch`."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from launch.template import fill
from launch.torchrun import SAVING_SECONDS, SIGNALS, training_command
from sora_train.config.launch import ClusterConfig, SubmitConfig
from sora_train.config.root import ConfigError


def slurm_script(config: SubmitConfig, config_path: Path, working_dir: Path) -> str:
    """The sbatch script that trains `config_path`: one torchrun a node, met by a c10d rendezvous on the first.

    Raises:
        ConfigError: a cluster setting that would break out of its line of the script.
    """
    cluster = config.cluster
    check_lines(cluster)
    processes = cluster.processes_per_node or cluster.gpus_per_node or 1
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_SECONDS)}
    if not cluster.gpus_per_node:
        environment["DS_ACCELERATOR"] = "cpu"
        if threads := config.threads or cluster.cpus_per_node // processes:
            environment["OMP_NUM_THREADS"] = str(threads)
    return fill(
        "slurm.sbatch.j2",
        cluster=cluster,
        job_name=re.sub(r"[^\w.=+-]", "_", config.name),
        working_dir=str(working_dir),
        run_dir=config.run_dir,
        tools=str(Path(sys.executable).parent),
        python=sys.executable,
        environment=environment,
        processes=processes,
        signals=SIGNALS,
        training=training_command(config_path),
    )


def check_lines(cluster: ClusterConfig) -> None:
    """Each Slurm setting is one line of the script."""
    settings = {"partition": cluster.partition, "account": cluster.account, "time_limit": cluster.time_limit}
    for name, value in settings.items():
        if re.search(r"\s", value):
            raise ConfigError(f"cluster.{name}={value!r} holds white space: give one word")
    for option in cluster.options:
        if not option.startswith("-") or "\n" in option:
            raise ConfigError(f"cluster.options: {option!r} is no option of sbatch: write it as --NAME=VALUE")


def submit_script(script: str, run_dir: Path) -> str:
    """Leaves the script in the run directory and submits it. Returns what sbatch answered.

    Raises:
        ConfigError: no sbatch here, or sbatch refused the script.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("cluster=slurm: no sbatch on this machine: run this on a login node, or add dry_run=true")
    path = run_dir / "job.sbatch"
    path.write_text(script)
    answer = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ConfigError(f"sbatch refused {path}: {' '.join(answer.stderr.split())}")
    return answer.stdout.strip()
