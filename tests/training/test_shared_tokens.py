"""What the ranks of a group hold together is exactly the clips, whoever read them; no process is started."""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from sora_train.config.diffusion import CountedBy, DiffusionConfig
from sora_train.config.model import ModelConfig, TextConfig
from sora_train.config.parallel import ParallelConfig
from sora_train.cost.step_cost import of_model
from sora_train.data.order import GlobalBatch, PlannedSample
from sora_train.data.pack import Pack
from sora_train.data.packing import PackLimits, PackPlan, Piece, assign
from sora_train.data.schema import IndexRow
from sora_train.data.size import ClipSize
from sora_train.distributed import handing_round
from sora_train.distributed.topology import World
from sora_train.models.inputs import lay_out, pack_inputs
from sora_train.models.pack_layout import PackLayout
from sora_train.models.patchify import patchify
from sora_train.training.metrics import Metrics, PackLoss
from sora_train.training.shared_tokens import shared_clips, tokens_here
from sora_train.training.step import Encoders, diffusion_loss

MODEL = ModelConfig(
    width=32, depth=2, heads=8, mlp_width=64, in_channels=3, out_channels=3, patch_height=1, patch_width=1,
    text=TextConfig(width=16, layers=1, heads=2),
)  # fmt: skip
FILLER = -1
Result = TypeVar("Result")


def latents_of(sample: PlannedSample, column: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * sample.index + column)
    return torch.randn(sample.latent_shape, generator=generator)


