"""Muon on partitioned matrices: whole matrices come together on one rank each, are orthogonalized there and go back.

Muon's update of a matrix needs all of it (Newton-Schulz), while ZeRO's partitions cut through matrices and hand the
optimizer flat stretches. So each matrix has an owner among the ranks that hold much of it. Momentum stays where its
piece of the matrix is and is updated there, element by element; the pieces of the direction travel to the owner, and
those of the update back, in one exchange each way for as many matrices as fit in a buffer on every rank. What each
rank computes does not depend on the partition: any ZeRO stage and world size takes the same step.

DeepSpeed has a Muon of its own, which is not used: it clips what it has orthogonalized instead of the gradient, takes
a scale that asks for a learning rate of its own, and keeps momentum where neither its universal format nor a fragment
finds it.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.distributed.collectives import gather_facts

# Of the polynomial whose five iterations bring singular values near 1 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
# Elements of whole matrices that a rank works on at a time.
MAX_ELEMENTS = 2**26


@torch.no_grad()
def orthogonalized(matrix: Tensor) -> Tensor:
    """[n, m] -> about U V^T of its singular value decomposition, in its own type (Jordan et al. 2024)."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.T if is_tall else matrix
    result = result / result.norm().clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = result @ result.T
        result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.T if is_tall else result


def update_scale(shape: Sequence[int]) -> float:
    """Brings the root mean square of an update to that of AdamW's, so that both take one learning rate and weight
    decay (Liu et al. 2025, arXiv:2502.16982, eq. 4)."""
    return 0.2 * math.sqrt(max(shape))


@dataclass(frozen=True)
class Place:
    """Where a piece of a flattened matrix is among the tensors that the optimizer updates on this rank."""

    name: str
    shape: tuple[int, ...]
    start: int  # of the piece in the matrix
    length: int
    number: int  # of the tensor among those updated, the same on all ranks
    offset: int  # of the piece in the tensor


