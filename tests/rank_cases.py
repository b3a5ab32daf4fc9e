"""A network trained by one process or by several ranks, in every way that natgrad knows."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import natgrad

DATA = 24
LOSSES = {"mse": functional.mse_loss, "cross_entropy": functional.cross_entropy}
EVEN = {2: [12, 12], 4: [6, 6, 6, 6]}
UNEVEN = {2: [17, 7], 4: [4, 11, 3, 6]}
NOTHING: dict[str, Any] = {}
GIVEN: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "damping": 0.1}


class Case(NamedTuple):
    """How a network is trained.

    Attributes:
        options: Of natgrad.KFAC.
        loss: By name.
        wrapper: What averages the gradients: "ddp", "fsdp" or "hsdp".
        inverses: Of natgrad.Distributed.
        uneven: Whether ranks have different numbers of data.
        micro: Number of micro-batches, accumulated without communication up to the last.
        dtype: Of the parameters.
        sgd: Whether natgrad.Preconditioner comes before SGD, instead of natgrad.KFAC.
        penalty: How much of the parameters' squared length the loop adds to the loss.
        noise: Whether targets have nothing to do with the inputs, so that gradients are averaged over batches.
        clip: The length to which the loop shortens the gradient.
    """

    options: dict[str, Any] = NOTHING
    loss: str = "mse"
    wrapper: str = "ddp"
    inverses: Any = "comm"
    uneven: bool = False
    micro: int = 1
    dtype: torch.dtype = torch.float64
    sgd: bool = False
    penalty: float = 0.0
    noise: bool = False
    clip: float = float("inf")


class Ranks(NamedTuple):
    """Some of the ranks of a test, and which of them this one is.

    Attributes:
        mesh: They, in one dimension.
        rank: This one among them.
        size: Their number.
    """

    mesh: DeviceMesh
    rank: int
    size: int

    @classmethod
    def of(cls, size: int) -> "Ranks":
        """All ranks, in sets of so many."""
        mesh = init_device_mesh("cpu", (dist.get_world_size() // size, size), mesh_dim_names=("sets", "within"))
        own = mesh["within"]
        return cls(own, own.get_local_rank(), size)

    def wrap(self, model: nn.Module, wrapper: str) -> nn.Module:
        """The model, which from now on averages its gradients."""
        if wrapper == "ddp":
            return DistributedDataParallel(model, process_group=self.mesh.get_group())
        mesh = self.mesh if wrapper == "fsdp" else init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        for part in (model[2], model[3]):  # type: ignore[index]
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.PReLU())
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.Tanh(), block, nn.Linear(9, 5, bias=False)).to(dtype)


def batch(step: int, case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(DATA, 1, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(DATA, 5, generator=generator, dtype=torch.float64) + (not case.noise) * x.flatten(1)[:, :5]
    return x.to(case.dtype), y.argmax(1) if case.loss == "cross_entropy" else y.to(case.dtype)


def parts(step: int, case: Case, ranks: Ranks | None, size: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of one rank; those of ``size`` ranks together where there are none."""
    counts = (UNEVEN if case.uneven else EVEN)[size]
    shares = [
        [t.chunk(case.micro) for t in share]
        for share in zip(*(t.split(counts) for t in batch(step, case)), strict=True)
    ]
    if ranks is not None:
        return list(zip(*shares[ranks.rank], strict=True))
    each = [[share[side] for share in shares] for side in (0, 1)]
    return [tuple(torch.cat([t[m] for t in side]) for side in each) for m in range(case.micro)]  # type: ignore[misc]


class Preconditioned(torch.optim.SGD):
    """SGD along natural gradients."""

    def __init__(self, model: Any, *args: Any, **options: Any) -> None:
        self.preconditioner = natgrad.Preconditioner(model, *args, **options)
        super().__init__(self.preconditioner.model.parameters(), lr=0.1, momentum=0.9)

    def step(self) -> None:  # type: ignore[override]
        assert self.preconditioner.step()
        super().step()


class Training:
    """One rank of a training run, or all of it in one process.

    Args:
        case: What is trained.
        ranks: The ranks; None for a single process.
        size: For how many ranks the data are divided.
    """

    def __init__(self, case: Case, ranks: Ranks | None, size: int) -> None:
        self.case, self.ranks, self.size = case, ranks, size
        self.model = network(case.dtype)
        self.trained: Any = self.model if ranks is None else ranks.wrap(self.model, case.wrapper)
        spread: Any = self.trained if case.inverses == "comm" else natgrad.Distributed(self.trained, case.inverses)
        defaults = {"fisher": "exact", "batch_fraction": 1.0}
        kind: Any = Preconditioned if case.sgd else natgrad.KFAC
        self.optimizer = kind(spread, case.loss, **{**defaults, **case.options})

    def backward(self, step: int) -> None:
        """Gradients of the mean over all data."""
        self.optimizer.zero_grad()
        micro = parts(step, self.case, self.ranks, self.size)
        for number, (x, y) in enumerate(micro):
            if isinstance(self.trained, DistributedDataParallel):
                self.trained.require_backward_grad_sync = number == len(micro) - 1
            loss = LOSSES[self.case.loss](self.trained(x), y)
            own = loss * (len(x) * (1 if self.ranks is None else self.size) / DATA)
            rest = self.case.penalty * torch.stack([p.square().sum() for p in self.model.parameters()]).sum()
            (own + rest if self.case.penalty else own).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip)

    def steps(self, first: int, last: int) -> "Training":
        for step in range(first, last):
            self.backward(step)
            self.optimizer.step()
        return self

    def parameters(self) -> Tensor:
        """All in one, in the order of the model."""
        tensors = [p.detach() for p in self.model.parameters()]
        return torch.cat([(t.full_tensor() if isinstance(t, DTensor) else t).flatten() for t in tensors])


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
