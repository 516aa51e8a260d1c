"""The sbatch script: a valid one, quoted, that starts one torchrun on each node."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from launch.slurm import slurm_script, submit_script
from sora_train.config.launch import ClusterConfig, ClusterKind, SubmitConfig
from sora_train.config.root import ConfigError


def script_of(tmp_path: Path, name: str = "run", **cluster: object) -> str:
    config = SubmitConfig(name=name, run_dir=f"runs/{name}", cluster=ClusterConfig(kind=ClusterKind.slurm, **cluster))
    return slurm_script(config, tmp_path / "config.yaml", tmp_path)


def put_program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    "cluster",
    [
        {},
        {"nodes": 4, "partition": "gpu", "account": "team", "cpus_per_node": 64},
        {"gpus_per_node": 0, "processes_per_node": 2, "setup": ["module load x"], "options": ["--qos=high"]},
    ],
)
def test_it_is_valid_bash(tmp_path, cluster):
    subprocess.run(["bash", "-n"], input=script_of(tmp_path, **cluster), text=True, check=True)


def test_the_settings_stand_in_it(tmp_path):
    script = script_of(
        tmp_path, nodes=4, partition="gpu", account="team", time_limit="01:00:00", options=["--qos=high"]
    )
    lines = script.splitlines()
    for line in ("--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--partition=gpu", "--account=team"):
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --time=01:00:00" in lines
    assert "#SBATCH --qos=high" in lines


def test_every_option_stands_before_the_first_command(tmp_path):
    """Slurm stops reading options at the first command."""
    lines = script_of(tmp_path, options=["--exclusive"], partition="p").splitlines()
    last_option = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    first_command = min(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert last_option < first_command


def test_run_under_slurm_it_starts_torchrun_on_the_frozen_configuration(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    # More names than a pipe holds: one that is closed early must not end the job.
    put_program(programs, "scontrol", "echo first; seq 100000")
    put_program(programs, "srun", 'printf "%s\\n" "$DS_ACCELERATOR" "$@"')
    # What a name holds must stay a name.
    script = script_of(tmp_path, name="a b; touch $HOME/x", nodes=2, gpus_per_node=0, processes_per_node=3)
    script = script.replace("export PATH=", f"export PATH={programs}:")
    environment = {**os.environ, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[0] == "cpu"
    assert {"--nnodes=2", "--nproc_per_node=3", "--rdzv_endpoint=first:29500", "--rdzv_id=17"} <= set(words)
    assert words[words.index("--config-path") + 1] == str(tmp_path)


def test_sbatch_is_handed_the_script_and_its_answer_comes_back(tmp_path, monkeypatch):
    put_program(tmp_path, "sbatch", 'grep -q torch.distributed.run "$1" && echo "Submitted batch job 17"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert submit_script(script_of(tmp_path), tmp_path) == "Submitted batch job 17"


def test_a_refusal_of_sbatch_is_one_line(tmp_path, monkeypatch):
    put_program(tmp_path, "sbatch", 'echo "sbatch: error: invalid account" >&2; echo more >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="invalid account more"):
        submit_script(script_of(tmp_path), tmp_path)


def test_the_cores_asked_for_reach_the_ranks(tmp_path):
    """srun does not take --cpus-per-task over from the job (Slurm 22.05): without it a node's ranks share one core."""
    (line,) = (line for line in script_of(tmp_path, cpus_per_node=64).splitlines() if line.startswith("srun"))
    assert "--cpus-per-task=64" in line.split()
    assert "--cpus-per-task" not in script_of(tmp_path)