@dataclass(frozen=True)
class _Matrix:
    """One matrix, in whose step every rank takes the part given here."""

    name: str
    shape: tuple[int, ...]
    number: int  # of the tensor it is in (see `Place`)
    owner: int  # the rank that orthogonalizes it
    held: dict[int, tuple[int, int]]  # by rank, the piece [start, stop) of the flattened matrix that it holds

    @property
    def sources(self) -> dict[int, tuple[int, int]]:
        """Whose pieces the owner puts together."""
        whole = (0, math.prod(self.shape))
        return {self.owner: whole} if self.held.get(self.owner) == whole else self.held

    @property
    def traffic(self) -> int:
        """Elements that its owner works on or sends, whichever are more."""
        return max(math.prod(self.shape), sum(stop - start for start, stop in self.held.values()))


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with "is_muon", AdamW for the others.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with Nesterov momentum; scale and decoupled weight decay of
    Liu et al. 2025. On CUDA Newton-Schulz runs in bf16, elsewhere in fp32. `locate` must be called on all ranks once
    the parameters are partitioned.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        device: torch.device,
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        """With a learning rate of 0, to be set before each step.

        Args:
            groups: parameters and "weight_decay" of each, and "is_muon" for those of matrices.
            device: computes and exchanges.
            betas: of AdamW.
            eps: of AdamW.
            momentum: of Muon.
        """
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, fused=device.type == "cuda")
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # of Newton-Schulz
        self.momentum = momentum
        self._tensors: list[Tensor] = []

    def locate(self, tensors: list[Tensor], places: list[Place]) -> None:
        """Tells what is updated and where in it this rank's pieces of the matrices are. Every rank must call it.

        Args:
            tensors: all that is updated, by number (see `Place`), as they will stand in `param_groups` in a step.
            places: of the matrices.
        """
        self._tensors = tensors
        self._places = {place.name: place for place in places}
        self._matrices = _owned(gather_facts(places))
        self._rounds: dict[tuple[int, ...], list[list[_Matrix]]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the groups and tensors that are in `param_groups` now, on the gradients in their `grad`. Every
        rank must call it, with its parts of the same parameters."""
        assert closure is None
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("is_muon")]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("is_muon"):
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        if not self._tensors:
            # DeepSpeed steps on zero gradients to make states.
            assert group["lr"] == 0, "locate comes before training"
            return
        given = {id(tensor) for tensor in group["params"]}
        numbers = tuple(number for number, tensor in enumerate(self._tensors) if id(tensor) in given)
        if numbers not in self._rounds:
            matrices = [matrix for matrix in self._matrices if matrix.number in numbers]
            self._rounds[numbers] = list(_rounds(matrices))
        for matrices in self._rounds[numbers]:
            updates = _exchanged(matrices, self._direction, self.device, self.dtype)
            for matrix, update in zip(matrices, updates, strict=True):
                if update is not None:
                    weights = self._piece(matrix.name, self._tensors[matrix.number])
                    weights.mul_(1 - group["lr"] * group["weight_decay"])
                    scale = group["lr"] * update_scale(matrix.shape)
                    weights.add_(update.to(weights.device, weights.dtype), alpha=-scale)

    def _direction(self, matrix: _Matrix) -> Tensor:
        """Momentum with a look ahead (Nesterov), of this rank's piece; updates the momentum."""
        tensor = self._tensors[matrix.number]
        assert tensor.grad is not None
        state = self.state[tensor]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(tensor, requires_grad=False)
        gradient = self._piece(matrix.name, tensor.grad)
        momentum = self._piece(matrix.name, state["momentum"])
        momentum.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(momentum, self.momentum)

    def _piece(self, name: str, whole: Tensor) -> Tensor:
        """This rank's piece of a matrix, as a flat view into something of the size of what is updated."""
        place = self._places[name]
        return whole.view(-1)[place.offset : place.offset + place.length]


# --- who computes what, and what travels


def _owned(of_ranks: list[list[Place]]) -> list[_Matrix]:
    """All matrices in one order, with owners among those who hold much of them, so that work is equal."""
    held: dict[str, dict[int, tuple[int, int]]] = {}
    first: dict[str, Place] = {}
    for rank, places in enumerate(of_ranks):
        for place in places:
            held.setdefault(place.name, {})[rank] = (place.start, place.start + place.length)
            first.setdefault(place.name, place)
    work = [0] * len(of_ranks)
    owner = {}
    for name in sorted(held, key=lambda name: (-_work(first[name].shape), first[name].number, name)):
        lengths = {rank: stop - start for rank, (start, stop) in held[name].items()}
        near = [rank for rank, length in lengths.items() if 2 * length >= max(lengths.values())]
        owner[name] = min(near, key=lambda rank: work[rank])
        work[owner[name]] += _work(first[name].shape)
    return [_Matrix(name, place.shape, place.number, owner[name], held[name]) for name, place in first.items()]


def _work(shape: tuple[int, ...]) -> int:
    """Multiplications of an iteration."""
    short, long = sorted(shape)
    return 2 * short**2 * long + short**3


def _rounds(matrices: list[_Matrix]) -> Iterator[list[_Matrix]]:
    """Cuts the work of every owner into stretches that fit in a buffer; a round is a stretch of each."""
    stretches: dict[int, list[list[_Matrix]]] = {}
    for owner in sorted({matrix.owner for matrix in matrices}):
        filled = MAX_ELEMENTS
        for matrix in matrices:
            if matrix.owner == owner:
                if filled + matrix.traffic > MAX_ELEMENTS:
                    stretches.setdefault(owner, []).append([])
                    filled = 0
                stretches[owner][-1].append(matrix)
                filled += matrix.traffic
    for parts in itertools.zip_longest(*stretches.values(), fillvalue=[]):
        yield [matrix for part in parts for matrix in part]


def _exchanged(
    matrices: list[_Matrix], direction: Callable[[_Matrix], Tensor], device: torch.device, dtype: torch.dtype
) -> list[Tensor | None]:
    """This rank's pieces of the updates of a round's matrices, None of what it holds nothing of.

    Args:
        matrices: of the round, owners ascending.
        direction: gives this rank's piece of what is orthogonalized, once for each matrix of which it holds one.
        device: computes and exchanges.
        dtype: of Newton-Schulz, which begins by rounding to it: so much is enough to send.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = [matrix for matrix in matrices if matrix.owner == rank]

    pieces: list[list[Tensor]] = [[] for _ in range(ranks)]
    for matrix in matrices:
        if rank in matrix.held:
            piece = direction(matrix)  # also where it is not sent: momentum is everybody's
            if rank in matrix.sources:
                pieces[matrix.owner].append(piece.to(device, dtype))
    sizes = [sum(_length(matrix.sources, source) for matrix in mine) for source in range(ranks)]
    arrived = _all_to_all(pieces, sizes, dtype, device)
    pieces = [[] for _ in range(ranks)]
    for matrix in mine:
        whole = torch.empty(math.prod(matrix.shape), dtype=dtype, device=device)
        for source, (start, stop) in matrix.sources.items():
            whole[start:stop], arrived[source] = arrived[source].tensor_split([stop - start])
        update = orthogonalized(whole.view(matrix.shape)).reshape(-1)
        for holder, (start, stop) in matrix.held.items():
            pieces[holder].append(update[start:stop])
    sizes = [sum(_length(matrix.held, rank) for matrix in matrices if matrix.owner == owner) for owner in range(ranks)]
    arrived = _all_to_all(pieces, sizes, dtype, device)
    updates: list[Tensor | None] = []
    for matrix in matrices:
        update_piece = None
        if rank in matrix.held:
            update_piece, arrived[matrix.owner] = arrived[matrix.owner].tensor_split([_length(matrix.held, rank)])
        updates.append(update_piece)
    return updates


def _length(pieces: dict[int, tuple[int, int]], rank: int) -> int:
    start, stop = pieces.get(rank, (0, 0))
    return stop - start


def _all_to_all(
    pieces: list[list[Tensor]], sizes: list[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Sends every rank its pieces; returns what each sent here, end to end, of the sizes given."""
    nothing = torch.empty(0, dtype=dtype, device=device)
    sent = torch.cat([nothing, *(piece for of_rank in pieces for piece in of_rank)])
    received = sent
    if len(sizes) > 1:
        received = torch.empty(sum(sizes), dtype=dtype, device=device)
        lengths = [sum(piece.numel() for piece in of_rank) for of_rank in pieces]
        dist.all_to_all_single(received, sent, sizes, lengths)
    return list(received.split(sizes))
