import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from corpus import CODEC, MODEL, data_config

from sora_train.config.diffusion import TimestepConfig
from sora_train.config.root import ConfigError
from sora_train.data import sample as sample_module
from sora_train.data.index import open_dataset
from sora_train.data.loader import Loader, Pack, build_loader


def loader_of(
    shards: Path, rank: int = 0, world_size: int = 1, largest_group: int = 1, **changes: object
) -> Loader:
    config = data_config(shards, **changes)
    return build_loader(
        config,
        MODEL,
        CODEC,
        TimestepConfig(),
        seed=3,
        global_rank=rank,
        world_size=world_size,
        largest_group=largest_group,
    )


def by_index(packs: list[Pack]) -> dict[int, tuple[object, ...]]:
    """All that a clip brings to training, by its place in the global batch; no fillers."""
    assert all(part == range(sample.num_tokens) for pack in packs for sample, part, *_ in pack.pieces)
    return {
        sample.index: (sample, frames.numpy().tobytes(), noise.numpy().tobytes(), float(t), text, float(weight))
        for pack in packs
        for sample, frames, noise, t, text, weight in zip(
            pack.samples, pack.frames, pack.noise, pack.t_S, pack.text, pack.weight, strict=True
        )
        if sample.shard >= 0
    }


def test_any_number_of_ranks_sees_the_same_batch(shards: Path) -> None:
    for step in (0, 4):
        whole = by_index(list(loader_of(shards).packs(step)))
        assert len(whole) > 4
        for world_size in (2, 3, 4):
            ranks = [list(loader_of(shards, rank, world_size).packs(step)) for rank in range(world_size)]
            assert len({len(packs) for packs in ranks}) == 1
            assert sum(len(by_index(packs)) for packs in ranks) == len(whole)
            assert by_index([pack for packs in ranks for pack in packs]) == whole


def test_a_resumed_loader_goes_on_as_the_first_would_have(shards: Path) -> None:
    loader = loader_of(shards)
    straight = [by_index(list(loader.packs(step))) for step in range(6)]
    for start in (5, 2):
        resumed = loader_of(shards)
        assert [by_index(list(resumed.packs(step))) for step in range(start, 6)] == straight[start:]
    # A step left half-way leaves nothing behind for the next, or for itself.
    for step in (2, 1):
        assert not next(loader.packs(1)).is_last
        assert by_index(list(loader.packs(step))) == straight[step]


def test_shapes_and_draws_of_a_pack(shards: Path) -> None:
    loader = loader_of(shards)
    packs = [pack for step in range(8) for pack in loader.packs(step)]
    for pack in packs:
        assert pack.num_tokens <= loader.config.max_tokens_per_pack
        assert not pack.failures
        for sample, frames, noise in zip(pack.samples, pack.frames, pack.noise, strict=True):
            assert frames.dtype == torch.uint8
            assert frames.shape == (sample.size.num_frames, sample.size.height, sample.size.width, 3)
            assert noise.shape == CODEC.latent_shape(*frames.shape[:3])
        assert ((pack.t_S > 0) & (pack.t_S < 1)).all()
    noise = torch.cat([part.flatten() for pack in packs for part in pack.noise])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    texts = {text for pack in packs for text in pack.text}
    assert "" in texts
    assert any(text.startswith("a square") for text in texts)
    assert len({(sample.size.height, sample.size.width) for pack in packs for sample in pack.samples}) >= 4
    assert len({float(t) for pack in packs for t in pack.t_S}) == sum(len(pack.samples) for pack in packs)


def test_a_rank_without_clips_works_on_one_filler_token(shards: Path) -> None:
    world_size = 12
    packs = [next(iter(loader_of(shards, rank, world_size).packs(0))) for rank in range(world_size)]
    fillers = [pack for pack in packs if not pack.weight.any()]
    assert fillers
    for pack in fillers:
        assert (pack.num_tokens, pack.text) == (1, [""])
        assert pack.frames[0].shape == (1, 8, 8, 3)
        assert pack.noise[0].shape == (96, 1, 2, 2)
    real = [pack for pack in packs if pack.weight.any()]
    assert packs[0].plan.planned_tokens == sum(pack.num_tokens for pack in real)
    assert packs[0].plan.planned_samples == sum(len(pack.samples) for pack in real)


