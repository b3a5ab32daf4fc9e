"""KFAC as an optimizer: its update against closed forms, torch's AdamW and torch's contracts."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import natgrad
from linear_cases import stack
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
NUMERIC: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
AUTO: dict[str, Any] = {"lr": "auto", "momentum": "auto"}
every_mode = pytest.mark.parametrize(
    "mode", [NUMERIC, AUTO, {"lr": 0.1, "momentum": "auto"}, {"lr": "auto", "momentum": 0.5}], ids=str
)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """With parameters that have no layer kind, for the fallback."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator).to(dtype), torch.randn(6, 2, generator=generator).to(dtype)


def backward(model: nn.Module, seed: int) -> Tensor:
    x, y = batch(seed, next(model.parameters()).dtype)
    model.zero_grad()
    loss = mse_loss(model(x), y)
    loss.backward()
    return loss.detach()


def train(optimizer: natgrad.KFAC, *seeds: int) -> None:
    for seed in seeds:
        backward(optimizer.preconditioner.model, seed)
        optimizer.step()


def values(optimizer: natgrad.KFAC) -> dict[str, Tensor]:
    """Parameters and state, copied."""
    named = dict(optimizer.preconditioner.model.named_parameters())
    state = {f"{n}.{k}": t for n, p in named.items() for k, t in optimizer.state[p].items()}
    return {n: t.detach().clone() for n, t in {**named, **state}.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    differing = [n for n, t in expected.items() if not torch.equal(actual[n], t) or actual[n].dtype != t.dtype]
    assert differing == []


# What is refused.


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -0.1},
        {"lr": "fast"},
        {"lr": float("nan")},
        {"momentum": -0.1},
        {"momentum": "heavy"},
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
                p.mul_(1 - 0.1 * weight_decay).add_(v)
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
    """Bitwise, with torch's default rate at first and the group's own afterwards."""
    model = network()
    optimizer = natgrad.KFAC(model, "mse", weight_decay=weight_decay, **mode)
    twin = [nn.Parameter(p.detach().clone()) for p in model[1].parameters()]
    adamw = torch.optim.AdamW(twin, weight_decay=weight_decay)
    for seed in range(3):
        if seed == 2:
            for group in (optimizer.param_groups[1], adamw.param_groups[0]):
                group["lr"] = 0.05
        backward(model, seed)
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


# torch's contracts.


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
    assert optimizer.param_groups[1]["lr"] == 1e-3 / 8


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
    model[1].bias.grad[0] = torch.nan  # of a parameter without a layer


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


@every_mode
def test_an_unused_layer_is_left_alone(mode: dict[str, Any]) -> None:
    """Its momentum, too, waits for it."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.skip = nn.Linear(3, 2), nn.Linear(2, 2), False

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) if self.skip else self.second(self.first(x))

    torch.manual_seed(0)
    model = Skipping()
    optimizer = natgrad.KFAC(model, "mse", **mode)
    train(optimizer, 0, 1)
    before, model.skip = values(optimizer), True
    train(optimizer, 2)
    after = values(optimizer)
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert {"first.weight", "first.bias", "first.weight.A", "first.weight.velocity"} <= changed
    assert {n for n in changed if n.startswith("second")} <= {"second.weight.step"}
    model.skip = False
    train(optimizer, 3)
    assert not torch.equal(values(optimizer)["second.weight"], before["second.weight"])


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
            nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
            r"layer '0' has factors G, A of sizes \(5, 4\), the state \(4, 4\)",
        ),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "doesn't match the size of optimizer's group"),
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
    """Checkpoint tools step with zero gradients and no forward pass; a period that began then would find no factors."""
    plain, primed = (natgrad.KFAC(network(), "mse", curvature_period=3, weight_decay=0.1, **mode) for _ in range(2))
    for optimizer in (plain, primed):
        train(optimizer, *range(steps))
    before = values(primed)
    for parameter in primed.preconditioner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    primed.step()
    assert_same(values(primed), before)
    train(plain, 7, 8)
    train(primed, 7, 8)
    assert_same(values(primed), values(plain))
    assert primed.diagnostics()["skipped_steps"] == 0
