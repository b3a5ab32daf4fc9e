"""The model of the loss near the parameters against a dense Gauss-Newton matrix of the whole network."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from cases import MSE, Loss, data_for, every_loss
from natgrad import derivatives, local_model
from natgrad.forward import Forward
from natgrad.likelihoods import Gaussian
from natgrad.local_model import LocalModel
from natgrad.losses import resolve
from oracle import relative_error
from quadratic_cases import Direction, directions_of, network

pytestmark = pytest.mark.usefixtures("float64")


def dense(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, directions: list[Direction]) -> Tensor:
    """VᵀJᵀHJV with J by one backward pass for each output entry."""
    output, names = model(x), list(directions[0])
    parameters = [model.get_parameter(name) for name in names]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(entry, parameters, retain_graph=True)])
        for entry in output.flatten()
    ]
    J, f = torch.stack(rows), output.detach()
    H = jacrev(jacrev(lambda f: loss.loss_fn(f, y)))(f).reshape(f.numel(), f.numel())
    V = torch.stack([torch.cat([direction[n].flatten() for n in names]) for direction in directions], 1)
    return V.T @ J.T @ H @ J @ V


def model_of(
    model: nn.Module, told: Any, args: tuple[Any, ...], terms: float | None = None, **options: Any
) -> LocalModel:
    """Around the model's own output, as if its forward pass had been captured."""
    likelihood = resolve(told).likelihood
    select = options.pop("select", lambda out: out)
    with torch.no_grad():
        output = select(model(*args, **options.pop("call", {})))
        forward = Forward(args, options.pop("kwargs", {}), output, [], gradient=torch.ones_like(output))
    return LocalModel(model, likelihood, select, forward, terms or forward.terms(likelihood))


class Rounded(torch.autograd.Function):
    """Steps of a half, which its backward pass does not know of."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return (2 * z).round() / 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]  # of this function alone
        return g


@pytest.mark.parametrize("kind", ["linear", "fused", "jumps"])
def test_slopes_are_those_of_the_backward_pass(kind: str) -> None:
    """Catches a loss that is declared and taken for another where differences stand for derivatives."""
    torch.manual_seed(0)
    x, name = torch.randn(4, 5, 3), "bias_hh_l0" if kind == "fused" else "weight"
    model: nn.Module = nn.LSTM(3, 2) if kind == "fused" else nn.Linear(3, 2)
    if kind == "jumps":
        model.register_forward_hook(lambda module, args, z: Rounded.apply(z))

    def select(out: Any) -> Tensor:
        selected: Tensor = out[0] if kind == "fused" else out
        return selected

    directions = [{name: torch.randn_like(model.get_parameter(name))} for _ in range(2)]
    local = model_of(model, "mse", (x,), select=select)
    local.curvature(directions)
    slopes = local.slopes(directions)
    (gradient,) = torch.autograd.grad(select(model(x)).sum(), [model.get_parameter(name)])
    assert slopes is not None
    torch.testing.assert_close(slopes[0], torch.stack([torch.sum(gradient * d[name]) for d in directions]))
    assert (slopes[1] >= slopes[0].abs()).all()


@torch.no_grad()
def of_natgrad(
    model: nn.Module, told: Any, x: Tensor, directions: list[Direction], terms: float | None = None
) -> Tensor:
    return model_of(model, told, (x,), terms).curvature(directions)


@every_loss
@pytest.mark.parametrize("k", [1, 2, 3])
def test_matrix_is_the_gauss_newton_matrix_along_the_directions(loss: Loss, k: int) -> None:
    """Of the whole network: no layer's block, no Kronecker product. Catches a wrong R for any loss."""
    model = network()
    x, y = data_for(model, loss, torch.randn(6, 3))
    directions = directions_of(model, k)
    M = of_natgrad(model, loss.told, x, directions)
    assert M.dtype == torch.float64
    assert relative_error(M, dense(model, x, y, loss, directions)) < 1e-12


