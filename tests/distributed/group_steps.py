"""Clips, and who holds them in the micro-steps of a step: whole on a rank, or shared by a group of neighbours."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sora_train.config.model import ModelConfig, TextConfig, TextKind
from sora_train.models.inputs import Conditioning, PackedConditioning, pack_inputs
from sora_train.models.pack_layout import PackLayout, SharedClips

BYTES = ModelConfig(
    width=32, depth=2, heads=4, mlp_width=48, in_channels=4, out_channels=4, frequency_width=16,
    text=TextConfig(kind=TextKind.bytes, width=16, layers=1, heads=2, max_bytes=12),
)  # fmt: skip
ROWS = replace(BYTES, text=TextConfig(kind=TextKind.encoder, width=24))
IMAGES = replace(ROWS, image_width=12, condition_channels=3)
# Sizes of the groups in each micro-step of each step.
SCHEDULES: dict[int, list[list[tuple[int, ...]]]] = {
    2: [[(2,)], [(1, 1), (2,)], [(2,), (2,), (1, 1)]],
    4: [[(2, 1, 1), (4,)], [(1, 1, 2)], [(2, 2), (1, 1, 1, 1), (2, 1, 1)], [(4,), (2, 2)]],
}


@dataclass(frozen=True)
class Clip:
    """A clip as rows, the loss of each of its tokens having this weight."""

    tokens_LP: Tensor
    positions_L3: Tensor
    target_LQ: Tensor
    t: float
    text: Tensor
    conditioning: PackedConditioning | None
    weight: float

    @property
    def num_tokens(self) -> int:
        return self.tokens_LP.shape[0]


@dataclass(frozen=True)
class Group:
    """In one micro-step."""

    first_rank: int
    whole: list[list[Clip]]  # of each rank
    shared: list[Clip]
    shares: list[int]


@dataclass(frozen=True)
class Inputs:
    """A pack."""

    arguments: tuple[Any, ...]
    target_LQ: Tensor
    weight_L: Tensor


def random_clip(draw: random.Random, config: ModelConfig, tokens: int = 0) -> Clip:
    """Of 1 to 36 tokens, or so many."""
    generator = torch.Generator().manual_seed(draw.randrange(2**40))
    shape = (tokens, 2, 2) if tokens else (draw.randint(1, 4), 2 * draw.randint(1, 3), 2 * draw.randint(1, 3))
    latents = torch.randn(config.in_channels, *shape, generator=generator)
    if config.text.kind is TextKind.bytes:
        text: list[Any] = ["".join(draw.choices("abcdefgh ", k=draw.randint(1, 12)))]
    else:
        text = [torch.randn(draw.randint(1, 6), config.text.width, generator=generator)]
    conditioning = None
    if config.image_width:
        conditioning = Conditioning(
            [torch.randn(config.condition_channels, *shape, generator=generator)],
            [torch.randn(draw.randint(1, 5), config.image_width, generator=generator)],
            [draw.randint(0, shape[0])],
        )
    inputs = pack_inputs([latents], text, config, conditioning)
    target = torch.randn(inputs.tokens_LP.shape[0], 4 * config.out_channels, generator=generator)
    weight = draw.choice([0.5, 1.0, 2.0])
    return Clip(
        inputs.tokens_LP, inputs.positions_L3, target, draw.random(), inputs.text, inputs.conditioning, weight
    )


def random_group(draw: random.Random, config: ModelConfig, first_rank: int, size: int) -> Group:
    whole = [[random_clip(draw, config) for _ in range(draw.choice([0, 1, 2]))] for _ in range(size)]
    if size == 1:
        return Group(first_rank, whole, [], [0])
    # Now and then fewer tokens than ranks.
    tokens = draw.choice([0, 0, 0, draw.randint(1, size - 1)])
    shared = [random_clip(draw, config, tokens) for _ in range(1 if tokens else draw.randint(1, 3))]
    total = sum(clip.num_tokens for clip in shared)
    ends = [0, *sorted(draw.choice([0, draw.randint(0, total)]) for _ in range(size - 1)), total]
    return Group(first_rank, whole, shared, [end - start for start, end in itertools.pairwise(ends)])


def random_step(draw: random.Random, config: ModelConfig, schedule: Sequence[Sequence[int]]) -> list[list[Group]]:
    """The groups of each micro-step."""
    return [
        [
            random_group(draw, config, first_rank, size)
            for first_rank, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False)
        ]
        for sizes in schedule
    ]


def cut(clip: Clip, held: range) -> Clip:
    """Some of its tokens."""
    part = slice(held.start, held.stop)
    conditioning = clip.conditioning
    if conditioning is not None:
        assert conditioning.tokens_LP is not None
        assert conditioning.is_clean_L is not None
        conditioning = replace(
            conditioning, tokens_LP=conditioning.tokens_LP[part], is_clean_L=conditioning.is_clean_L[part]
        )
    return replace(
        clip,
        tokens_LP=clip.tokens_LP[part],
        positions_L3=clip.positions_L3[part],
        target_LQ=clip.target_LQ[part],
        conditioning=conditioning,
    )


def lay(clips: Sequence[Clip], has_t_of_tokens: bool = False) -> Inputs:
    """Clips or parts of clips end to end."""
    lengths = [clip.num_tokens for clip in clips]
    images: list[Tensor] = []
    conditioning = None
    given = [clip.conditioning for clip in clips if clip.conditioning is not None]
    if given:
        images = [each.image_ID for each in given if each.image_ID is not None]
        conditioning = PackedConditioning(
            torch.cat([each.tokens_LP for each in given if each.tokens_LP is not None]),
            torch.cat(images),
            torch.cat([each.is_clean_L for each in given if each.is_clean_L is not None]),
        )
    layout = PackLayout.build(
        lengths, [clip.text.shape[0] for clip in clips], image_lengths=[rows.shape[0] for rows in images]
    )
    t = torch.tensor([clip.t for clip in clips])
    if has_t_of_tokens:  # something that differs from token to token, and is the same wherever the token is
        t = t[layout.sample_L] * (0.5 + 0.5 * torch.cat([clip.target_LQ[:, 0] for clip in clips]).sigmoid())
    arguments = (
        torch.cat([clip.tokens_LP for clip in clips]),
        torch.cat([clip.positions_L3 for clip in clips]),
        t,
        torch.cat([clip.text for clip in clips]),
        layout,
        conditioning,
    )
    weight_L = torch.tensor([clip.weight for clip in clips])[layout.sample_L]
    return Inputs(arguments, torch.cat([clip.target_LQ for clip in clips]), weight_L)


def pack_of(group: Group, rank: int, config: ModelConfig, has_t_of_tokens: bool = False, offset: int = 0) -> Inputs:
    """What a rank holds; with a wrong `offset`, not what its neighbours think it does."""
    here = rank - group.first_rank
    clips, shared = list(group.whole[here]), None
    if group.shared:
        shared = SharedClips.build([c.num_tokens for c in group.shared], group.shares, group.first_rank, here)
    parts = [] if shared is None else shared.parts
    if not clips and not parts:
        clips.append(replace(random_clip(random.Random(0), config, 1), weight=0.0))
    moved = [range(max(held.start - offset, 0), max(held.start - offset, 0) + len(held)) for _, held in parts]
    clips += [cut(group.shared[number], held) for (number, _), held in zip(parts, moved, strict=True)]
    inputs = lay(clips, has_t_of_tokens)
    arguments = [replace(each, shared=shared) if isinstance(each, PackLayout) else each for each in inputs.arguments]
    return replace(inputs, arguments=tuple(arguments))


def all_clips(step: Sequence[Sequence[Group]]) -> list[Clip]:
    groups = [group for micro_step in step for group in micro_step]
    return [clip for group in groups for clip in [*itertools.chain(*group.whole), *group.shared]]


def mine(micro_step: Sequence[Group], rank: int) -> Group:
    return next(group for group in micro_step if 0 <= rank - group.first_rank < len(group.whole))


def features(steps: Sequence[Sequence[Sequence[Group]]]) -> Counter[str]:
    """How often each of what the cases are for comes up."""
    found: Counter[str] = Counter()
    for group in (group for step in steps for micro_step in step for group in micro_step):
        found["groups"] += 1
        if len(group.shares) == 1:
            found["fillers"] += not group.whole[0]
            continue
        found["shared groups"] += 1
        found["empty shares"] += group.shares.count(0)
        found["fillers"] += sum(not share and not clips for share, clips in zip(group.shares, group.whole, strict=True))
        found["whole beside a share"] += sum(
            bool(share and clips) for share, clips in zip(group.shares, group.whole, strict=True)
        )
        ends = set(itertools.accumulate(clip.num_tokens for clip in group.shared)) | {0}
        cuts = list(itertools.accumulate(group.shares))[:-1]
        found["cuts inside a clip"] += sum(cut not in ends for cut in cuts)
        found["uneven shares"] += len(set(group.shares)) > 1
    return found
