"""How a data set would train on some number of ranks: the real order and the real assignment, without a model."""

from collections.abc import Sequence
from dataclasses import dataclass

from sora_train.config.data import DataConfig
from sora_train.config.model import ModelConfig
from sora_train.cost.flops import step_flops, text_tokens
from sora_train.data.order import GlobalBatch, PlannedSample
from sora_train.data.packing import assign, balance

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
    balance: float  # mean over largest cost of a rank, both summed over micro-steps
    idle: float  # share of packs that hold no clip

    @property
    def useful(self) -> float:
        """Share of the ranks' time spent on clips: balance x (1 - padding), and packs are never padded."""
        return self.balance


def simulate(batches: Sequence[GlobalBatch], ranks: int, config: DataConfig, model: ModelConfig) -> Simulation:
    """Assigns the batches to ranks as training does.

    Raises:
        ConfigError: a clip fits no pack.
    """
    def cost(sample: PlannedSample) -> float:
        return step_flops(model, sample.num_tokens, text_tokens(model, sample.text_bytes))

    steps = [assign(batch, ranks, config.max_tokens_per_pack, cost) for batch in batches]
    micro_steps = [packs for step in steps for packs in step]
    room = len(micro_steps) * ranks * config.max_tokens_per_pack
    idle = sum(not pack.samples for packs in micro_steps for pack in packs)
    return Simulation(
        ranks=ranks,
        tokens=sum(batch.num_tokens for batch in batches) / len(batches),
        clips_per_rank=sum(len(batch.samples) for batch in batches) / len(batches) / ranks,
        micro_steps=len(micro_steps) / len(steps),
        fill=sum(batch.num_tokens for batch in batches) / room,
        balance=balance(micro_steps, cost),
        idle=idle / (len(micro_steps) * ranks),
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
        changes[0] += f" to about {enough:.0f}, for {ENOUGH_CLIPS} clips a rank,"
    if simulation.micro_steps > 1:
        # Larger packs make fewer micro-steps, and every micro-step is waited for.
        changes.append(f"data.max_tokens_per_pack={config.max_tokens_per_pack}, as far as memory allows")
    return (
        f"On {simulation.ranks} ranks {1 - simulation.balance:.0%} of the time is waiting for the slowest: a rank has "
        f"{simulation.clips_per_rank:.1f} clips a step. Raise {' or '.join(changes).rstrip(',')}."
    )