def test_a_broken_clip_is_masked_and_moves_nobody(shards: Path, tmp_path: Path) -> None:
    clean = list(loader_of(shards).packs(0))
    victim = clean[0].samples[0]
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    name = open_dataset(damaged).manifest.shards[victim.shard].name
    with (damaged / name).open("r+b") as file:
        file.seek(victim.row.medium_offset)
        file.write(bytes(victim.row.medium_size))
    packs = list(loader_of(damaged).packs(0))
    (failure,) = [failure for pack in packs for failure in pack.failures]
    assert (failure.key, failure.shard, failure.reason) == (victim.row.key, f"main/{name}", "hash")
    before, after = by_index(clean), by_index(packs)
    assert packs[0].weight[0] == 0
    assert not packs[0].frames[0].any()
    assert [pack.plan.planned_tokens for pack in packs] == [pack.plan.planned_tokens for pack in clean]
    del before[victim.index], after[victim.index]
    assert after == before


def test_worker_processes_change_nothing_and_end(shards: Path) -> None:
    here, there = loader_of(shards), loader_of(shards, workers=2, read_ahead=2)
    for step in (0, 1, 2):
        assert by_index(list(there.packs(step))) == by_index(list(here.packs(step)))
    assert there.pool is not None
    workers = there.pool.pids()
    assert len(workers) == 2
    there.close()
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_a_worker_loads_no_training_code() -> None:
    code = "import sys, sora_train.data.pack, sora_train.data.loader; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"deepspeed", "wandb", "diffusers", "transformers", "hydra"} & set(modules)


