"""Data and networks without information in some or all directions: finite parameters, and a warning at most."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad

pytestmark = [
    pytest.mark.filterwarnings("ignore:natgrad. a factor:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:natgrad. 5 steps in a row:RuntimeWarning"),
]
STEPS = 12
Make = Callable[[], tuple[nn.Module, Tensor, Tensor]]


def mlp(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def labels(n: int) -> Tensor:
    return torch.arange(n) % 3


def dead() -> nn.Sequential:
    """All units of the first layer are dead; nothing but the biases behind them can learn."""
    model = mlp()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    return model


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


CASES: dict[str, Make] = {
    "a batch of one": lambda: (mlp(), torch.randn(1, 6), labels(1)),
    "fewer data than dimensions": lambda: (mlp(64), torch.randn(4, 6), labels(4)),
    "the same datum many times": lambda: (mlp(), torch.randn(1, 6).repeat(32, 1), labels(1).repeat(32)),
    "one datum with contradicting labels": lambda: (mlp(), torch.randn(1, 6).repeat(33, 1), labels(33)),
    "constant inputs": lambda: (mlp(), torch.full((32, 6), 0.5), labels(32)),
    "inputs of zeros": lambda: (mlp(), torch.zeros(32, 6), labels(32)),
    "two inputs that are one": lambda: (mlp(), torch.randn(32, 1).expand(32, 6), labels(32)),
    "dead units": lambda: (dead(), torch.randn(32, 6), labels(32)),
    "a saturated softmax": lambda: (nn.Sequential(nn.Linear(6, 3)), 1e4 * torch.randn(32, 6), labels(32)),
    "labels all alike": lambda: (mlp(), torch.randn(32, 6), torch.zeros(32, dtype=torch.long)),
    "huge inputs": lambda: (mlp(), 1e6 * torch.randn(32, 6), labels(32)),
    "tiny inputs": lambda: (mlp(), 1e-6 * torch.randn(32, 6), labels(32)),
    "a constant channel": lambda: (convolutional(), torch.zeros(8, 2, 4, 4), labels(8)),
}


def train(make: Make, **options: Any) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model, x, y = make()
    optimizer, losses = natgrad.KFAC(model, "cross_entropy", **options), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "ekfac"])
def test_defaults_stay_finite_and_do_not_climb(name: str, inverse: str) -> None:
    """Catches 0/0 in evidence or scales, a ridge that vanishes with A, and steps where there is no curvature."""
    model, losses = train(CASES[name], inverse=inverse)
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] <= losses[0] * (1 + 1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "ekfac"])
def test_without_damping_parameters_stay_finite(name: str, inverse: str) -> None:
    """Singular factors are factored with more on their diagonal, or their null directions left out, and said so."""
    model, losses = train(CASES[name], inverse=inverse, damping=0.0)
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] <= losses[0] * (1 + 1e-5)


@pytest.mark.parametrize("empty", [0, 5])
def test_a_batch_of_which_no_target_counts_is_no_step_and_no_end(empty: int) -> None:
    """The mean over no targets is NaN, with gradients of zero."""
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(32, 6), labels(32)
    loss = nn.CrossEntropyLoss(ignore_index=-100)
    optimizer, losses = natgrad.KFAC(model, loss), []
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(model(x), torch.full_like(y, -100) if step == empty else y)
        value.backward()
        optimizer.step()
        losses += [value.item()] if step != empty else []
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0] / 2


class Experts(nn.Module):
    """Each datum goes through one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 8)
        for sign, expert in zip((-1, 1), self.experts, strict=True):
            h = h.index_put(((x[:, 0] * sign > 0).nonzero(as_tuple=True)), expert(x[x[:, 0] * sign > 0]))
        out: Tensor = self.head(h.tanh())
        return out


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_may_get_no_rows(first: bool) -> None:
    """At the first step, or at others."""
    torch.manual_seed(0)
    model, losses = Experts(), []
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for step in range(STEPS):
        x = torch.randn(32, 6)
        if (step % 3 == 0) == first:
            x[:, 0].abs_()
        optimizer.zero_grad()
        loss = cross_entropy(model(x), (x[:, 1] > 0).long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0] / 2


class Spectral(nn.Module):
    """A filter of complex weights, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(4, dtype=torch.cfloat)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6))
        return out


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_complex_parameters_are_trained_by_adamw(factor: float) -> None:
    """Also where a multiplied loss is compared with the gradients of all parameters."""
    torch.manual_seed(0)
    model, x, losses = Spectral(), torch.randn(64, 6), []
    before = model.filter.detach().clone()
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = factor * cross_entropy(model(x), (x[:, 1] > 0).long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(model.filter, before)


def overflowing(seed: int, scale: float) -> tuple[nn.Module, Tensor, Tensor]:
    """Inputs that are not normalized, before a softmax: where it is saturated the natural gradient has no end."""
    x = torch.randn(2048, 12, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    return model, scale * x, x[:, :4].argmax(1)


@pytest.mark.filterwarnings("ignore:natgrad:RuntimeWarning")
@pytest.mark.parametrize("seed", range(4))
def test_a_natural_gradient_without_end_leaves_parameters_finite(seed: int) -> None:
    """It was infinite, its rate 0, and their product no number."""
    model, x, y = overflowing(seed, 1e5)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for step in range(60):
        some = torch.arange(128 * step, 128 * (step + 1)) % len(x)
        optimizer.zero_grad()
        cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters()), step


@pytest.mark.filterwarnings("ignore:natgrad:RuntimeWarning")
def test_a_natural_gradient_without_end_is_a_step_that_is_skipped() -> None:
    skipped = 0
    for seed in range(20):
        model, x, y = overflowing(seed, 1e5)
        preconditioner = natgrad.Preconditioner(model, "cross_entropy")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        for step in range(10):
            some = torch.arange(128 * step, 128 * (step + 1)) % len(x)
            optimizer.zero_grad()
            cross_entropy(model(x[some]), y[some]).backward()
            is_taken = preconditioner.step()
            assert all((p.grad is not None and bool(p.grad.isfinite().all())) is is_taken for p in model.parameters())
            skipped += not is_taken
            optimizer.step()
    assert skipped


@pytest.mark.filterwarnings("ignore:natgrad:RuntimeWarning")
@pytest.mark.parametrize("momentum", [0.9, "auto"])
def test_a_given_rate_takes_no_step_without_end_nor_does_what_has_no_layer(momentum: Any) -> None:
    skipped = 0
    for seed in range(6):
        model, x, y = overflowing(seed, 1e5)
        model = nn.Sequential(*model, nn.PReLU(4))
        optimizer = natgrad.KFAC(model, "cross_entropy", lr=1e-6, momentum=momentum, damping=(1.0, 0.0))
        for step in range(10):
            some = torch.arange(128 * step, 128 * (step + 1)) % len(x)
            optimizer.zero_grad()
            cross_entropy(model(x[some]), y[some]).backward()
            before, known = [p.detach().clone() for p in model.parameters()], optimizer.preconditioner.skipped_steps
            optimizer.step()
            assert all(p.isfinite().all() for p in model.parameters())
            if optimizer.preconditioner.skipped_steps > known:
                skipped += 1
                assert all(map(torch.equal, model.parameters(), before))
    assert skipped
