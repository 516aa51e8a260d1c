"""The lock: every package pinned, what pyproject.toml asks for among them, nothing that fits one machine alone."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "docker" / "constraints.txt"


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_what_is_installed_is_pinned_at_an_allowed_version(pins):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert extras is not None
    wanted = list(project["dependencies"])
    for extra in extras[1].split(","):
        wanted += project["optional-dependencies"][extra]
    for text in wanted:
        requirement = Requirement(text)
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{text} is locked at {version}"


def test_one_line_fits_every_build_of_torch_and_opencv_is_there_once(pins):
    assert pins["torch"] == "2.13.0"
    assert "opencv-python-headless" in pins
    assert "opencv-python" not in pins
    assert not {"torchvision", "torchcodec", "decord"} & set(pins)


def test_make_tells_its_commands():
    done = subprocess.run(["make", "-s", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True)
    assert {"demo", "test", "test-fast", "lint", "help"} <= set(re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE))


def test_continuous_integration_runs_the_readmes_test_command():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "exec make test"
