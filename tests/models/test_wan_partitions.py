"""Wan's weights go straight to the partitions of ranks: two of them, ZeRO 0 to 3."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.models.video_dit import VideoDiT
from sora_train.models.wan_weights import save_wan


@pytest.mark.distributed
def test_ranks_fill_what_they_hold(randomized, tmp_path):
    config = ModelConfig(
        width=24, depth=1, heads=2, mlp_width=40, in_channels=4, out_channels=4, condition_channels=3, image_width=10,
        text=TextConfig(kind=TextKind.encoder, width=16),
    )  # fmt: skip
    save_wan(randomized(VideoDiT(config)), tmp_path / "wan", max_shard_bytes=20_000)
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).with_name("wan_partitions.py"))
    done = subprocess.run(
        [*command, script, str(tmp_path / "wan"), str(out)], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-6000:]
    results = json.loads(out.read_text())
    assert [result["stage"] for result in results] == [0, 1, 2, 3]
    assert not any(result["wrong"] for result in results), results
    assert all(result["untouched"] and result["steps"] == 0 for result in results), results
    assert [result["share"] < 0.6 for result in results] == [False, True, True, True], results