def test_validation_clips_and_draws_never_change(shards: Path) -> None:
    held = by_index(loader_of(shards, held_out_fraction=0.4).validation_packs(5))
    assert len(held) == 5
    ranks = [loader_of(shards, rank, 2, held_out_fraction=0.4).validation_packs(5) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert by_index(ranks[0] + ranks[1]) == held
    assert loader_of(shards, held_out_fraction=0.0).validation_packs(5) == []


def test_settings_that_cannot_work_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.workers=-1"):
        loader_of(shards, workers=-1)


def test_clips_of_a_shard_that_is_gone_fail_one_by_one(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "shards" / "shard-000003.tar").unlink()
    packs = [pack for step in range(4) for pack in loader_of(tmp_path / "shards").packs(step)]
    failures = [failure for pack in packs for failure in pack.failures]
    assert {(failure.shard, failure.reason) for failure in failures} == {("main/shard-000003.tar", "missing_shard")}
    lost = sum(sample.shard == 3 for pack in packs for sample in pack.samples)
    assert len(failures) == lost


def together(ranks: list[list[Pack]]) -> tuple[dict[int, tuple[object, ...]], int]:
    """`by_index` of what the ranks hold together, each clip read by one of them and its tokens held once; and how many
    tokens are shared."""
    found: dict[int, tuple[object, ...]] = {}
    texts: dict[int, set[tuple[object, ...]]] = {}
    held: dict[int, list[int]] = {}
    shared = 0
    for packs in zip(*ranks, strict=True):
        for pack in packs:
            shared += sum(len(piece.part) for piece in pack.pieces if piece.shared is not None)
            for place, (piece, frames, noise) in enumerate(zip(pack.pieces, pack.frames, pack.noise, strict=True)):
                sample = piece.sample
                if sample.shard < 0:
                    continue
                assert (frames is not None) == (noise is not None) == piece.is_owned
                assert pack.weight[place] == 1
                if piece.is_owned:
                    assert sample.index not in found, "read once"
                    found[sample.index] = (sample, frames.numpy().tobytes(), noise.numpy().tobytes())
                if piece.part:
                    held.setdefault(sample.index, []).extend(piece.part)
                    texts.setdefault(sample.index, set()).add((float(pack.t_S[place]), pack.text[place]))
    assert held == {index: list(range(sample.num_tokens)) for index, (sample, *_) in found.items()}
    assert all(len(text) == 1 for text in texts.values()), "on all that hold tokens alike"
    return {index: (*clip, *texts[index].pop(), 1.0) for index, clip in found.items()}, shared


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_group_reads_each_clip_once_and_sees_the_same_batch(
    shards: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, decoded, decode = loader_of(shards), [], sample_module.decode_clip

    def counted(data: bytes, row: object, *others: object, **more: object) -> object:
        decoded.append(row)
        return decode(data, row, *others, **more)

    ranks = [
        loader_of(shards, rank, world_size, largest_group=8, max_tokens_per_pack=1200 // world_size)
        for rank in range(world_size)
    ]
    total = 0
    for step in range(3):
        alone = by_index(list(whole.packs(step)))
        monkeypatch.setattr(sample_module, "decode_clip", counted)
        found, shared = together([list(loader.packs(step)) for loader in ranks])
        monkeypatch.setattr(sample_module, "decode_clip", decode)
        assert found == alone
        assert len(decoded) == len(alone)
        decoded.clear()
        total += shared
        for loader in ranks:
            assert all(pack.num_tokens <= 1200 // world_size for pack in loader.packs(step))
    assert total > 2000


def test_worker_processes_read_texts_without_media(shards: Path) -> None:
    settings = {"world_size": 2, "largest_group": 2, "max_tokens_per_pack": 600}
    here = [loader_of(shards, rank, **settings) for rank in range(2)]
    there = [loader_of(shards, rank, workers=1, read_ahead=3, **settings) for rank in range(2)]
    seen = 0
    for step in range(3):
        packs = [list(loader.packs(step)) for loader in there]
        seen += sum(not piece.is_owned for rank in packs for pack in rank for piece in pack.pieces)
        assert together(packs) == together([list(loader.packs(step)) for loader in here])
        if step == 0:
            for loader, read in zip(here, packs, strict=True):
                for plan, pack in zip(loader.plans(step), read, strict=True):
                    tasks = [task for task in loader._tasks(plan) if task is not None and not task.has_medium]
                    assert all(task.places.num_bytes == 1 for task in tasks), "no memory for what is not read"
                    assert len(tasks) == sum(not piece.is_owned for piece in pack.pieces)
    assert seen > 3
    for loader in there:
        loader.close()


def test_held_out_clips_are_shared_too(shards: Path) -> None:
    whole = by_index(loader_of(shards, held_out_fraction=0.5).validation_packs(12))
    settings = {"largest_group": 4, "max_tokens_per_pack": 300, "held_out_fraction": 0.5}
    packs = [loader_of(shards, rank, 4, **settings).validation_packs(12) for rank in range(4)]
    found, shared = together(packs)
    assert found == whole
    assert shared > 0


def test_a_clip_that_no_group_can_hold_is_named_at_the_start(shards: Path) -> None:
    message = (
        r"clip clip\d+ of shard-\d+\.tar has 1008 tokens \(17 frames of 112x64\), over data\.max_tokens_per_pack=300"
        r"{}: raise it, or lower data\.size\.max_pixels or max_frames"
    )
    on_each = " on each of the 2 ranks that may share it"
    for world_size, largest_group, found in ((1, 8, ""), (4, 1, ""), (4, 2, on_each), (3, 8, on_each)):
        with pytest.raises(ConfigError, match=message.format(found)):
            loader_of(shards, 0, world_size, largest_group, max_tokens_per_pack=300)
    loader_of(shards, 0, 4, 4, max_tokens_per_pack=300)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_of_the_ledger_is_masked_on_all_ranks_that_share_it(shards: Path, workers: int) -> None:
    settings = {"world_size": 2, "largest_group": 2, "max_tokens_per_pack": 600, "workers": workers}
    loaders = [loader_of(shards, rank, **settings) for rank in range(2)]
    plan = next(plan for plan in loaders[0].plans(0) if plan.shared)
    victim = plan.shared[0]
    for loader in loaders:
        loader.masked = {0: frozenset({(loader._shard_name(victim), victim.row.key)})}
        packs = list(loader.packs(0))
        loader.close()
        assert not [failure for pack in packs for failure in pack.failures]
        seen = [
            (float(weight), tried)
            for pack in packs
            for piece, weight, tried in zip(pack.pieces, pack.weight, pack.is_tried, strict=True)
            if piece.sample.index == victim.index
        ]
        assert seen == [(0.0, False)]
