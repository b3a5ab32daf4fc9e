"""KFAC's update against closed forms and torch's AdamW, and what its constructor refuses."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from kfac_cases import AUTO, NUMERIC, backward, batch, every_mode, network, train, values
from linear_cases import stack
from natgrad import local_model, preconditioner, quadratic
from natgrad.groups import FALLBACK_RATE
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")


# What is refused.


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -0.1},
        {"lr": "fast"},
        {"lr": float("nan")},
        {"lr": True},
        {"momentum": -0.1},
        {"momentum": "heavy"},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"weight_decay": "auto"},
        {"kl_clip": -1.0, "lr": 0.1},
        {"kl_clip": 1.0},
        {"damping": -1.0},
        {"fisher": "true"},
        {"inverse": "lu"},
        {"mc_samples": 0},
        {"factor_decay": 1.0},
        {"curvature_period": 0},
        {"inverse_period": 0},
        {"batch_fraction": 2.0},
        {"sharing": "sum"},
    ],
    ids=repr,
)
def test_keywords_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        natgrad.KFAC(network(), "mse", **options)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}, {"momentum": 0.9}], ids=repr)
def test_an_automatic_rate_without_a_loss_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"need to know the loss: pass `loss=`, or give numbers"):
        natgrad.KFAC(network(), fisher="empirical", **options)


def test_without_a_loss_numbers_and_the_empirical_fisher_do() -> None:
    optimizer = natgrad.KFAC(network(), fisher="empirical", **NUMERIC)
    before = values(optimizer)
    train(optimizer, 0, 1)
    assert not torch.equal(values(optimizer)["0.weight"], before["0.weight"])


@every_mode
def test_step_before_backward(mode: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"`step\(\)` found no gradient"):
        natgrad.KFAC(network(), "mse", **mode).step()


def test_an_automatic_rate_without_a_forward_pass_says_so() -> None:
    optimizer = natgrad.KFAC(network(), "mse")
    train(optimizer, 0)
    with pytest.raises(RuntimeError, match=r"`step\(\)` with an automatic rate found no forward pass"):
        optimizer.step()


def test_a_forward_pass_that_is_not_trained_on_is_named() -> None:
    """As for a metric between `backward` and `step`; under `no_grad`, or if nothing is left of it, it does no harm."""
    optimizer = natgrad.KFAC(network(), "mse")
    model = optimizer.preconditioner.model
    backward(model, 0)
    with torch.no_grad():
        model(batch(1)[0])
    optimizer.step()
    backward(model, 0)
    model(batch(1)[0])
    optimizer.step()
    backward(model, 0)
    _kept = model(batch(1)[0])
    optimizer.step()
    _kept = model(batch(1)[0])
    with pytest.raises(RuntimeError, match=r"latest forward pass .* had no backward pass. Call .*`torch.no_grad\(\)`"):
        optimizer.step()


# The update in closed form.


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_numbers_give_the_closed_form(momentum: float, weight_decay: float) -> None:
    """v ← −lr Δ + μ v, θ ← (1 − lr wd) θ + v with Δ of a preconditioner at the same parameters: three steps."""
    model = stack([3, 4, 2])
    optimizer = natgrad.KFAC(model, "mse", lr=0.1, momentum=momentum, weight_decay=weight_decay)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    preconditioner = natgrad.Preconditioner(twin, "mse")
    velocity = [torch.zeros_like(p) for p in twin.parameters()]
    for seed in range(3):
        train(optimizer, seed)
        backward(twin, seed)
        preconditioner.step()
        with torch.no_grad():
            for p, v in zip(twin.parameters(), velocity, strict=True):
                v.mul_(momentum).sub_(p.grad, alpha=0.1)
                p.mul_(math.exp(-0.1 * weight_decay)).add_(v)
        for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
            assert relative_error(actual.detach(), expected.detach()) < 1e-12
    assert optimizer.diagnostics()["lr"] == 0.1
    assert optimizer.diagnostics()["momentum"] == momentum


@pytest.mark.parametrize("kl_clip", [1e-5, 1e6])
def test_clip_bounds_the_step_in_the_curvature_norm(kl_clip: float) -> None:
    """lr² gᵀΔ = kl_clip where it would be longer, and the same step otherwise."""
    free, clipped = (
        natgrad.KFAC(stack_of_seed_0(), "mse", lr=0.3, momentum=0.0, damping=0.1, **clip)
        for clip in ({}, {"kl_clip": kl_clip})
    )
    start = values(free)
    lengths = []
    for optimizer in (free, clipped):
        train(optimizer, 0)
        named = optimizer.preconditioner.model.named_parameters()
        # lr² gᵀΔ for the free step
        lengths.append(0.3 * float(sum(((start[n] - p.detach()) * p.grad).sum() for n, p in named)))
    scale = min(1.0, (kl_clip / lengths[0]) ** 0.5)
    assert lengths[1] == pytest.approx(scale * lengths[0])
    assert (scale == 1.0) == (kl_clip == 1e6)


def stack_of_seed_0() -> nn.Sequential:
    torch.manual_seed(0)
    return stack([3, 4, 2])


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@every_mode
def test_the_rest_moves_as_by_adamw(mode: dict[str, Any], weight_decay: float) -> None:
    """Bitwise, with the default rate at first and the group's own afterwards."""
    model = network()
    optimizer = natgrad.KFAC(model, "mse", weight_decay=weight_decay, **mode)
    twin = [nn.Parameter(p.detach().clone()) for p in model[1].parameters()]
    adamw = torch.optim.AdamW(twin, lr=FALLBACK_RATE, weight_decay=weight_decay)
    for step in range(3):
        if step == 2:
            for group in (optimizer.param_groups[1], adamw.param_groups[0]):
                group["lr"] = 0.05
        backward(model, 0)  # other data might refute the step
        for p, q in zip(twin, model[1].parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        adamw.step()
        for p, q in zip(twin, model[1].parameters(), strict=True):
            assert torch.equal(q, p)


# The automatic rate and momentum.


def regression(bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A layer, its data, and its output at the least squares solution."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2, bias=bias), torch.randn(20, 3), torch.randn(20, 2)
    rows = torch.cat([x, torch.ones(20, 1)], 1) if bias else x
    return model, x, y, rows @ torch.linalg.lstsq(rows, y).solution


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.MSELoss(reduction="sum")], ids=["mean", "sum"])
def test_linear_regression_is_solved_by_one_newton_step(loss: nn.Module, inverse: str) -> None:
    model, x, y, solution = regression()
    optimizer = natgrad.KFAC(model, loss, fisher="exact", damping=1e-12, inverse=inverse)
    before = loss(model(x), y)
    before.backward()
    optimizer.step()
    assert relative_error(model(x).detach(), solution) < 1e-5
    assert optimizer.diagnostics()["lr"] == pytest.approx(1.0, abs=1e-5)
    change = (loss(model(x), y) - before).item()
    assert optimizer.diagnostics()["predicted_change"] == pytest.approx(change, rel=1e-8)
    assert optimizer.diagnostics()["actual_change"] == pytest.approx(change, rel=1e-8)
    assert optimizer.diagnostics()["halvings"] == 0.0