def test_buffers_parameters_and_chance_stay_as_they_were() -> None:
    """In train mode the running statistics would move by every evaluation, and dropout would shift the user's draws."""
    model, x = nn.Sequential(*network(), nn.Dropout(0.5)), torch.randn(6, 3)
    model(x)
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    local = model_of(model.eval(), "mse", (x,))
    model.train()
    with torch.no_grad():
        local.curvature(directions_of(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert before["1.num_batches_tracked"] == 1


def test_all_directions_see_the_same_dropout() -> None:
    """Else the matrix of a direction and its double has not the rank one, and may not even be definite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    (d,) = directions_of(model, 1)
    M = of_natgrad(model, "mse", torch.randn(5, 3), [d, {n: 2 * t for n, t in d.items()}])
    assert relative_error(M, M[0, 0] * torch.tensor([[1.0, 2.0], [2.0, 4.0]])) < 1e-12


@every_loss
def test_a_part_of_identical_data_stands_for_all(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a scale that belongs to the part, of a sum above all."""
    monkeypatch.setattr(local_model, "MIN_DATA", 4)
    model, seen = network().eval(), []
    x, y = data_for(model, loss, torch.randn(1, 3))
    x, y = x.expand(12, 3), y.expand(12, *y.shape[1:])
    directions = directions_of(model)
    local = model_of(model, loss.told, (x,), select=lambda f: seen.append(len(f)) or f)
    with torch.no_grad():
        M = local.curvature(directions)
    assert seen == [12, 4, 4, 4]  # the user's pass, one to see that the network takes four, and one for each direction
    assert relative_error(M, dense(model, x, y, loss, directions)) < 1e-12


@every_loss
def test_the_last_micro_batch_stands_for_all(loss: Loss) -> None:
    """With the terms of the whole batch: three times those of the forward pass that is evaluated."""
    model = network().eval()
    x, y = data_for(model, loss, torch.randn(4, 3))
    directions, whole = directions_of(model), (x.repeat(3, 1), y.repeat(3, *[1] * (y.ndim - 1)))
    M = of_natgrad(model, loss.told, x, directions, terms=resolve(loss.told).likelihood.terms(model(whole[0])))
    assert relative_error(M, dense(model, *whole, loss, directions)) < 1e-12


@torch.no_grad()
def test_the_spread_is_the_standard_error_of_the_slope() -> None:
    """Of a linear network, whose slope is a sum over data; of a single datum nothing is known."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    step = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    for n in (7, 1):
        x = torch.randn(n, 3)
        own = (x @ step["0.weight"].mT + step["0.bias"]).sum(1)  # with a gradient of ones
        expected = n**0.5 * float(own.std()) if n > 1 else math.inf
        assert model_of(model, "mse", (x,)).spread(step) == pytest.approx(expected)


@torch.no_grad()
def test_the_spread_of_some_data_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few data with long gradients stand for themselves, each of the others for several."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4000, 3)
    step = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    spreads = []
    for size in (1000, 4000):
        monkeypatch.setattr(local_model, "MIN_DATA", size)
        local = model_of(model, "mse", (x,))
        assert local.size == size
        spreads.append(size**0.5 * local.spread(step))
    assert spreads[0] == pytest.approx(spreads[1], rel=0.1)


def test_keyword_inputs_and_selected_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, scale: float, *, x: Tensor) -> tuple[float, Tensor]:
            return scale, scale * self.layer(x)

    model, x, y = Model(), torch.randn(4, 3), torch.randn(4, 2)
    directions = directions_of(model)
    forward = Forward((3.0,), {"x": x}, torch.empty(4, 2), [])
    with torch.no_grad():
        M = LocalModel(model, Gaussian(), lambda out: out[1], forward, 8).curvature(directions)
    plain = nn.Sequential(model.layer)
    expected = dense(plain, x, y, MSE, [{f"0.{n[6:]}": t for n, t in d.items()} for d in directions])
    assert relative_error(M, 9 * expected) < 1e-12


def test_half_precision_is_summed_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions are float32 at least, whatever the parameters are; 6002 rounds to 6016 in bfloat16."""
    monkeypatch.setattr(local_model, "MIN_DATA", 4000)
    model, x = nn.Linear(1, 1, bias=False).bfloat16(), torch.ones(3001, 1, dtype=torch.bfloat16)
    directions = [{"weight": torch.ones(1, 1, dtype=torch.float32)}]
    assert of_natgrad(model, nn.MSELoss(reduction="sum"), x, directions).item() == 6002


def test_evaluation_captures_nothing() -> None:
    """The model's own hooks run again: a forward pass more would count data twice."""
    model, x = network(), torch.randn(6, 3)
    preconditioner = natgrad.Preconditioner(model, "mse")
    of_natgrad(model, "mse", x, directions_of(model))
    assert preconditioner.capture.ahead == []


class Cube(torch.autograd.Function):
    """An operation of the user's with a backward pass only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Cubed(nn.Module):
    def __init__(self, cube: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.cube = nn.Linear(3, 2), cube

    def forward(self, x: Tensor) -> Tensor:
        return self.cube(self.layer(x))


def test_the_matrix_of_a_network_without_forward_mode(caplog: pytest.LogCaptureFixture) -> None:
    """In double precision, ⅔ of the digits are 1e-10; natgrad says so once, for whoever listens."""
    x = torch.randn(5, 3)
    model, plain = Cubed(Cube.apply), Cubed(lambda z: z**3)
    derivatives._tell_once.cache_clear()
    with caplog.at_level("INFO", logger="natgrad"):
        expected = of_natgrad(plain, "mse", x, directions_of(plain))
        assert not caplog.messages
        M = of_natgrad(model, "mse", x, directions_of(model))
    assert ["no forward-mode differentiation" in message for message in caplog.messages] == [True]
    assert relative_error(M, expected) < 1e-8


# The minimizer.


@pytest.mark.parametrize("reduce", [mse_loss, lambda f, y: mse_loss(f, y, reduction="sum")])
def test_model_is_the_loss_of_a_linear_network(reduce: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Squared error of a linear map is quadratic, so bᵀc + ½ cᵀMc is the true change for any c."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 2)), torch.randn(5, 3), torch.randn(5, 2)
    told = "mse" if reduce is mse_loss else nn.MSELoss(reduction="sum")
    directions, c = directions_of(model), torch.tensor([0.3, -1.2])
    loss = reduce(model(x), y)
    loss.backward()
    b = torch.stack([sum((d[n] * p.grad).sum() for n, p in model.named_parameters()) for d in directions])
    change = b @ c + 0.5 * c @ of_natgrad(model, told, x, directions) @ c
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(c[0] * directions[0][n] + c[1] * directions[1][n])
        assert torch.allclose(reduce(model(x), y) - loss, change)


def after_four_steps(model: nn.Module, x: Tensor, y: Tensor) -> natgrad.KFAC:
    """On the same batch."""
    optimizer = natgrad.KFAC(model, "mse")
    for _ in range(4):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return optimizer


def at_the_fifth_step(build: Callable[[], nn.Module], data: int, name: str, agree: bool) -> tuple[natgrad.KFAC, Tensor]:
    """With a pass of the loop whose backward pass is over, and its output; what was seen before agrees or does not."""
    torch.manual_seed(0)
    model, x, y = build(), torch.randn(data, 3), torch.randn(data, 2)
    optimizer = after_four_steps(model, x, y)
    assert bool(optimizer.state[next(iter(model.parameters()))].get(name)) is agree
    mse_loss(output := model(x), y).backward()
    return optimizer, output


def local_model_of(optimizer: natgrad.KFAC) -> LocalModel:
    """Of the pass whose backward pass is over."""
    multiplier = optimizer.preconditioner._multiplier(optimizer.preconditioner.capture.ahead[-1])
    assert multiplier is not None
    return multiplier.local


class Restless(nn.Module):
    """Not the same function twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("times", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.times.mul_(1.1)
        output: Tensor = self.times * self.inner(x)
        return output


@pytest.mark.parametrize(("build", "repeats"), [(lambda: nn.Linear(3, 2), True), (Restless, False)])
def test_the_loops_own_pass_is_taken_for_natgrads_where_it_is_repeated(
    build: Callable[[], nn.Module], repeats: bool
) -> None:
    """Seen at the first steps; catches outputs of another state, or of another mode, taken for those here."""
    optimizer, output = at_the_fifth_step(build, 20, "repeats", repeats)
    with torch.no_grad():
        optimizer.preconditioner.model.eval()  # as a loop may, before it takes the step
        known = local_model_of(optimizer)._known()
    assert (known is not None) is repeats
    assert known is None or torch.equal(known[-1], output)


def normalized() -> nn.Module:
    """Some of the data have other statistics than all."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize(("build", "repeats"), [(lambda: nn.Linear(3, 2), True), (normalized, False)])
def test_the_loops_own_pass_is_taken_for_that_of_some_data_where_it_is_the_same(
    build: Callable[[], nn.Module], repeats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no pass is made to begin with; catches outputs of other data, and of data that depend on each other."""
    optimizer, output = at_the_fifth_step(build, 300, "parts", repeats)
    passes, run = [], LocalModel._run
    monkeypatch.setattr(LocalModel, "_run", lambda local, p: passes.append(p) or run(local, p))
    with torch.no_grad():
        local = local_model_of(optimizer)
        assert len(passes) == (not repeats)
        assert local.size < 300
        assert (relative_error(local._known()[-1], output[local.chosen]) == 0) is repeats


def test_what_was_seen_of_fixed_statistics_is_not_said_of_those_of_a_batch() -> None:
    """Catches a network that was trained in ``eval`` mode at first, and judged by outputs of other statistics later."""
    torch.manual_seed(0)
    model, x, y = normalized().eval(), torch.randn(300, 3), torch.randn(300, 2)
    optimizer = after_four_steps(model, x, y)
    assert optimizer.state[model[0].weight]["parts"]
    model.train()
    mse_loss(output := model(x), y).backward()
    with torch.no_grad():
        local = local_model_of(optimizer)
        (_, before), _ = local._ends({name: torch.zeros_like(p) for name, p in model.named_parameters()})
        assert local.size < 300
        assert relative_error(before, output[local.chosen]) > 1e-3
        assert relative_error(before, model(x[local.chosen])) < 1e-8


def test_masked_outputs_do_not_tell_whether_a_pass_is_repeated() -> None:
    """−∞ − −∞ is no number, and nothing follows."""
    model = nn.Sequential(nn.Linear(3, 4), Masked())
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(torch.randn(300, 3)), torch.zeros(300, dtype=torch.long)).backward()
        optimizer.step()
    assert "parts" not in optimizer.state[model[0].weight]


class Masked(nn.Module):
    """One class is impossible."""

    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(torch.tensor([False, False, False, True]), -torch.inf)


class Differentiated(nn.Module):
    """The derivative of a network by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, x: Tensor) -> Tensor:
        at = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(at).sum(), at, create_graph=True)
        return slope


def test_that_a_network_differentiates_itself_is_seen_at_every_step() -> None:
    """By a pass at the start, before it is settled how far differences look; catches one that is left out."""
    torch.manual_seed(0)
    model, x = Differentiated(), torch.randn(30, 1)
    optimizer = after_four_steps(model, x, x.cos())
    assert optimizer.state[model.net[0].weight]["repeats"] == 0
    mse_loss(model(x), x.cos()).backward()
    local = local_model_of(optimizer)
    with torch.no_grad():
        assert local._known() is None
