import pytest
import torch

from sora_train.config.root import ConfigError
from sora_train.distributed.topology import read_world

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_a_world_of_one_without_torchrun() -> None:
    world = read_world({})
    assert (world.global_rank, world.world_size, world.is_main) == (0, 1, True)


def test_each_rank_has_the_gpu_of_its_place_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = read_world(TORCHRUN)
    assert world.device == torch.device("cuda", 1)
    assert (world.global_rank, world.is_main) == (3, False)
    with pytest.raises(ConfigError, match="--nproc_per_node is 4, but this host has 2 CUDA devices"):
        read_world({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"})


def test_the_cpu_can_be_chosen_on_a_host_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable that DeepSpeed obeys: its engine and our model must not end up on two devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert read_world({**TORCHRUN, "DS_ACCELERATOR": "cpu"}).device == torch.device("cpu")
