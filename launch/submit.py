"""Starts one training run, or a sweep of them, on this machine or on Slurm.

    python -m launch.submit data.shards=DIR name=my_run model=b
    python -m launch.submit -m model=tiny,s data.shards=DIR name=sizes        a run for each value
    python -m launch.submit cluster=slurm dry_run=true data.shards=DIR        prints the sbatch script

The resolved configuration is frozen in the run directory and every rank reads that file, so what ran is on record and
running the same command again resumes it. Hydra's multirun happens here, outside torchrun: a process group cannot be
initialised twice in one process, and each rank would compose a sweep of its own.
"""

import hashlib
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from launch.slurm import slurm_script, submit_script
from launch.template import fill
from launch.torchrun import child_environment, local_command, num_processes, run
from sora_train.config.command import hydra_app
from sora_train.config.launch import ClusterKind, SubmitConfig
from sora_train.config.root import ConfigError, TrainConfig, load_config, save_config
from sora_train.training.run import check as check_training


@hydra_app(SubmitConfig, "submit")
def main(config: SubmitConfig) -> None:
    """One job; Hydra calls this once for each job of a sweep. Leaves with the training's exit code."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        config = as_job_of_sweep(config, job_name(sys.argv[1:], list(hydra.overrides.task)))
    code = submit(config)
    if code:
        print(f"error: {config.run_dir} ended with exit code {code}", file=sys.stderr, flush=True)
        sys.exit(code)  # of a sweep, the jobs after this one do not start


def submit(config: SubmitConfig) -> int:
    """Freezes the configuration, then runs it here to its end or hands it to Slurm. Returns the exit code."""
    check(config)
    working_dir = Path.cwd()
    run_dir = Path(config.run_dir)
    training = training_config(config)
    if not config.dry_run:
        # The ranks check the same; here a mistake is one line, and not a line among what torchrun says of its end.
        check_training(training)
    path = run_dir / "config.yaml" if config.dry_run else freeze(training, run_dir)
    if config.cluster.kind is ClusterKind.slurm:
        script = slurm_script(config, path, working_dir)
        print(script if config.dry_run else submit_script(script, run_dir), flush=True)
        return 0
    processes = num_processes(config.cluster.processes_per_node)
    command = local_command(processes, path)
    environment = child_environment(processes, config.threads, on_cpu=not torch.cuda.is_available())
    if config.dry_run:
        tools = str(Path(sys.executable).parent)
        values = {"name": config.name, "working_dir": str(working_dir), "tools": tools}
        print(fill("torchrun.sh.j2", command=command, environment=environment, **values), flush=True)
        return 0
    return run(command, environment)


def check(config: SubmitConfig) -> None:
    """Refuses what would only fail once ranks are up."""
    cluster = config.cluster
    for name in ("nodes", "rendezvous_port"):
        if getattr(cluster, name) < 1:
            raise ConfigError(f"cluster.{name}={getattr(cluster, name)}: give 1 or more")
    for name in ("processes_per_node", "gpus_per_node", "cpus_per_node", "warn_seconds"):
        if getattr(cluster, name) < 0:
            raise ConfigError(f"cluster.{name}={getattr(cluster, name)}: give 0 or more")
    if cluster.kind is ClusterKind.local and cluster.nodes > 1:
        raise ConfigError(
            f"cluster.nodes={cluster.nodes} with cluster=local: use cluster=slurm, or run torchrun on each machine"
        )
    if config.run_dir != config.run_dir.strip() or not config.run_dir or "\n" in config.run_dir:
        raise ConfigError(f"run_dir={config.run_dir!r}: give the path of a folder")


def training_config(config: SubmitConfig) -> TrainConfig:
    """The part of a submission that the training reads."""
    return TrainConfig(**{item.name: getattr(config, item.name) for item in fields(TrainConfig)})


def freeze(config: TrainConfig, run_dir: Path) -> Path:
    """Writes the configuration the run goes by; returns its file.

    A frozen configuration that says something else stays: the new one lies beside it, and the training, which knows
    whether there is a checkpoint to protect, shows the difference and refuses.
    """
    path = run_dir / "config.yaml"
    if path.exists() and not is_same(config, path):
        path = run_dir / "config-new.yaml"
    save_config(config, path)
    return path


def is_same(config: TrainConfig, path: Path) -> bool:
    """Whether `path` holds `config`; a file this version cannot read is another."""
    try:
        return load_config(TrainConfig, path) == config
    except ConfigError:
        return False


def as_job_of_sweep(config: SubmitConfig, job: str) -> SubmitConfig:
    """A sweep's jobs are folders in its run directory, named by what differs, and one group in W&B."""
    tracking = replace(config.tracking, group=config.tracking.group or config.name)
    return replace(config, name=f"{config.name}/{job}", run_dir=f"{config.run_dir}/{job}", tracking=tracking)


def job_name(arguments: list[str], overrides: list[str]) -> str:
    """Names a job of a sweep by the values it does not share: "model=tiny,optim.learning_rate=0.001".

    Args:
        arguments: the command line; its swept overrides say which keys differ.
        overrides: this job's own.
    """
    plain = [word for word in arguments if "=" in word and not word.startswith("-") and not word.startswith("hydra")]
    swept = {
        item.get_key_element() for item in OverridesParser.create().parse_overrides(plain) if item.is_sweep_override()
    }
    name = ",".join(word for word in overrides if word.partition("=")[0] in swept) or "job"
    safe = re.sub(r"[^\w.=,+-]", "_", name)[:120]
    # Names that had to be changed could meet each other.
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


if __name__ == "__main__":
    main()
