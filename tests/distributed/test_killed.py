"""Kill -9 at any moment: a good checkpoint is always there, and the run that is taken up ends as if nothing was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("killed.py")


def test_killed_runs_end_bitwise_as_those_that_were_not(tmp_path: Path) -> None:
    """Eight kills, at ZeRO-1: the first of the 200 that benchmarks/reliability.py makes, over stages 1 to 3."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "runs"), str(tmp_path / "out.json"), "0", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads((tmp_path / "out.json").read_text())
    print(counts)
    assert counts["problems"] == []
    assert counts["kills"] == 8
    assert counts["in_save"] >= 3, counts
    assert counts["slow"] == 2
    assert counts["finished"] == counts["equal"] >= 1
