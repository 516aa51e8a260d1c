"""launch.submit: what is frozen, what is started, how a sweep's jobs are kept apart, and whose exit code comes out."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore

from launch import submit as submit_module
from launch.submit import as_job_of_sweep, freeze, job_name, main, training_config
from sora_train.config.data import DataConfig
from sora_train.config.launch import ClusterConfig, ClusterKind, SubmitConfig
from sora_train.config.root import TrainConfig, build_config, load_config, save_config, writable
from sora_train.training.run import check as check_training


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The commands and environments that would have been started, each ending with the next of `codes`."""
    calls, codes = [], []

    def record(command, environment):
        calls.append((command, environment))
        return codes.pop(0) if codes else 0

    monkeypatch.setattr(submit_module, "run", record)
    monkeypatch.setattr(submit_module, "check_training", lambda config: None)
    monkeypatch.chdir(tmp_path)
    return calls, codes


def submit(monkeypatch, *arguments: str) -> int:
    """Runs the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["submit", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def frozen_by(command: list[str]) -> Path:
    folder = command[command.index("--config-path") + 1]
    return Path(folder) / (command[command.index("--config-name") + 1] + ".yaml")


def test_one_run_is_frozen_and_started_on_what_was_frozen(started, monkeypatch):
    calls, _ = started
    assert submit(monkeypatch, "data.shards=/d", "name=one", "model=s", "cluster.processes_per_node=2") == 0
    command, environment = calls[0]
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc_per_node=2" in command
    assert "sora_train.train" in command
    path = frozen_by(command)
    assert path == Path("runs/one/config.yaml").resolve()
    config = load_config(TrainConfig, path)
    assert (config.model.name, config.data.shards, config.run_dir) == ("s", "/d", "runs/one")
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in environment


def test_the_exit_code_is_the_trainings(started, monkeypatch, capsys):
    _, codes = started
    codes.append(7)
    assert submit(monkeypatch, "data.shards=/d") == 7
    assert "exit code 7" in capsys.readouterr().err


def test_a_sweep_runs_each_value_in_its_own_folder_and_one_group(started, monkeypatch):
    calls, _ = started
    assert submit(monkeypatch, "-m", "model=tiny,s", "data.shards=/d", "name=sizes") == 0
    configs = [load_config(TrainConfig, frozen_by(command)) for command, _ in calls]
    assert [config.model.name for config in configs] == ["tiny", "s"]
    assert [config.run_dir for config in configs] == ["runs/sizes/model=tiny", "runs/sizes/model=s"]
    assert [config.name for config in configs] == ["sizes/model=tiny", "sizes/model=s"]
    assert {config.tracking.group for config in configs} == {"sizes"}


def test_a_sweep_ends_with_the_first_job_that_fails(started, monkeypatch):
    calls, codes = started
    codes += [0, 3, 0]
    assert submit(monkeypatch, "-m", "seed=1,2,3", "data.shards=/d") == 3
    assert len(calls) == 2


def test_dry_run_writes_and_starts_nothing(started, monkeypatch, tmp_path, capsys):
    calls, _ = started
    assert submit(monkeypatch, "data.shards=/d", "dry_run=true") == 0
    assert "torch.distributed.run --standalone" in capsys.readouterr().out
    assert calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.shard=/d"], "data.shard is not a setting: did you mean data.shards?"),
        ([], "data.shards is not set"),
        (["data.shards=/d", "cluster.nodes=2"], "cluster.nodes=2 with cluster=local"),
        (["data.shards=/d", "cluster.processes_per_node=-1"], "cluster.processes_per_node=-1: give 0 or more"),
        (["data.shards=/d", "model=tiny,s"], "add -m"),
        (["data.shards=/d", "cluster=slurm", "cluster.partition='a b'"], "cluster.partition='a b' holds white space"),
        (["data.shards=/d", "cluster=slurm", "cluster.options=[rm]"], "'rm' is no option of sbatch"),
    ],
)
def test_bad_use_is_one_line_and_code_2(started, monkeypatch, capsys, arguments, says):
    calls, _ = started
    assert submit(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert calls == []


def test_a_frozen_configuration_is_never_overwritten(tmp_path):
    config = TrainConfig(seed=1, data=DataConfig(shards="/d"))
    first = freeze(config, tmp_path)
    before = first.stat()
    assert freeze(config, tmp_path) == first
    second = freeze(replace(config, seed=2), tmp_path)
    assert second == tmp_path / "config-new.yaml"
    assert load_config(TrainConfig, first) == config
    assert load_config(TrainConfig, second).seed == 2
    assert before.st_size == first.stat().st_size


def test_a_frozen_configuration_of_another_version_is_kept_too(tmp_path):
    (tmp_path / "config.yaml").write_text("setting_of_old: 1\n")
    assert freeze(TrainConfig(), tmp_path).name == "config-new.yaml"
    assert (tmp_path / "config.yaml").read_text() == "setting_of_old: 1\n"


def test_what_is_frozen_reads_back_equal(tmp_path):
    config = SubmitConfig(seed=3, data=DataConfig(shards="/d"), cluster=ClusterConfig(kind=ClusterKind.slurm))
    save_config(training_config(config), tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == TrainConfig(seed=3, data=config.data)


def test_a_job_is_named_by_what_differs_alone():
    arguments = ["-m", "model=tiny,s", "name=x", "data.shards=/a", "optim.learning_rate=1e-3,1e-4"]
    overrides = ["model=s", "name=x", "data.shards=/a", "optim.learning_rate=1e-4"]
    assert job_name(arguments, overrides) == "model=s,optim.learning_rate=1e-4"


def test_job_names_that_are_no_folder_names_stay_apart():
    arguments = ["-m", "data.shards=/a/b,/a_b,/a b"]
    names = [job_name(arguments, [f"data.shards={value}"]) for value in ("/a/b", "/a_b", "/a b")]
    assert len(set(names)) == 3
    assert not any("/" in name or " " in name for name in names)


def test_a_group_chosen_by_the_user_stays():
    config = build_config(SubmitConfig, {"data": {"shards": "/d"}, "tracking": {"group": "mine"}})
    assert as_job_of_sweep(config, "seed=1").tracking.group == "mine"


def test_submit_and_train_compose_the_same_run():
    store = ConfigStore.instance()
    for schema in (TrainConfig, SubmitConfig):
        store.store(name=schema.__name__, node=writable(schema))
    overrides = ["data.shards=/d", "model=b", "name=same"]
    with initialize_config_module("sora_train.configs", version_base="1.3"):
        train = build_config(TrainConfig, compose("train", overrides))
        submitted = build_config(SubmitConfig, compose("submit", overrides))
    assert training_config(submitted) == train


def test_what_cannot_train_is_refused_before_anything_is_written(started, monkeypatch, tmp_path, capsys):
    calls, _ = started
    monkeypatch.setattr(submit_module, "check_training", check_training)
    assert submit(monkeypatch, "data.shards=/nowhere", "model.in_channels=96", "model.out_channels=96") == 2
    error = capsys.readouterr().err
    assert "/nowhere" in error
    assert error.count("\n") == 1
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_slurm_without_sbatch_says_so(started, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert submit(monkeypatch, "data.shards=/d", "cluster=slurm") == 2
    assert "no sbatch on this machine" in capsys.readouterr().err
