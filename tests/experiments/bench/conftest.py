"""A workload whose steps take no time but that of a clock that the test turns."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from natgrad.experiments.bench import contestants, trial, workloads
from natgrad.experiments.bench.contestants import Contestant
from natgrad.experiments.bench.spaces import Choice
from natgrad.experiments.bench.workload import Workload

STEP, EVALUATION = 1.0, 50.0


class Clock:
    """In place of `time.perf_counter`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A step of the `line` workload takes STEP seconds, an evaluation EVALUATION."""
    clock = Clock()
    monkeypatch.setattr(trial.time, "perf_counter", clock)
    return clock


@pytest.fixture
def line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workload]:
    """One weight that is to become zero; registered under any name, as ``find`` gives it to the protocol."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        clock.now += STEP
        return functional.mse_loss(output, target)

    def model(seed: int) -> nn.Module:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, 1.0 + seed)
        return layer

    def evaluate(layer: nn.Module) -> dict[str, float]:
        clock.now += EVALUATION
        return {"loss": layer.weight.item() ** 2}

    def make(name: str = "line", seconds: float = 30.0) -> Workload:
        batch = torch.ones(1, 1), torch.zeros(1, 1)
        return Workload(name, name, model, lambda seed: itertools.repeat(batch), loss, "mse", evaluate, seconds)

    for name in ("line", "other"):
        monkeypatch.setitem(workloads.WORKLOADS, name, lambda name=name: make(name))
    return make


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants ``slow``, ``fast`` and ``adamw``: SGD; in this order better with their defaults."""
    for name, lr in (("slow", 0.001), ("fast", 0.1), ("adamw", 0.01)):

        def build(model: nn.Module, workload: Workload, lr: float = lr) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(model.parameters(), lr=lr)]

        own = Contestant(name, name, {"lr": Choice(0.02, 0.03)}, build)
        monkeypatch.setitem(contestants.CONTESTANTS, name, own)
