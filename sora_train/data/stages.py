"""The stages of a curriculum, and how many tokens each data set has given by a step. Exact integers, no state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

from sora_train.config.data import DataConfig, SizeConfig, StageConfig, dataset_configs
from sora_train.config.root import ConfigError
from sora_train.data.size import check_size


@dataclass(frozen=True)
class Stage:
    """What holds from a step on."""

    name: str  # where in the config it stands
    start_step: int
    size: SizeConfig
    tokens_per_step: int
    weights: tuple[int, ...]  # of each data set, in the order of `dataset_configs`, in the config's ratios

    @property
    def used(self) -> tuple[int, ...]:
        """The data sets that have a share."""
        return tuple(number for number, weight in enumerate(self.weights) if weight)

    def tokens_after(self, steps: int) -> tuple[int, ...]:
        """Tokens that each data set gives in the first `steps` steps of the stage: in all steps * tokens_per_step.

        The sums over the first 1, 2, … data sets are rounded, not the shares: nothing is left over, and no share is
        ever more than a token from what it should be.
        """
        total = sum(self.weights)
        ends = [steps * self.tokens_per_step * end // total for end in accumulate(self.weights)]
        return tuple(end - before for before, end in zip([0, *ends], ends, strict=False))


def build_stages(config: DataConfig) -> tuple[Stage, ...]:
    """The stages in order; the first begins at step 0.

    Raises:
        ConfigError: stages out of order, unknown data sets, or weights and sizes that cannot work.
    """
    datasets = dataset_configs(config)
    weights = {name: item.weight for name, item in datasets.items()}
    if config.shards == "":
        _check_weights(weights, "data.datasets")
    check_size(config.size)
    stages = [Stage("data", 0, config.size, config.tokens_per_step, _integers(weights))]
    for number, change in enumerate(config.stages):
        name = f"data.stages[{number}]"
        if change.start_step <= stages[-1].start_step:
            raise ConfigError(
                f"{name}.start_step={change.start_step}: choose more than {stages[-1].start_step}, where the stage "
                "before it begins"
            )
        for dataset in change.weights:
            if dataset not in datasets:
                raise ConfigError(f"{name}.weights names {dataset}: the data sets are {', '.join(datasets)}")
        weights = weights | change.weights
        _check_weights(weights, f"{name}.weights")
        stages.append(_changed(stages[-1], change, name, weights))
    for stage in stages:
        _check_shares(stage, tuple(datasets))
    return tuple(stages)


def _changed(before: Stage, change: StageConfig, name: str, weights: Mapping[str, float]) -> Stage:
    given = {key: value for key, value in vars(change.size).items() if value is not None}
    size = replace(before.size, **given)
    check_size(size, f"{name}.size")
    tokens_per_step = before.tokens_per_step if change.tokens_per_step is None else change.tokens_per_step
    return Stage(name, change.start_step, size, tokens_per_step, _integers(weights))


def _check_weights(weights: Mapping[str, float], name: str) -> None:
    for dataset, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ConfigError(f"{name} gives {dataset} the weight {weight}: choose 0 or more")
    if not any(weights.values()):
        raise ConfigError(f"{name} gives every data set the weight 0: give one of them more")


def _check_shares(stage: Stage, names: tuple[str, ...]) -> None:
    if stage.tokens_per_step < 1:
        raise ConfigError(f"{stage.name}.tokens_per_step={stage.tokens_per_step}: choose 1 or more")
    # Below two tokens a step, rounding could move a data set backwards.
    for number in stage.used if len(stage.used) > 1 else ():
        if stage.tokens_per_step * stage.weights[number] < 2 * sum(stage.weights):
            raise ConfigError(
                f"{stage.name} gives {names[number]} less than 2 of {stage.tokens_per_step} tokens per step: "
                "raise its weight or set it to 0"
            )


def _integers(weights: Mapping[str, float]) -> tuple[int, ...]:
    """Whole numbers in the same ratios, read as they are written: 0.1 is a tenth."""
    fractions = [Fraction(repr(float(weight))) for weight in weights.values()]
    unit = math.lcm(*(fraction.denominator for fraction in fractions))
    return tuple(int(fraction * unit) for fraction in fractions)
