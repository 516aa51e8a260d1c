"""Starting a process: its exit code, its signals, its environment, and the script that shows it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.template import fill
from launch.torchrun import child_environment, local_command, num_cores, run


@pytest.mark.parametrize(("program", "code"), [("raise SystemExit(5)", 5), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_exit_codes_come_through(program, code):
    assert run([sys.executable, "-c", program], {}) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_child_once_and_we_outlive_it(number, tmp_path):
    ready, heard = tmp_path / "ready", tmp_path / "heard"
    program = (
        "import pathlib, signal, sys, time\n"
        f"def hear(n, f): open({str(heard)!r}, 'a').write(f'{{n}} ')\n"
        f"signal.signal({int(number)}, hear)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        f"while not pathlib.Path({str(heard)!r}).exists(): time.sleep(0.01)\n"
        "time.sleep(0.1); sys.exit(9)\n"
    )

    def send() -> None:
        while not ready.exists():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Thread(target=send)
    sender.start()
    assert run([sys.executable, "-c", program], {}) == 9
    sender.join()
    assert heard.read_text().split() == [str(int(number))]
    assert signal.getsignal(number) == before


def test_the_environment_is_the_childs_alone(monkeypatch, tmp_path):
    for key in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.delenv(key, raising=False)
    environment = child_environment(processes=2, threads=3, on_cpu=True)
    out = tmp_path / "out"
    program = f"import os; open({str(out)!r}, 'w').write(os.environ['DS_ACCELERATOR'] + os.environ['OMP_NUM_THREADS'])"
    assert run([sys.executable, "-c", program], environment) == 0
    assert out.read_text() == "cpu3"
    assert "DS_ACCELERATOR" not in os.environ


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in child_environment(1, 0, on_cpu=True)


def test_a_gpu_machine_is_left_to_its_defaults():
    assert not {"DS_ACCELERATOR", "OMP_NUM_THREADS"} & set(child_environment(8, 0, on_cpu=False))


def test_torchrun_accepts_the_command_and_the_rank_sees_its_configuration(tmp_path):
    command = local_command(2, tmp_path / "model=tiny" / "config-new.yaml")
    after = command[command.index("sora_train.train") + 1 :]
    assert after == ["--config-path", str(tmp_path / "model=tiny"), "--config-name", "config-new"]


def test_the_printed_script_starts_just_that(tmp_path):
    words = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b", "$HOME", "it's"]
    values = {"name": "x", "working_dir": str(tmp_path), "tools": str(Path(sys.executable).parent)}
    script = fill("torchrun.sh.j2", command=words, environment={"A": "1 2"}, **values)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(["a b", "$HOME", "it's"])


def test_a_system_that_does_not_tell_its_affinity_has_all_its_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert num_cores() == 6
