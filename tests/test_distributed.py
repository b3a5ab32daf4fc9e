"""Several ranks take the steps that one process takes on all their data."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import natgrad
import ranks

STEPS, DATA = 20, 24
LOSSES = {"mse": functional.mse_loss, "cross_entropy": functional.cross_entropy}
GIVEN: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "damping": 0.1}
PARTS = {1: [24], 2: [12, 12], 4: [6, 6, 6, 6]}
UNEVEN = {1: [24], 2: [17, 7], 4: [3, 11, 1, 9]}


class Case(NamedTuple):
    """How a network is trained.

    Attributes:
        options: Of natgrad.KFAC.
        loss: By name.
        inverses: Of natgrad.Distributed.
        uneven: Whether ranks have different numbers of data.
        micro: Number of micro-batches, accumulated without communication up to the last.
        dtype: Of the parameters.
    """

    options: dict[str, Any] = {}
    loss: str = "mse"
    inverses: Any = "comm"
    uneven: bool = False
    micro: int = 1
    dtype: torch.dtype = torch.float64


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.PReLU(), nn.Linear(9, 5, bias=False))
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.Tanh(), *tail).to(dtype)


def batch(step: int, case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(DATA, 1, 5, 5, generator=generator, dtype=torch.float64).to(case.dtype)
    y = torch.randn(DATA, 5, generator=generator, dtype=torch.float64).to(case.dtype) + x.flatten(1)[:, :5]
    return x, y.argmax(1) if case.loss == "cross_entropy" else y


def train(case: Case) -> dict[str, Tensor]:
    """The parameters after some steps, on this rank's part of the data; on all of it, in a single process."""
    model = network(case.dtype)
    size, rank = 1, 0
    trained: Any = model
    if torch.distributed.is_initialized():
        size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        trained = DistributedDataParallel(model)
    wrapped = trained if case.inverses == "comm" else natgrad.Distributed(trained, case.inverses)
    defaults = {"fisher": "exact", "batch_fraction": 1.0}
    optimizer = natgrad.KFAC(wrapped, case.loss, **{**defaults, **case.options})
    counts = (UNEVEN if case.uneven else PARTS)[size]
    for step in range(STEPS):
        x, y = (t.split(counts)[rank] for t in batch(step, case))
        optimizer.zero_grad()
        for number, (part_x, part_y) in enumerate(zip(x.chunk(case.micro), y.chunk(case.micro), strict=True)):
            trained.require_backward_grad_sync = number == case.micro - 1
            loss = LOSSES[case.loss](trained(part_x), part_y)
            (loss * len(part_x) * size / DATA).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_all(cases: list[Case]) -> list[dict[str, Tensor]]:
    return [train(case) for case in cases]


def auto(**options: Any) -> dict[str, Any]:
    return options


CASES = {
    "automatic": Case(),
    "automatic, uneven": Case(uneven=True),
    "given": Case(GIVEN),
    "given, uneven": Case(GIVEN, uneven=True),
    "empirical": Case({"fisher": "empirical"}),
    "classes, uneven": Case(loss="cross_entropy", uneven=True),
    "empirical classes, given": Case({"fisher": "empirical", **GIVEN}, "cross_entropy"),
    "forward": Case({"fisher": "forward", **GIVEN}),
    "eigen": Case({"inverse": "eigen", "damping": 0.1}),
    "ekfac": Case({"inverse": "ekfac", "inverse_period": 3}),
    "accumulated": Case(micro=3),
    "float32": Case(dtype=torch.float32),
    "memory": Case(inverses="memory"),
    "memory, given, uneven": Case(GIVEN, inverses="memory", uneven=True),
    "memory, eigen": Case({"inverse": "eigen", "inverse_period": 3}, inverses="memory"),
    "half": Case(inverses=0.5, uneven=True),
    "half, eigen": Case({"inverse": "eigen", "inverse_period": 3}, "cross_entropy", inverses=0.5),
}


def relative(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    flat = [torch.cat([t.flatten() for t in each.values()]) for each in (actual, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_take_the_steps_of_one_process(size: int) -> None:
    one = train_all(list(CASES.values()))
    for together in ranks.run(train_all, size, list(CASES.values())):
        off = {name: relative(*pair) for name, pair in zip(CASES, zip(together, one, strict=True), strict=True)}
        print(off)
        bars = {name: 1e-5 if case.dtype == torch.float32 else 1e-10 for name, case in CASES.items()}
        assert {name: value for name, value in off.items() if not value <= bars[name]} == {}
