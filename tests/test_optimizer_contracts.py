"""KFAC keeps the contracts of a torch optimizer: closures, schedulers, unused parameters, bad batches, checkpoints."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import natgrad
from kfac_cases import NUMERIC, assert_same, backward, batch, every_mode, network, train, values
from natgrad.groups import FALLBACK_RATE
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")


@every_mode
def test_a_closure_is_called_once_and_its_value_returned(mode: dict[str, Any]) -> None:
    plain, closed, calls = natgrad.KFAC(network(), "mse", **mode), natgrad.KFAC(network(), "mse", **mode), []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(1)
        return backward(closed.preconditioner.model, 0)

    train(plain, 0)
    with torch.no_grad():
        assert closed.step(closure) == mse_loss(network()(batch(0)[0]), batch(0)[1])
    assert len(calls) == 1
    assert_same(values(closed), values(plain))


def test_a_scheduler_changes_a_numeric_rate() -> None:
    optimizer = natgrad.KFAC(network(), "mse", lr=0.4, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    rates = []
    for seed in range(3):
        train(optimizer, seed)
        scheduler.step()
        rates.append(optimizer.diagnostics()["lr"])
    assert rates == [0.4, 0.2, 0.1]
    assert optimizer.param_groups[1]["lr"] == FALLBACK_RATE / 8


@pytest.mark.parametrize("momentum", ["auto", 0.5])
def test_a_scheduler_multiplies_an_automatic_step(momentum: float | str) -> None:
    """The second step of two runs that differ only there: the whole step is a quarter."""
    steps = []
    for factor in (1.0, 0.25):
        optimizer = natgrad.KFAC(network(), "mse", momentum=momentum)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n, f=factor: f if n else 1.0)
        train(optimizer, 0)
        scheduler.step()
        before = values(optimizer)
        train(optimizer, 1)
        steps.append((values(optimizer)["0.weight"] - before["0.weight"], optimizer.diagnostics()))
    (whole, told), (quarter, told_quarter) = steps
    assert relative_error(quarter, 0.25 * whole) < 1e-12
    assert told_quarter["lr"] == pytest.approx(0.25 * told["lr"])
    assert told["momentum"] != 0
    assert told_quarter["momentum"] == pytest.approx(0.25 * told["momentum"])


def spoil_gradient(model: nn.Module) -> None:
    backward(model, 99)
    model[1].weight.grad[0] = torch.nan  # of a parameter without a layer


def spoil_input(model: nn.Module) -> None:
    x, y = batch(99)
    x[0, 0] = torch.inf
    model.zero_grad()
    mse_loss(model(x), y).backward()


@pytest.mark.parametrize("spoil", [spoil_gradient, spoil_input])
@every_mode
def test_a_batch_that_is_not_finite_might_never_have_been(
    mode: dict[str, Any], spoil: Callable[[nn.Module], None]
) -> None:
    plain, spoilt = (natgrad.KFAC(network(), "mse", factor_decay=0.9, **mode) for _ in range(2))
    for seed in range(3):
        spoil(spoilt.preconditioner.model)
        before = values(spoilt)
        spoilt.step()
        assert_same(values(spoilt), before)
        train(plain, seed)
        train(spoilt, seed)
        assert_same(values(spoilt), values(plain))
    assert spoilt.diagnostics()["skipped_steps"] == 3


class Skipping(nn.Module):
    """Two layers, or the first alone."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.skip = nn.Linear(3, 2), nn.Linear(2, 2), skip

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if self.skip else self.second(self.first(x))


@every_mode
def test_an_unused_layer_is_left_alone(mode: dict[str, Any]) -> None:
    """Its momentum, too, waits for it; where the model of the loss looks back, its latest step is none."""
    model = Skipping(skip=False)
    optimizer = natgrad.KFAC(model, "mse", **mode)
    train(optimizer, 0, 1)
    before, model.skip = values(optimizer), True
    train(optimizer, 1)  # the same data, which refute no step
    after = values(optimizer)
    changed = {n for n in after if n not in before or not torch.equal(after[n], before[n])}
    assert {"first.weight", "first.bias", "first.weight.G", "first.weight.velocity"} <= changed
    looks_back = "auto" in (mode.get("lr", "auto"), mode.get("momentum", "auto"))
    rested = {"second.weight.velocity", "second.bias.velocity"} if looks_back else set()
    assert {n for n in changed if n.startswith("second")} <= {"second.weight.step", *rested}
    assert not any(after[n].any() for n in rested)
    model.skip = False
    train(optimizer, 1)
    assert not torch.equal(values(optimizer)["second.weight"], before["second.weight"])


