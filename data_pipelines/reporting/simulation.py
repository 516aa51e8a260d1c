"""How a data set would train on some number of ranks: the real order and the real assignment, without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sora_train.config.curation import ReportConfig
from sora_train.config.data import DataConfig
from sora_train.config.diffusion import TimestepConfig
from sora_train.config.parallel import ParallelConfig
from sora_train.data.index import Dataset
from sora_train.data.loader import Loader, build_loader
from sora_train.data.order import GlobalBatch
from sora_train.data.packing import assign, balance
from sora_train.encoders.codec_shape import CodecShape
from sora_train.encoders.video_codec import build_codec

LEAST_BALANCE = 0.9
ENOUGH_CLIPS = 4  # a rank and step: from here on packs can be made alike


@dataclass(frozen=True)
class Simulation:
    """Means over the simulated steps."""

    ranks: int
    tokens: float  # a step, on all ranks
    clips_per_rank: float  # a step
    micro_steps: float  # a step
    fill: float  # tokens over what the packs of all ranks and micro-steps could hold
    idle: float  # share of packs that hold no clip
    balance: float  # mean over largest cost of a rank, both summed over micro-steps

    @property
    def useful(self) -> float:
        """Share of the ranks' time spent on clips: balance x (1 - padding), and packs are never padded."""
        return self.balance


def training_loader(config: ReportConfig, data: DataConfig, codec: CodecShape, dataset: Dataset) -> Loader:
    """The loader that training would start with, but for the processes that decode.

    Text rows made in advance are taken to be those of the training's text encoder.

    Raises:
        ConfigError: training would not start.
    """
    manifest = dataset.manifest
    return build_loader(
        replace(data, workers=0),
        config.model,
        codec,
        TimestepConfig(),
        config.seed,
        global_rank=0,
        world_size=config.ranks,
        largest_group=ParallelConfig().largest_group,
        codec_identity=build_codec(config.codec, "cpu").identity if manifest.encoders else None,
        text_identity=manifest.text_encoders[0] if manifest.text_encoders else None,
    )


def simulate(batches: Sequence[GlobalBatch], ranks: int, loader: Loader) -> Simulation:
    """Assigns the batches to ranks as training does.

    Raises:
        ConfigError: a clip fits no pack.
    """
    limits, cost_model = loader.limits, loader.cost_model
    steps = [assign(batch, ranks, limits, cost_model) for batch in batches]
    micro_steps = [packs for step in steps for packs in step]
    num_packs = len(micro_steps) * ranks
    num_tokens = sum(batch.num_tokens for batch in batches)
    return Simulation(
        ranks=ranks,
        tokens=num_tokens / len(batches),
        clips_per_rank=sum(len(batch.samples) for batch in batches) / len(batches) / ranks,
        micro_steps=len(micro_steps) / len(steps),
        fill=num_tokens / (num_packs * limits.max_tokens_per_pack),
        idle=sum(pack.num_tokens == 0 for packs in micro_steps for pack in packs) / num_packs,
        balance=balance(micro_steps, cost_model),
    )


def rank_counts(ranks: int) -> tuple[int, ...]:
    """Half as many, as many and twice as many."""
    return tuple(sorted({max(1, ranks // 2), ranks, 2 * ranks}))


def advice(simulation: Simulation, config: DataConfig) -> str:
    """What to change where ranks would wait for each other, in a sentence; empty where they would not."""
    if simulation.balance >= LEAST_BALANCE:
        return ""
    changes = [f"data.tokens_per_step={config.tokens_per_step}"]
    if simulation.clips_per_rank < ENOUGH_CLIPS:
        enough = float(f"{ENOUGH_CLIPS * simulation.tokens / simulation.clips_per_rank:.2g}")
        changes = [f"{changes[0]} to about {enough:.0f} ({ENOUGH_CLIPS} clips a rank)"]
    if simulation.micro_steps > 1:
        # Larger packs make fewer micro-steps, and every micro-step is waited for.
        changes.append(f"data.max_tokens_per_pack={config.max_tokens_per_pack} as far as memory allows")
    return (
        f"On {simulation.ranks} ranks {1 - simulation.balance:.0%} of the time is waiting for the slowest: a rank has "
        f"{simulation.clips_per_rank:.1f} clips a step. Raise {' or '.join(changes)}."
    )
