"""Which rank owns which layer, and the few ways in which ranks exchange tensors; all of it by ``torch.distributed``.

The loss of a data-parallel run is the mean over W ranks of the losses that they differentiate, as the averaged gradient
is. The curvature follows: factors are those of the data of all ranks, so they do not depend on how a batch is spread.

Every inverse is computed once, by the rank that owns the layer. Layers are dealt out by the cubes of their sizes, the
most expensive first, each to the rank with the least to do. How many ranks then hold an inverse is a trade of memory
for traffic. The ranks form a grid of W/k rows of k ranks; a row holds its layers' inverses, and sends the natural
gradients to the other rows, down the columns:

    k = W   "comm"      all ranks hold all inverses, and no natural gradient is sent
    k = 1   "memory"    only the owner holds an inverse

Symmetric matrices travel as their upper triangles, tensors of one dtype in one message.

Sharded tensors and FSDP2 take longer to import than the rest of natgrad, and some builds of torch lack them. They are
not imported here: whoever has sharded a model has imported them.

Source: Pauloski et al. (2021), KAISA, arXiv:2107.01739.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from natgrad.torch_internals import forward_hooks, wrapper_at_work

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

Inverses = Literal["comm", "memory"] | float

# Numbers of terms that differ by less are the same, summed in another order.
SAME_TERMS = 1e-6


@dataclass(frozen=True)
class Distributed:
    """A model that several processes train together, where the defaults are not what is wanted.

    A model in ``DistributedDataParallel`` or with FSDP2's sharded parameters needs none of this: natgrad takes the
    processes from it. Pass this instead of the model to choose who holds the inverses, or for a model that is wrapped
    only later.

    Args:
        model: The model.
        inverses: ``"comm"``: every rank holds all inverses; ``"memory"``: every rank holds only those of the layers
            that it owns, and sends their natural gradients to the others at every step; a number in (0, 1] between:
            this share of the ranks holds each inverse, rounded down to a divisor of their number.
        process_group: The ranks whose gradients are averaged; by default those of the model's wrapper, or all.

    Raises:
        ValueError: by natgrad, where ``inverses`` is none of these.

    Example:
        >>> import natgrad
        >>> model = nn.Linear(3, 2)  # in training: DistributedDataParallel(model)
        >>> optimizer = natgrad.KFAC(natgrad.Distributed(model, inverses="memory"), loss="mse")
    """

    model: nn.Module
    inverses: Inverses = "comm"
    process_group: dist.ProcessGroup | None = None


class Piece(NamedTuple):
    """A tensor to be exchanged, and whether its upper triangle tells all of it."""

    tensor: Tensor
    symmetric: bool

    @property
    def entries(self) -> int:
        """How many are sent."""
        all_of_it = self.tensor.numel()
        return (all_of_it + all_of_it // self.tensor.shape[-1]) // 2 if self.symmetric else all_of_it


class World:
    """The ranks that train one model, and what they exchange; a single process without a group.

    Args:
        group: Their process group.
        holders: k, how many hold each inverse.

    Attributes:
        rank: Of this process, in the group.
        size: W.
        owners: Rank of the owner of each layer, by name.
        traffic: Bytes of the messages of the latest step, by what they were for.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, holders: int = 1) -> None:
        self.group, self.holders = group, holders
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.owners: dict[str, int] = {}
        self.traffic: Counter[str] = Counter()
        self._row, self._column = self._groups()

    @classmethod
    def of(cls, model: nn.Module | Distributed) -> "World":
        """The ranks that train ``model``."""
        chosen = model if isinstance(model, Distributed) else Distributed(model)
        group = chosen.process_group or _group(chosen.model)
        if group is None and isinstance(model, Distributed) and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        size = 1 if group is None else dist.get_world_size(group)
        return cls(group if size > 1 else None, holders(chosen.inverses, size))

    def check_wrapper(self, model: nn.Module) -> None:
        """Raise a ``RuntimeError`` where a wrapper that was not known calls the model; there alone it can be seen."""
        wrapper = None if self.size > 1 else wrapper_at_work()
        if wrapper is None or dist.get_world_size(wrapper.process_group) == 1:
            return
        if any(module is model for module in wrapper.modules()):
            raise RuntimeError(
                "the model that natgrad was given is called by a DistributedDataParallel that it was not given: ranks "
                "would average their gradients and not their curvature, and drift apart. Give natgrad the wrapper in "
                "place of the model, or `natgrad.Distributed(model)` for one that is wrapped only later."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "World":
        return self  # process groups are this process's own, and a copy of a model talks to the same ranks

    def _groups(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """Those of this rank's row and column in the grid; None for a single rank."""
        if self.group is None or self.holders in (1, self.size):
            return (None, self.group) if self.holders == 1 else (self.group, None)
        ranks = torch.tensor(dist.get_process_group_ranks(self.group)).reshape(-1, self.holders)
        mesh = DeviceMesh(self.group._device_types[0].type, ranks, mesh_dim_names=("column", "row"))
        return mesh.get_group("row"), mesh.get_group("column")

    def deal(self, costs: Mapping[str, float]) -> None:
        """Give each layer an owner."""
        self.owners = deal(costs, self.size)

    def owns(self, name: str) -> bool:
        """Whether this rank inverts the factors of the layer called ``name``."""
        return self.owners[name] == self.rank

    def holds(self, name: str) -> bool:
        """Whether this rank has that layer's inverse."""
        return self.owners[name] // self.holders == self.rank // self.holders

    @property
    def replicates(self) -> bool:
        """Whether every rank holds every inverse."""
        return self.holders == self.size

    def sum(self, values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
        """Sums over the ranks of some numbers, as float64 on the CPU; ``like`` tells the device of the messages."""
        numbers = torch.as_tensor(values, dtype=torch.float64).cpu()
        if self.group is not None:
            sent = numbers.to(like.device)
            dist.all_reduce(sent, group=self.group)
            self.traffic["numbers"] += sent.numel() * sent.element_size()
            numbers = sent.cpu()
        return numbers

    def all(self, flag: bool, like: Tensor) -> bool:
        """Whether ``flag`` is true on every rank."""
        return flag if self.group is None else not self.sum([float(not flag)], like).any()

    def reduce(self, pieces: Sequence[Piece], what: str) -> None:
        """Replace tensors by their sums over the ranks."""
        if self.group is None:
            return
        for same in _by_dtype(pieces):
            flat = pack(same)
            dist.all_reduce(flat, group=self.group)
            self._count(what, same)
            unpack(flat, same)

    def copy_in_row(self, pieces: Mapping[str, Sequence[Piece]], what: str) -> None:
        """Replace the tensors of each layer, by name, by the owner's, on the ranks that hold them."""
        if self._row is not None:
            mine = {name: own for name, own in pieces.items() if self.holds(name)}
            self._copy(self._row, {n: self.owners[n] % self.holders for n in mine}, mine, what)

    def copy_in_column(self, pieces: Mapping[str, Sequence[Piece]], what: str) -> None:
        """Replace the tensors of each layer, by name, by those of the ranks that hold its inverse, on all others."""
        if self._column is not None:
            self._copy(self._column, {n: self.owners[n] // self.holders for n in pieces}, pieces, what)

    def _copy(
        self,
        group: dist.ProcessGroup,
        sources: Mapping[str, int],
        pieces: Mapping[str, Sequence[Piece]],
        what: str,
    ) -> None:
        """One message of each source for each dtype; all are under way at once."""
        running = []
        for source in sorted(set(sources.values())):
            theirs = [piece for name in pieces if sources[name] == source for piece in pieces[name]]
            for same in _by_dtype(theirs):
                flat = pack(same)
                work = dist.broadcast(flat, group=group, group_src=source, async_op=True)
                self._count(what, same)
                running.append((work, flat, same))
        for work, flat, same in running:
            work.wait()
            unpack(flat, same)

    def _count(self, what: str, pieces: Sequence[Piece]) -> None:
        self.traffic[what] += sum(piece.entries * piece.tensor.element_size() for piece in pieces)


@dataclass(frozen=True)
class Ranks:
    """How numbers about the data of this rank's latest forward pass become those of all ranks'.

    Attributes:
        world: The ranks.
        part: This rank's share of the data, by what the loss's reduction divides by; one over all ranks.
        like: Tells the device of the messages.
    """

    world: World = field(default_factory=World)
    part: float = 1.0
    like: Tensor = field(default_factory=lambda: torch.empty(0))

    def mean(self, values: Tensor | Sequence[float]) -> Tensor:
        """Over the data of all ranks, of means over the data of each; float64 on the CPU."""
        return self.world.sum(self.part * torch.as_tensor(values, dtype=torch.float64, device="cpu"), self.like)

    def all(self, flag: bool) -> bool:
        """Whether it is true on every rank."""
        return self.world.all(flag, self.like)

    def is_alone(self, terms: float, mean: float) -> bool:
        """Whether the pass of this rank is all that its loss is of, and there were none before it in the step.

        Args:
            terms: What the loss's reduction divides by in this rank's pass.
            mean: What it divides by in the whole step, in the mean over ranks.
        """
        return math.isclose(terms, mean * self.part * self.world.size, rel_tol=SAME_TERMS)


def _group(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that a model's wrapper averages gradients over; None where it has none."""
    wrapper = next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)
    if wrapper is not None:
        return wrapper.process_group
    meshes = [p.device_mesh for p in model.parameters() if is_sharded(p)]
    if not meshes:
        return None
    if meshes[0].size() == dist.get_world_size():
        return dist.group.WORLD
    if meshes[0].ndim == 1:
        return meshes[0].get_group()
    raise ValueError(
        "the model's parameters are sharded over some of the ranks, by a mesh of several dimensions: pass "
        "`natgrad.Distributed(model, process_group=…)` with the group of all ranks whose gradients are averaged."
    )


def holders(inverses: Inverses, size: int) -> int:
    """How many of ``size`` ranks hold each inverse: a divisor of them, as each row of the grid is full."""
    if inverses in ("comm", "memory"):
        return size if inverses == "comm" else 1
    if not isinstance(inverses, float | int) or not 0 < inverses <= 1:
        raise ValueError(f'`inverses` must be "comm", "memory" or a share of the ranks in (0, 1], not {inverses!r}.')
    return max([k for k in range(1, size + 1) if size % k == 0 and k <= inverses * size + 1e-6], default=1)


def deal(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """An owner for each layer: the most expensive goes first, to the rank with the least to do so far."""
    load = [0.0] * ranks
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = load.index(min(load))
        load[owners[name]] += costs[name]
    return owners


def pack(pieces: Sequence[Piece]) -> Tensor:
    """The entries to be sent, of tensors of one dtype."""
    return torch.cat([fold(t) if symmetric else t.flatten() for t, symmetric in pieces])


def unpack(flat: Tensor, pieces: Sequence[Piece]) -> None:
    """Undo :func:`pack`, into the tensors of ``pieces``."""
    for (tensor, symmetric), part in zip(pieces, flat.split([piece.entries for piece in pieces]), strict=True):
        if symmetric:
            unfold(part, tensor)
        else:
            tensor.copy_(part.view_as(tensor))


def fold(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix as a vector, without an index for each entry, which takes far longer.

    A row of what is folded is a row of the triangle, and the row as far from the end, both reversed; the row in the
    middle of an odd number would come twice.
    """
    n = matrix.shape[-1]
    half = (n + 1) // 2
    folded = matrix.new_zeros(*matrix.shape[:-2], half, n + 1)
    folded[..., 1:] = matrix[..., :half, :].triu()
    folded[..., :n] += matrix.flip(-2, -1)[..., :half, :].tril()
    return folded.flip(-1).flatten(-2)[..., : n * (n + 1) // 2].flatten()


def unfold(flat: Tensor, matrix: Tensor) -> None:
    """Undo :func:`fold`, into ``matrix``."""
    n = matrix.shape[-1]
    half = (n + 1) // 2
    padded = functional.pad(flat.view(*matrix.shape[:-2], -1), (0, half * (n + 1) - n * (n + 1) // 2))
    folded = padded.view(*matrix.shape[:-2], half, n + 1).flip(-1)
    matrix[..., :half, :] = folded[..., 1:].triu()
    matrix[..., half:, :] = folded[..., : n - half, :n].tril().flip(-2, -1)
    matrix.add_(matrix.triu(1).mT)


def _by_dtype(pieces: Sequence[Piece]) -> list[list[Piece]]:
    dtypes = dict.fromkeys(piece.tensor.dtype for piece in pieces)
    return [[piece for piece in pieces if piece.tensor.dtype == dtype] for dtype in dtypes]


def is_sharded(tensor: Tensor | None) -> "TypeIs[DTensor]":
    """Whether there is a tensor, and each rank holds a shard of it."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module's parameters."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and isinstance(module, loaded.FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which each rank may hold a shard."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, if the parameter is sharded."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every rank has all of it: nothing is sent.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Leave only the shards of FSDP's parameters; after an evaluation the outermost module's are still whole."""
    for module in model.modules():
        if is_fsdp(module):
            cast("FSDPModule", module).reshard()


@contextmanager
def shards_left_alone(model: nn.Module) -> Iterator[None]:
    """Without FSDP's hooks, which would put shards in the place of whole parameters that come with a call."""
    kept: list[tuple[Any, dict[int, Any]]] = []
    for module in model.modules():
        for hooks in (forward_hooks(module, before=True), forward_hooks(module)) if is_fsdp(module) else ():
            kept.append((hooks, dict(hooks)))
            for key, hook in kept[-1][1].items():
                if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)