def test_a_direction_of_the_wrong_length_is_scaled() -> None:
    """G = I makes the natural gradient 20 times too short for this loss; A is the same."""
    model, x, y, solution = regression()
    optimizer = natgrad.KFAC(model, "mse", fisher="forward", damping=(1e-12, 0.0))
    mse_loss(model(x), y).backward()
    optimizer.step()
    assert relative_error(model(x).detach(), solution) < 1e-5
    assert optimizer.diagnostics()["lr"] == pytest.approx(1.0, abs=1e-5)


def test_automatic_momentum_makes_conjugate_gradients() -> None:
    """A, of size 3, under heavy damping: three steps over gradient and previous step reach the minimum, two do not."""
    model, x, y, solution = regression(bias=False)
    optimizer = natgrad.KFAC(model, "mse", fisher="exact", damping=(3.0, 3.0))
    errors = []
    for _ in range(3):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        errors.append(relative_error(model(x).detach(), solution))
    assert errors[1] > 1e-3
    assert errors[2] < 1e-8


@pytest.mark.parametrize("mode", [{"lr": 0.1, "momentum": "auto"}, {"lr": "auto", "momentum": 0.5}], ids=str)
def test_a_given_number_stays_and_the_other_is_chosen(mode: dict[str, Any]) -> None:
    """The gradient of the exact model along what is free vanishes: here the loss itself is quadratic."""
    model, x, y, _ = regression()
    optimizer = natgrad.KFAC(model, "mse", damping=(0.1, 0.1), **mode)
    for _ in range(3):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        previous = {p: optimizer.state[p].get("velocity") for p in model.parameters()}
        previous = {p: None if v is None else v.clone() for p, v in previous.items()}
        optimizer.step()
    told = optimizer.diagnostics()
    assert told["lr" if mode["momentum"] == "auto" else "momentum"] in mode.values()
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    free = previous
    if mode["lr"] == "auto":  # the natural gradient is what the step has besides the previous one
        free = {p: optimizer.state[p]["velocity"] - 0.5 * previous[p] for p in previous}
    slope = sum(float((free[p] * p.grad).sum()) for p in free)
    size = sum(float(free[p].norm() * p.grad.norm()) for p in free)
    assert abs(slope) < 1e-8 * size


