"""Averages of the weights: their profiles, and others rebuilt from snapshots of them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sora_train.config.limits import check_averages
from sora_train.config.optim import EmaConfig, EmaProfile
from sora_train.config.root import ConfigError
from sora_train.distributed.partitions import Fragment
from sora_train.distributed.topology import World
from sora_train.training.ema import Ema
from sora_train.training.ema_profiles import LONGEST, coefficients, decay, exponent, overlap
from sora_train.training.ema_snapshots import FOLDER, Snapshots, complete_snapshots, rebuild

WORLD = World(global_rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
POWER = EmaConfig(profile=EmaProfile.power)
SHAPES: dict[str, tuple[int, ...]] = {"a": (5, 7), "b": (3,)}


def fragments_of(weights: dict[str, Tensor]) -> list[Fragment]:
    return [
        Fragment(name, tuple(value.shape), 0, value.view(-1), {}, (0, value.numel())) for name, value in weights.items()
    ]


class Training:
    """Weights that begin somewhere, drift, wander and turn; averages of other lengths in float64 beside."""

    def __init__(self, run_dir: Path, *, beside: tuple[float, ...] = ()) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.weights = {name: torch.randn(shape, generator=self.draw) for name, shape in SHAPES.items()}
        self.drift = {name: torch.randn(shape, generator=self.draw) for name, shape in SHAPES.items()}
        self.held = fragments_of(self.weights)
        self.ema = Ema(self.held, POWER)
        self.snapshots = Snapshots(run_dir, WORLD, self.ema, shapes=SHAPES, facts={"config": {}}, step=0)
        self.beside = {length: {name: value.double() for name, value in self.weights.items()} for length in beside}

    def run(self, steps: int, every: int) -> None:
        for step in range(steps):
            for name, value in self.weights.items():
                wander = torch.randn(value.shape, generator=self.draw)
                value += 0.003 * wander + 0.002 * self.drift[name] * np.cos(4 * step / steps)
                for length, averages in self.beside.items():
                    averages[name].lerp_(value.double(), 1 - decay(step, length))
            self.ema.update(step)
            if (step + 1) % every == 0:
                self.snapshots.save(step + 1)


def weights_in(folder: Path) -> dict[str, Tensor]:
    found = load_file(folder / "rank-00000.safetensors")
    return {name: found[f"ema/{name}@0"].view(shape) for name, shape in SHAPES.items()}


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return float((difference / sum(float(value.double().square().sum()) for value in b.values())) ** 0.5)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_an_exponent_gives_the_length_it_was_solved_for(length: float) -> None:
    """Against the standard deviation of the weights themselves."""
    share = (np.arange(20000) + 0.5) / 20000
    weight = share ** exponent(length)
    weight /= weight.sum()
    mean = (weight * share).sum()
    assert np.sqrt((weight * (share - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)
    assert exponent(LONGEST) == pytest.approx(0, abs=1e-6)


def test_decays_give_the_profile_of_the_paper() -> None:
    """Step s has weight s^(gamma+1) - (s-1)^(gamma+1), the integral of the profile over it, and all sum to 1."""
    gamma, weight = exponent(0.1), np.zeros(50)
    for step in range(50):
        weight *= decay(step, 0.1)
        weight[step] = 1 - decay(step, 0.1)
    edges = (np.arange(51) / 50) ** (gamma + 1)
    np.testing.assert_allclose(weight, np.diff(edges), rtol=1e-9, atol=1e-15)
    assert decay(0, 0.1) == 0, "what the run began with is forgotten in the first step"


def test_overlap_is_the_integral() -> None:
    t_a, gamma_a, t_b, gamma_b = np.array(30.0), np.array(5.0), np.array(70.0), np.array(2.0)
    s = (np.arange(210000) + 0.5) * 70 / 210000
    a = np.where(s <= t_a, (gamma_a + 1) * s**gamma_a / t_a ** (gamma_a + 1), 0)
    b = (gamma_b + 1) * s**gamma_b / t_b ** (gamma_b + 1)
    integral = (a * b).sum() * 70 / 210000
    assert overlap(t_a, gamma_a, t_b, gamma_b) == pytest.approx(integral, rel=1e-6)
    assert overlap(t_b, gamma_b, t_a, gamma_a) == pytest.approx(integral, rel=1e-6)


def test_an_average_that_was_kept_is_found_among_them() -> None:
    kept = [(step, length) for step in (100, 200, 300) for length in (0.05, 0.1)]
    found, misfit = coefficients(kept, (300, 0.1))
    np.testing.assert_allclose(found, [0, 0, 0, 0, 0, 1], atol=1e-9)
    assert misfit < 1e-6


@pytest.mark.parametrize("length", [0.03, 0.05, 0.08, 0.15, 0.2])
def test_rebuilt_equals_what_would_have_been_kept(tmp_path: Path, length: float) -> None:
    training = Training(tmp_path, beside=(length,))
    training.run(1000, every=20)
    misfit = rebuild(tmp_path, tmp_path / "out", length)
    found, kept = weights_in(tmp_path / "out"), training.beside[length]
    assert misfit < 0.01
    assert relative(found, kept) < 3e-5
    # Of the way between that average and the weights, which is what averaging is about.
    now = {name: value.double() - kept[name] for name, value in training.weights.items()}
    error = {name: found[name].double() - kept[name] for name in kept}
    assert relative({name: error[name] + now[name] for name in now}, now) < 5e-4


def test_rebuilt_at_an_earlier_snapshot(tmp_path: Path) -> None:
    training = Training(tmp_path, beside=(0.08,))
    training.run(400, every=20)
    earlier = {name: value.clone() for name, value in training.beside[0.08].items()}
    for averages in training.ema.kept:
        averages["ema"].fill_(9)
    training.snapshots.save(420)  # must not count
    rebuild(tmp_path, tmp_path / "out", 0.08, step=400)
    assert relative(weights_in(tmp_path / "out"), earlier) < 1e-3
    with pytest.raises(ConfigError, match=r"--step 410: .* has snapshots of steps 20, 40"):
        rebuild(tmp_path, tmp_path / "other", 0.08, step=410)


def test_too_few_snapshots_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    Training(tmp_path).run(40, every=20)
    with pytest.raises(ConfigError, match=r"--length 0\.02 after 40 steps cannot be made from 2 snapshots"):
        rebuild(tmp_path, tmp_path / "out", 0.02)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        rebuild(tmp_path, tmp_path / "out", 0.05)


def test_a_damaged_snapshot_is_left_out(tmp_path: Path) -> None:
    training = Training(tmp_path, beside=(0.08,))
    training.run(400, every=20)
    file = tmp_path / FOLDER / "step-00000300" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 64  # the last number's exponent
    file.write_bytes(content)
    rebuild(tmp_path, tmp_path / "out", 0.08)
    assert relative(weights_in(tmp_path / "out"), training.beside[0.08]) < 1e-3


def test_going_back_puts_later_snapshots_aside(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.run(60, every=20)
    again = Snapshots(tmp_path, WORLD, training.ema, shapes=SHAPES, facts={}, step=30)
    assert [path.name for path in complete_snapshots(again.folder)] == ["step-00000020"]
    again.save(40)
    assert sorted(path.name for path in again.folder.iterdir()) == [
        "replaced-step-00000040", "replaced-step-00000060", "step-00000020", "step-00000040",
    ]  # fmt: skip
    training.weights["a"][0, 0] = float("nan")
    training.ema.update(60)
    with pytest.raises(FloatingPointError, match="ema/a@0 is not finite after step 80"):
        again.save(80)


def test_the_command_lists_and_rebuilds(tmp_path: Path) -> None:
    Training(tmp_path).run(200, every=20)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "sora_train.training.ema", *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    listed = command("list", str(tmp_path))
    assert listed.returncode == 0, listed.stderr
    assert len(listed.stdout.splitlines()) == 10
    assert "lengths 0.05, 0.1" in listed.stdout
    made = command("rebuild", str(tmp_path), str(tmp_path / "out"), "--length", "0.08", "--step", "180")
    assert made.returncode == 0, made.stderr
    assert "length 0.08, its profile met to within 0." in made.stdout
    assert weights_in(tmp_path / "out")["a"].shape == (5, 7)
    line = [sys.executable, "-m", "sora_train.training.checkpoint", "list", str(tmp_path / FOLDER)]
    shown = subprocess.run(line, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout
    refused = command("rebuild", str(tmp_path / "nothing"), str(tmp_path / "other"), "--length", "0.08")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "holds no snapshot" in refused.stderr


def test_constant_profile_warms_up(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(5, 7)}
    ema = Ema(fragments_of(weights), EmaConfig(decay=0.5))
    weights["a"] += 1
    ema.update(0)
    assert ema.averages[0][0] == pytest.approx(0.9)
    weights["a"] += 1
    ema.update(1000)
    assert ema.averages[0][0] == pytest.approx(0.9 + 0.5 * 1.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": [0.05, 0.3]}, "ema.lengths has 0.3: choose 0.005 to 0.28"),
        ({"lengths": [0.05, 0.05]}, r"ema.lengths=\[0.05,0.05\]: choose one or more, each once"),
        ({"lengths": []}, "choose one or more"),
        ({"lengths": [0.1], "snapshot_every": 5}, "from two or more of ema.profile=power"),
        ({"profile": EmaProfile.constant, "snapshot_every": 5}, "ema.snapshot_every=5 with ema.profile=constant"),
    ],
)
def test_averages_that_cannot_be_are_refused(changed: dict[str, object], message: str) -> None:
    check_averages(POWER)
    with pytest.raises(ConfigError, match=message):
        check_averages(replace(POWER, **changed))  # type: ignore[arg-type]