@every_mode
def test_a_layer_may_come_late(mode: dict[str, Any]) -> None:
    """It has no previous step then, and takes no momentum from the others."""
    model = Skipping(skip=True)
    optimizer = natgrad.KFAC(model, "mse", **mode)
    with pytest.warns(UserWarning, match="layer 'second' received no data and no gradient"):
        train(optimizer, 0)
    before, model.skip = values(optimizer), False
    train(optimizer, 1)
    after = values(optimizer)
    assert all(not torch.equal(after[n], before[n]) for n in ("first.weight", "second.weight", "second.bias"))
    assert optimizer.diagnostics()["momentum"] != 0.0


# State.


def reloaded(optimizer: natgrad.KFAC) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_mode
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_interrupted_run_is_bitwise_an_uninterrupted_one(
    mode: dict[str, Any], steps: int, dtype: torch.dtype
) -> None:
    """Catches factors cast to the dtype of their parameter, which torch does, and draws that start anew."""
    options = {"factor_decay": 0.9, "curvature_period": 2, "inverse_period": 3, "weight_decay": 0.1, **mode}
    whole, resumed = (natgrad.KFAC(network(dtype), "mse", **options) for _ in range(2))
    train(whole, *range(steps))
    resumed.preconditioner.model.load_state_dict(whole.preconditioner.model.state_dict())
    train(resumed, *[50] * (steps == 7))  # whatever there was is replaced
    resumed.preconditioner.model.load_state_dict(whole.preconditioner.model.state_dict())
    resumed.load_state_dict(reloaded(whole))
    for seed in range(steps, steps + 4):
        assert_same(values(resumed), values(whole))
        train(whole, seed)
        train(resumed, seed)
    assert_same(values(resumed), values(whole))
    assert all(t.isfinite().all() for t in values(whole).values())


def test_a_loaded_state_is_a_copy() -> None:
    first, second = (natgrad.KFAC(network(), "mse", factor_decay=0.9) for _ in range(2))
    train(first, 0)
    expected = values(first)
    second.load_state_dict(first.state_dict())
    train(second, 1)
    assert_same(values(first), expected)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            nn.Sequential(nn.Linear(3, 5), nn.PReLU(5), nn.Linear(5, 2)),
            r"layer '0' has factors G, A of sizes \(5, 4\), the state \(4, 4\)",
        ),
        (nn.Sequential(nn.Linear(3, 4), nn.PReLU(4)), "doesn't match the size of optimizer's group"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "different number of parameter groups"),
    ],
)
def test_the_state_of_another_model_is_refused_whole(other: nn.Module, text: str) -> None:
    optimizer = natgrad.KFAC(network(), "mse", **NUMERIC)
    train(optimizer, 0)
    loading = natgrad.KFAC(copy.deepcopy(other), "mse", lr=0.7, momentum=0.9)
    before = values(loading)
    with pytest.raises(ValueError, match=text):
        loading.load_state_dict(optimizer.state_dict())
    assert_same(values(loading), before)
    assert loading.param_groups[0]["lr"] == 0.7
    assert loading.preconditioner.steps == 0


@every_mode
@pytest.mark.parametrize("steps", [0, 2])
def test_a_priming_step_changes_nothing(mode: dict[str, Any], steps: int) -> None:
    """Checkpoint tools step with zero gradients and no forward pass; a period that began then would find no factors.

    A fresh optimizer creates its state, of which nothing is known.
    """
    plain, primed = (natgrad.KFAC(network(), "mse", curvature_period=3, weight_decay=0.1, **mode) for _ in range(2))
    for optimizer in (plain, primed):
        train(optimizer, *range(steps))
    before = values(primed)
    for parameter in primed.preconditioner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    primed.step()
    after = values(primed)
    assert_same({name: after[name] for name in before}, before)
    assert primed.preconditioner.steps == steps
    assert primed.preconditioner.factors().keys() == plain.preconditioner.factors().keys()
    train(plain, 7, 8)
    train(primed, 7, 8)
    assert_same(values(primed), values(plain))
    assert primed.diagnostics()["skipped_steps"] == 0


@pytest.mark.parametrize("make", [natgrad.KFAC, natgrad.Preconditioner, natgrad.describe])
def test_something_else_than_a_model_is_named_first(make: Any) -> None:
    """Arguments that changed places, or an optimizer."""
    given = ("mse", network()) if make is not natgrad.describe else (torch.optim.SGD(network().parameters()),)
    with pytest.raises(TypeError, match=r"`model` must be the model itself, a torch.nn.Module, not a (str|SGD)"):
        make(*given)


def test_numbers_of_numpy_are_numbers() -> None:
    rates = {"lr": np.float32(0.1), "momentum": np.float64(0.9), "damping": np.float32(0.1)}
    optimizer = natgrad.KFAC(network(), "mse", **rates)
    train(optimizer, 0, 1)
    assert optimizer.diagnostics()["lr"] == pytest.approx(0.1)
