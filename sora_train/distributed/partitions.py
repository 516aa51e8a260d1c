"""Where DeepSpeed keeps this rank's pieces of fp32 weights and optimizer states: the one place that knows.

ZeRO partitions parameters, each stage in its own way. What the rest of the code wants is simpler: for every parameter
of which this rank holds a piece, a `Fragment`: flat views, live, of the fp32 master weights and of every optimizer
state, and where in the flattened parameter they begin. The moving average updates beside these views; checkpoints are
written from them and read into them; so neither knows a ZeRO stage or a world size.

Pinned to deepspeed 0.19: attributes without a public accessor are read here and nowhere else, and a test runs every
stage and precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_train.distributed.muon import Muon, Place

_ADAM_STATES = ("exp_avg", "exp_avg_sq")
_MUON_STATES = ("momentum",)


@dataclass(frozen=True)
class Fragment:
    """A piece [start, start + length) of a flattened parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    master: Tensor  # fp32 [length], a view of the weights the optimizer updates
    states: dict[str, Tensor]  # fp32 [length] each, views
    # The part of the piece that this rank writes to a checkpoint, [first, last) within it: where several ranks hold
    # the same piece, each writes a share.
    written: tuple[int, int]

    @property
    def length(self) -> int:
        """Elements of the piece."""
        return self.master.numel()


