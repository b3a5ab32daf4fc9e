"""Terms that the loop adds to the declared loss are found and followed; and where there are none, none are found."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from natgrad import undeclared
from natgrad.quadratic import Rest
from natgrad.undeclared import Undeclared

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:natgrad. the loop's loss has terms:RuntimeWarning"),
]

RIDGE = 0.3


def ridge(model: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    return mse_loss(model(x), y) + RIDGE * sum(p.square().sum() for p in model.parameters())


def regression() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    return nn.Linear(4, 3), x, x @ torch.randn(4, 3) + 0.1 * torch.randn(200, 3)


def solution(x: Tensor, y: Tensor) -> Tensor:
    """Of the ridge regression, (out, in + 1): the mean is over 3 · 200 squares."""
    wide = torch.cat([x, torch.ones(len(x), 1)], 1)
    return torch.linalg.solve(wide.T @ wide / y.numel() + RIDGE * torch.eye(5), wide.T @ y / y.numel()).T


def train(optimizer: natgrad.KFAC, model: nn.Linear, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        ridge(model, x, y).backward()
        optimizer.step()


class Opaque(torch.autograd.Function):
    """A function that torch cannot differentiate forwards."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]  # of this function alone
        return g


@pytest.mark.parametrize("opaque", [False, True])
def test_a_penalty_in_the_loop_is_found_and_its_optimum_reached(opaque: bool) -> None:
    """The declared loss alone is least elsewhere, and would have to rise: catches a training that stands still."""
    model, x, y = regression()
    if opaque:
        model.register_forward_hook(lambda module, args, z: Opaque.apply(z))
    optimizer = natgrad.KFAC(model, "mse")
    train(optimizer, model, x, y, 60)
    found = torch.cat([model.weight, model.bias[:, None]], 1)
    assert Undeclared(optimizer.state[model.weight]).is_found
    torch.testing.assert_close(found.detach(), solution(x, y), rtol=1e-4, atol=1e-5)


def test_what_is_known_of_a_penalty_is_resumed_bitwise() -> None:
    model, x, y = regression()
    optimizer = natgrad.KFAC(model, "mse")
    for steps in range(4, 12):  # before it is found, and after
        train(optimizer, model, x, y, 1)
        other = copy.deepcopy(model)
        for hooks in (other._forward_hooks, other._forward_pre_hooks):
            hooks.clear()
        again = natgrad.KFAC(other, "mse")
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        one, two = copy.deepcopy((optimizer, model)), (again, other)
        for o, m in (one, two):
            train(o, m, x, y, 3)
        assert all(map(torch.equal, one[1].parameters(), two[1].parameters())), steps


def test_the_curvature_of_a_squared_penalty_is_measured() -> None:
    """Twice its factor, per squared length."""
    model, x, y = regression()
    optimizer = natgrad.KFAC(model, "mse")
    train(optimizer, model, x, y, 20)
    _, bend, _ = Undeclared(optimizer.state[model.weight])._found
    assert bend == pytest.approx(2 * RIDGE, rel=1e-2)


class Declared:
    """A model of the declared loss with given slopes."""

    def __init__(self, slope: float, size: float) -> None:
        self.told = torch.tensor([[slope], [size]])

    def curvature(self, directions: Any) -> Tensor:
        return torch.eye(1)

    def slopes(self, directions: Any) -> Tensor:
        return self.told


@pytest.mark.parametrize(
    ("slope", "size", "is_found"),
    [(-1.0, 1.0, False), (-0.95, 1.0, False), (-0.5, 1.0, True), (0.5, 1.0, True), (-0.5, 1e3, False)],
    ids=["the same", "nearly the same", "another", "uphill", "rounding"],
)
def test_a_rest_is_looked_for_after_several_refusals(slope: float, size: float, is_found: bool) -> None:
    one = Undeclared({})
    arguments: Any = (lambda: Declared(slope, size), [{}], torch.tensor([-1.0]))
    for _ in range(undeclared.PATIENCE - 1):
        one.refused(*arguments)
        assert not one.is_found
    one.took(torch.ones(1))  # not in a row
    for _ in range(undeclared.PATIENCE - 1):
        one.refused(*arguments)
    assert not one.is_found
    one.refused(*arguments)
    assert one.is_found == is_found


def test_a_step_is_no_longer_than_a_tenth_of_the_parameters() -> None:
    rest = Rest(torch.zeros(2), torch.tensor([[4.0, 0.0], [0.0, 9.0]]), 0.0, 0.5)
    assert rest.within(torch.tensor([0.1, 0.1])).tolist() == [0.1, 0.1]
    c = rest.within(torch.tensor([3.0, 1.0]))
    assert float(c @ rest.squares @ c) == pytest.approx(0.25)


@pytest.mark.parametrize(("power", "factor"), [(2, 1e-3), (1, 3e-4)], ids=["squares", "absolute values"])
def test_a_network_with_a_penalty_trains(power: int, factor: float) -> None:
    """Absolute values have kinks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    x = torch.randn(300, 6)
    y = (x[:, :3] + x[:, 3:]).argmax(1)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) + factor * sum(p.abs().pow(power).sum() for p in model.parameters())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]