def plans_of(draw: random.Random, regroups: bool) -> list[Sequence[PackPlan]]:
    """Micro-steps of a random step on a random world."""
    world_size, room = draw.choice([2, 3, 4, 8, 11]), draw.choice([30, 60])
    limits = PackLimits(room, 8, 8, regroups)
    samples = []
    for index in range(draw.randint(1, 14)):
        most = room * limits.group_size(world_size) if draw.random() < 0.3 else room
        t, h = draw.randint(1, 4), draw.randint(1, 3)
        shape = (3, t, h, max(1, min(draw.randint(1, 40), most // (t * h))))
        row = IndexRow(f"c{index}", "mp4", 0, 0, 1, 8.0, 8, 8, 1.0, "ab")
        size = ClipSize(t, h, 1, h, 1, 0, 1.0)
        tokens = shape[1] * shape[2] * shape[3]
        samples.append(PlannedSample(draw.randint(0, 9), index, 0, 0, row, size, shape, tokens, None))
    return list(assign(GlobalBatch(samples[0].step, tuple(samples)), world_size, limits, of_model(MODEL)))


def pack_of(plan: PackPlan, failed: set[tuple[int, int]]) -> Pack:
    """`failed`: (rank, clip) of what cannot be read."""
    pieces = plan.pieces
    if not any(piece.part for piece in pieces):
        row = IndexRow("filler", "", 0, 0, 1, 0.0, 1, 1, 0.0, "")
        filler = PlannedSample(0, FILLER, -1, -1, row, ClipSize(1, 1, 1, 1, 1, 0, 1.0), (3, 1, 1, 1), 1, None)
        pieces = (Piece(filler, range(1), True), *pieces)
    rank = plan.first_rank + plan.group_rank
    good = [piece.sample.index != FILLER and (rank, piece.sample.index) not in failed for piece in pieces]
    documents = [piece for piece in pieces if piece.part]
    return Pack(
        plan=plan,
        pieces=pieces,
        frames=[None] * len(pieces),
        latents=[latents_of(piece.sample) if piece.is_owned else None for piece in pieces],
        noise=[latents_of(piece.sample, 1) if piece.is_owned else None for piece in pieces],
        weight=torch.tensor(good, dtype=torch.float32),
        is_tried=tuple(piece.sample.index != FILLER for piece in pieces),
        t_S=torch.tensor([(piece.sample.index + 1) / 16 for piece in documents]),
        text=[f"clip {piece.sample.index}" for piece in documents],
        first_frame_draws=(0.5,) * len(documents),
        failures=(),
    )


class Exchange:
    """All-to-all among the threads of a group."""

    def __init__(self, size: int) -> None:
        self.slots: list[Sequence[Tensor]] = [()] * size
        self.together = threading.Barrier(size, timeout=30)
        self.here = threading.local()

    def __call__(self, rows: Tensor, group: str, send: list[int], receive: list[int]) -> Tensor:
        assert len(rows) == sum(send)
        self.slots[self.here.rank] = rows.split(send)
        self.together.wait()
        got = [sent[self.here.rank] for sent in self.slots]
        assert [len(part) for part in got] == receive
        self.together.wait()
        return torch.cat(got)

    def run(self, each: Callable[[int], Any]) -> list[Any]:
        """In a thread for each rank."""
        results: list[Any] = [None] * len(self.slots)

        def work(rank: int) -> None:
            self.here.rank = rank
            results[rank] = each(rank)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.slots))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def here(pack: Pack, groups: Any) -> tuple[list[Tensor], Tensor]:
    return tokens_here(pack, columns_of(pack), (3, 3), groups)


def columns_of(pack: Pack) -> list[list[Tensor | None]]:
    return [
        [None if clip is None else patchify(clip, (1, 1, 1)) for clip in clips] for clips in (pack.latents, pack.noise)
    ]


def exchanged(
    monkeypatch: pytest.MonkeyPatch, members: list[Pack], each: Callable[[Pack, Any], Result]
) -> list[Result]:
    """Of each rank of a group, given its pack and the groups."""
    exchange = Exchange(len(members))
    monkeypatch.setattr(handing_round, "exchange", exchange)
    groups: Any = SimpleNamespace(of=lambda first_rank, size: SimpleNamespace(group_name=""))
    return exchange.run(lambda n: each(members[n], groups))


@pytest.mark.parametrize("regroups", [True, False])
def test_each_rank_gets_exactly_its_tokens(monkeypatch: pytest.MonkeyPatch, regroups: bool) -> None:
    draw = random.Random(int(regroups))
    shared_tokens = lent = groups_seen = failures_seen = 0
    for _ in range(40):
        for packs in plans_of(draw, regroups):
            rank = 0
            while rank < len(packs):
                plans = [packs[rank + n] for n in range(packs[rank].group_size)]
                rank += len(plans)
                pieces = [(plan.first_rank + plan.group_rank, piece) for plan in plans for piece in plan.pieces]
                failed = {(at, piece.sample.index) for at, piece in pieces if draw.random() < 0.1}
                members = [pack_of(plan, failed) for plan in plans]
                found = exchanged(monkeypatch, members, here)
                bad = {clip for _, clip in failed}
                for pack, (columns, weight_S) in zip(members, found, strict=True):
                    check(pack, columns, weight_S, bad)
                clips = [document for pack in members for document in pack.documents]
                for sample in plans[0].shared:
                    parts = [list(piece.part) for piece in clips if piece.sample is sample]
                    assert [token for part in parts for token in part] == list(range(sample.num_tokens))
                groups_seen += len(plans) > 1
                shared_tokens += sum(plans[0].shares)
                lent += sum(not piece.part for _, piece in pieces)
                failures_seen += len(bad)
    assert groups_seen > 20
    assert shared_tokens > 1000
    assert lent > 0
    assert failures_seen > 20


def check(pack: Pack, columns: list[Tensor], weight_S: Tensor, bad: set[int]) -> None:
    """Tokens, noise, weights and places of one rank, document by document, against the whole clips."""
    documents = pack.documents
    for column, rows_LP in enumerate(columns):
        wanted = [
            patchify(latents_of(piece.sample, column), (1, 1, 1))[piece.part.start : piece.part.stop]
            for piece in documents
        ]
        assert torch.equal(rows_LP, torch.cat(wanted))
    good = [piece.sample.index not in bad and piece.sample.index != FILLER for piece in documents]
    assert weight_S.tolist() == good
    shared = shared_clips(pack.plan, torch.device("cpu"))
    shapes = [piece.sample.latent_shape for piece in documents]
    inputs = lay_out(columns[0], shapes, [piece.part for piece in documents], pack.text, MODEL, shared=shared)
    assert inputs.layout.lengths == tuple(len(piece.part) for piece in documents)
    whole = pack_inputs([latents_of(piece.sample) for piece in documents], pack.text, MODEL)
    places = whole.positions_L3.split(whole.layout.lengths)
    assert torch.equal(
        inputs.positions_L3,
        torch.cat([place[p.part.start : p.part.stop] for place, p in zip(places, documents, strict=True)]),
    )
    if shared is not None:
        assert shared.of_all.lengths == tuple(sample.num_tokens for sample in pack.plan.shared)
        held = [(piece.shared, piece.part) for piece in documents if piece.shared is not None]
        assert shared.parts == held, "attention's view of who holds what is the same"
        assert inputs.layout.shared is shared


@pytest.mark.parametrize("counted_by", list(CountedBy))
def test_loss_and_metrics_of_all_ranks_are_those_of_whole_clips(
    monkeypatch: pytest.MonkeyPatch, counted_by: CountedBy
) -> None:
    """With a model that looks at each token alone: what attention does is tested elsewhere."""
    config, draw = DiffusionConfig(counted_by=counted_by), random.Random(2)
    encoders: Any = Encoders(SimpleNamespace(), None)  # type: ignore[arg-type]

    def model(noisy_LP: Tensor, positions_L3: Tensor, t_S: Tensor, text: Tensor, layout: PackLayout) -> Tensor:
        rows_S = torch.tensor(layout.text_lengths, dtype=torch.float32) + t_S
        return 0.5 * noisy_LP + 0.1 * positions_L3 + 0.1 * rows_S[layout.sample_L][:, None]

    def loss_of(pack: Pack, groups: Any) -> PackLoss:
        return diffusion_loss(model, pack, encoders, MODEL, config, groups)

    def summed(results: list[PackLoss]) -> list[float]:
        metrics = Metrics(World(0, 1, 0, 1, torch.device("cpu")), ParallelConfig())
        for result in results:
            metrics.add(result)
        sums = (metrics.step_losses[0][None], metrics.by_t.flatten(), metrics.by_kind.flatten(), metrics.counts)
        return [*torch.cat(sums).tolist(), metrics.tried]

    for _ in range(12):
        for packs in plans_of(draw, True):
            rank = 0
            while rank < len(packs):
                plans = [packs[rank + n] for n in range(packs[rank].group_size)]
                rank += len(plans)
                # Masked on all ranks: it is not tried.
                bad = {sample.index for plan in plans for sample in plan.shared if draw.random() < 0.2}
                failed = {(plan.first_rank + plan.group_rank, clip) for plan in plans for clip in bad}
                members = [pack_of(plan, failed) for plan in plans]
                found = exchanged(monkeypatch, members, loss_of)
                clips = tuple(sample for plan in plans for sample in plan.samples) + plans[0].shared
                whole = PackPlan(0, 0, True, clips, plans[0].planned_tokens, plans[0].planned_samples)
                alone = loss_of(pack_of(whole, {(0, clip) for clip in bad}), None)
                torch.testing.assert_close(summed(found), summed([alone]), rtol=1e-5, atol=1e-7)


def test_many_small_clips_tell_whether_they_were_read_in_few_rows() -> None:
    """More clips than a row has numbers."""
    parts = tuple(tuple(range(1) if clip % 2 == rank else range(0) for clip in range(5)) for rank in range(2))
    rounds = [handing_round.Round(parts, (1, 0, 1, 0, 1), 0, rank, width=2) for rank in range(2)]
    rows = [torch.full((1, 2), float(clip)) for clip in range(5)]
    weights = torch.tensor([[1.0, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    sent = [one.given(rows, weight) for one, weight in zip(rounds, weights, strict=True)]
    assert [len(rows) for rows in sent] == [3 + 2 + 3, 3 + 3 + 3]
    for rank, one in enumerate(rounds):
        pieces = [
            part.split([giver.rows_between(giver.group_rank, taker) for taker in range(2)])[rank]
            for giver, part in zip(rounds, sent, strict=True)
        ]
        got, weight = one.taken(torch.cat(pieces))
        assert got[:, 0].tolist() == [clip for clip in range(5) if clip % 2 == rank]
        assert weight.tolist() == [0, 1, 1, 1, 0]


def test_packs_of_whole_clips_ask_nobody() -> None:
    nobody: Any = None
    (packs, *_) = plans_of(random.Random(0), True)
    samples = packs[0].samples + packs[0].shared
    pack = pack_of(PackPlan(0, 0, True, samples, 1, 1), set())
    pack = replace(pack, weight=torch.linspace(0, 1, len(pack.pieces)))
    (clean, _), weight_S = tokens_here(pack, columns_of(pack), (3, 3), nobody)
    assert len(clean) == pack.num_tokens
    assert weight_S is pack.weight