class Steep(nn.Module):
    """Flat where it starts and steep where its targets are: the quadratic model holds for short steps only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sinh(0.5 * self.layer(x))


@pytest.mark.parametrize("make", [Steep, stack_of_seed_0], ids=["steep", "smooth"])
@pytest.mark.parametrize("told", ["mse", "cross_entropy"])
@pytest.mark.parametrize("mode", [AUTO, {"lr": "auto", "momentum": 0.5}, {"lr": 0.1, "momentum": "auto"}], ids=str)
def test_an_automatic_step_lowers_the_loss_by_what_it_says(
    make: Callable[[], nn.Module], told: str, mode: dict[str, Any]
) -> None:
    """On the whole batch and with all parameters in layers, what is measured is what the user sees."""
    x, y = batch(0)
    loss_fn, y = (mse_loss, 5 * y) if told == "mse" else (cross_entropy, (y[:, 0] > 0).long())
    optimizer = natgrad.KFAC(make(), told, **mode)
    model, halvings = optimizer.preconditioner.model, []
    for step in range(8):
        optimizer.zero_grad()
        before = loss_fn(model(x), y)
        before.backward()
        optimizer.step()
        with torch.no_grad():
            change = (loss_fn(model(x), y) - before).item()
        diagnostics = optimizer.diagnostics()
        if mode["lr"] == "auto" or step:  # a given rate without a previous step is nothing to choose
            assert change <= 0.0
            halvings.append(diagnostics["halvings"])
        if diagnostics.get("lr") and "actual_change" in diagnostics:
            assert change == pytest.approx(diagnostics["actual_change"], rel=1e-6, abs=1e-12)
            assert change <= 0.1 * diagnostics["predicted_change"] or mode["lr"] != "auto"
    assert any(halvings) or (make, told, mode["lr"]) != (Steep, "mse", "auto")


def test_where_no_step_lowers_the_loss_the_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that momentum would move; the next step begins anew."""
    optimizer = natgrad.KFAC(stack_of_seed_0(), "mse")
    train(optimizer, 0)
    before = values(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(local_model.LocalModel, "change", lambda self, step: local_model.Change(1.0, 0.0))
        train(optimizer, 1)
    after, diagnostics = values(optimizer), optimizer.diagnostics()
    assert [diagnostics[key] for key in ("lr", "momentum", "halvings")] == [0.0, 0.0, float(quadratic.HALVINGS)]
    assert all(torch.equal(after[n], before[n]) for n in ("0.weight", "0.bias", "2.weight", "2.bias"))
    train(optimizer, 2)
    assert not torch.equal(values(optimizer)["0.weight"], before["0.weight"])
    assert optimizer.diagnostics()["momentum"] == 0.0


def test_numbers_need_no_evaluation_and_tell_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preconditioner, "LocalModel", pytest.fail)
    optimizer = natgrad.KFAC(network(), "mse", **NUMERIC)
    train(optimizer, 0, 1)
    assert not {"predicted_change", "actual_change", "halvings"} & optimizer.diagnostics().keys()


@pytest.mark.parametrize("mode", [{}, {"lr": 0.05, "momentum": 0.9}])
def test_what_has_no_gradient_stays(mode: dict[str, Any]) -> None:
    """As weights do that a hook masks; catches them filled from the others by the inverse factors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    mask = torch.rand(8, 6) < 0.5
    model[0].weight.register_hook(lambda g: g * mask)
    before = model[0].weight.detach().clone()
    x = torch.randn(200, 6)
    y = x[:, :3].argmax(1)
    optimizer = natgrad.KFAC(model, "cross_entropy", **mode)
    for _ in range(20):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert torch.equal(model[0].weight[~mask], before[~mask])
    assert not torch.equal(model[0].weight[mask], before[mask])
    assert loss < 0.5