def fragments(engine: Any) -> list[Fragment]:
    """This rank's pieces, in the order of the model's parameters; ZeRO-0 holds everything on every rank.

    Optimizer states are allocated (as zeros) where the optimizer has not taken a step yet.
    """
    _allocate_states(engine)
    names = {parameter: name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    stage = engine.zero_optimization_stage()
    pieces = {0: _replicated, 1: _in_flat_groups, 2: _in_flat_groups, 3: _of_each_parameter}[stage]
    return list(pieces(engine, names))


def optimizer_steps(engine: Any) -> int:
    """How many steps Adam's bias correction has counted."""
    for state in _optimizer(engine).state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def apply_loaded(engine: Any, optimizer_steps: int) -> None:
    """After the views of `fragments` were filled: sets the optimizer's step count and copies the fp32 weights into the
    (possibly bf16, possibly partitioned) weights the model computes with. Every rank must call it."""
    for state in _optimizer(engine).state.values():
        if "step" in state:
            state["step"].fill_(optimizer_steps)
    stage = engine.zero_optimization_stage()
    if stage == 3:
        _publish_partitions(engine)
    else:
        for fragment, parameter in _with_parameters(engine, stage):
            if stage == 0:
                parameter.data.copy_(fragment.master.view_as(parameter))  # type: ignore[union-attr]
            else:
                # Ranks hold different pieces: public DeepSpeed sums them up to the whole parameter.
                from deepspeed.utils import safe_get_full_fp32_param

                parameter.data.copy_(safe_get_full_fp32_param(parameter))


def _with_parameters(engine: Any, stage: int) -> Iterator[tuple[Fragment | None, nn.Parameter]]:
    held = {fragment.name: fragment for fragment in fragments(engine)}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield held.get(name), parameter


def _optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def _updated_tensors(engine: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """The fp32 tensors that the torch optimizer updates on this rank, each with its parameter group."""
    groups = _optimizer(engine).param_groups
    if engine.zero_optimization_stage() == 3:  # absent from param_groups between steps
        wrapper = engine.optimizer
        flats = enumerate(wrapper.fp32_partitioned_groups_flat)
        return [(flat, groups[wrapper.sub_group_to_group_id[number]]) for number, flat in flats]
    return [(tensor, group) for group in groups for tensor in group["params"]]


def _allocate_states(engine: Any) -> None:
    optimizer = _optimizer(engine)
    for tensor, group in _updated_tensors(engine):
        state = optimizer.state[tensor]
        if state:
            continue
        if not group.get("is_muon"):
            device = tensor.device if optimizer.defaults.get("fused") else "cpu"  # where torch keeps the count
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        keys = _MUON_STATES if group.get("is_muon") else _ADAM_STATES
        state |= {key: torch.zeros_like(tensor, requires_grad=False) for key in keys}


def locate_matrices(engine: Any) -> None:
    """Tells a Muon optimizer where this rank's pieces of its matrices are. Every rank must call it."""
    optimizer = _optimizer(engine)
    if not isinstance(optimizer, Muon):
        return
    updated = _updated_tensors(engine)
    # A tensor that is updated has its memory to itself, so a view into that memory tells where it is.
    numbers = {tensor.untyped_storage().data_ptr(): number for number, (tensor, _) in enumerate(updated)}
    places = []
    for fragment in fragments(engine):
        number = numbers[fragment.master.untyped_storage().data_ptr()]
        tensor, group = updated[number]
        if group.get("is_muon"):
            offset = int(fragment.master.storage_offset() - tensor.storage_offset())
            places.append(Place(fragment.name, fragment.shape, fragment.start, fragment.length, number, offset))
    optimizer.locate([tensor for tensor, _ in updated], places)


def reset_optimizer(engine: Any) -> None:
    """Zeros the states and the step count: what a DeepSpeed start without a checkpoint should be (at ZeRO-0 with bf16
    it has already counted a step)."""
    _allocate_states(engine)
    for state in _optimizer(engine).state.values():
        for value in state.values():
            value.zero_()


def _states(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """All but the count of steps."""
    return {key: state for key, state in optimizer.state[tensor].items() if key != "step"}


def _share(length: int) -> tuple[int, int]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return length * rank // ranks, length * (rank + 1) // ranks


def _replicated(engine: Any, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    """ZeRO-0: the parameters themselves (fp32) or one fp32 copy of each (bf16)."""
    optimizer, wrapper = _optimizer(engine), engine.optimizer
    masters = {parameter: parameter for parameter in names}
    if wrapper is not optimizer:  # FP16_UnfusedOptimizer: groups of copies beside groups of parameters
        for copies, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            masters.update(zip(parameters, copies, strict=True))
    for parameter, name in names.items():
        master = masters[parameter]
        states = {key: state.view(-1) for key, state in _states(optimizer, master).items()}
        flat = master.detach().view(-1)
        yield Fragment(name, tuple(parameter.shape), 0, flat, states, _share(flat.numel()))


def _in_flat_groups(engine: Any, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    """ZeRO-1 and 2: each rank holds a stretch of the concatenation of a group's parameters."""
    optimizer, wrapper = _optimizer(engine), engine.optimizer
    for group, flat in zip(wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            inside = mapping.get_hp_fragment_address()
            stretch = slice(inside.start, inside.start + inside.numel)
            states = {key: state[stretch] for key, state in _states(optimizer, flat).items()}
            start = mapping.lp_fragment_address.start
            yield Fragment(
                names[parameter], tuple(parameter.shape), start, flat.detach()[stretch], states, (0, inside.numel)
            )


def _of_each_parameter(engine: Any, names: dict[nn.Parameter, str]) -> Iterator[Fragment]:
    """ZeRO-3: each rank holds an equal part of every parameter, the last one padded."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    rank, optimizer = dist.get_rank(), _optimizer(engine)
    flats = {tensor.untyped_storage().data_ptr(): tensor for tensor, _ in _updated_tensors(engine)}
    for parameter, name in names.items():
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = part * rank
        length = min(part, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if length <= 0:
            continue
        master = safe_get_local_fp32_param(parameter).detach()[:length]
        keys = _states(optimizer, flats[master.untyped_storage().data_ptr()])
        states = {key: safe_get_local_optimizer_state(parameter, key)[:length] for key in keys}
        yield Fragment(name, tuple(parameter.ds_shape), start, master, states, (0, length))  # type: ignore[attr-defined]


def _publish_partitions(engine: Any) -> None:
    from deepspeed.utils import safe_get_local_fp32_param

    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    # Small parameters may be whole on every rank already: partition them again, or they keep the old values.
    gathered = [p for p in parameters if p.ds_status.name == "AVAILABLE"]
    if gathered:
        gathered[0].partition(gathered, has_been_updated=False)
    for parameter in parameters:
        parameter.ds_tensor.data.copy_(safe_get_local_fp32_param(parameter))
    if gathered:
        gathered[0].all_gather(gathered)
