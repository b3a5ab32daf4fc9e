"""Derivatives along directions against forward-mode differentiation in double precision."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import natgrad
from natgrad import derivatives
from natgrad.derivatives import Jumps, along, central_difference, directional_derivative, pulled_back
from oracle import relative_error
from quadratic_cases import Direction, directions_of, network

pytestmark = pytest.mark.usefixtures("float64")


def function(model: nn.Module, x: Tensor) -> Callable[[Direction], tuple[Tensor, ...]]:
    """The outputs of a model twice, as the quadratic model wants them."""

    def output(parameters: Direction) -> tuple[Tensor, Tensor]:
        f = functional_call(model, parameters, (x,))
        return f, f

    return output


def probe(dtype: torch.dtype, step: float) -> tuple[float, int, int]:
    """Largest error of two derivatives, evaluations of the network, and how many of them were differentiated."""
    model = network().eval().to(dtype)
    x = torch.randn(16, 3).to(dtype)
    parameters = dict(model.named_parameters())
    moving = {n: p.detach() for n, p in parameters.items() if not n.startswith("1.")}
    directions = [{n: t.to(dtype) for n, t in d.items()} for d in directions_of(model)]
    exact, wide = function(copy.deepcopy(model).double(), x.double()), {n: p.double() for n, p in moving.items()}
    expected = [directional_derivative(exact, wide, {n: t.double() for n, t in d.items()})[1][1] for d in directions]
    calls, differentiated, output = 0, 0, function(model, x)

    def counted(p: Direction) -> tuple[Tensor, ...]:
        nonlocal calls, differentiated
        calls, differentiated = calls + 1, differentiated + torch._C._functorch.is_functorch_wrapped_tensor(p["0.bias"])
        return output(p)

    (_, before), products = along(counted, moving, directions, {"0.bias": torch.tensor([step])}, data=len(x))
    assert relative_error(before, output(moving)[1]) == 0
    errors = [relative_error(product.double(), e) for product, e in zip(products, expected, strict=True)]
    return max(errors), calls, differentiated


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were much to compute: 31 parameters move, and there are 16 data."""
    monkeypatch.setattr(derivatives, "LARGE", 31 * 16)


@torch.no_grad()
def test_where_little_is_to_be_gained_derivatives_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks then agree with one process as far as rounding allows."""
    monkeypatch.setattr(derivatives, "LARGE", 31 * 16 + 1)
    assert probe(torch.float32, step=0.1)[2] == 2


@torch.no_grad()
def test_differences_take_one_pass_each_in_single_precision() -> None:
    """Catches a difference that is not divided by its distance, or that looks as far as the step itself."""
    error, calls, differentiated = probe(torch.float32, step=0.1)
    assert error < 5e-3
    assert (calls, differentiated) == (3, 0)


@torch.no_grad()
def test_where_rounding_would_show_derivatives_are_exact() -> None:
    """A step of 1e-5 changes the outputs by less than a thousand times their rounding."""
    error, calls, differentiated = probe(torch.float32, step=1e-5)
    assert error < 1e-5
    assert (calls, differentiated) == (5, 2)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "step"), [(torch.float64, 0.1), (torch.float32, 0.0)])
def test_double_precision_and_first_steps_are_exact(dtype: torch.dtype, step: float) -> None:
    error, calls, differentiated = probe(dtype, step)
    assert error < (1e-12 if dtype == torch.float64 else 1e-5)
    assert (calls, differentiated) == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("newer", [False, True])
def test_fewer_digits_in_products_are_no_ground_for_differences(newer: bool, any_precision: None) -> None:
    """With products in bfloat16, the outputs change by less than their rounding, and the norm does not tell.

    What was set in the newer way, torch refuses to tell in the older.
    """
    if newer:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert probe(torch.float32, step=0.1)[2] < 2
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    else:
        torch.set_float32_matmul_precision("medium")
    assert probe(torch.float32, step=0.1)[2] == 2


@pytest.mark.parametrize("length", [1e-12, 1.0, 1e12])
def test_differences_do_not_depend_on_the_length_of_the_direction(length: float) -> None:
    """Catches a step in units of the direction, which rounding would swallow or which would leave the neighbourhood."""
    parameters, direction = {"w": torch.tensor([0.7, -0.4])}, {"w": length * torch.tensor([0.3, 2.0])}
    (at,), (product,) = central_difference(lambda p: (torch.tanh(p["w"]),), parameters, direction)
    assert torch.equal(at, torch.tanh(parameters["w"]))
    assert relative_error(product, direction["w"] * (1 - torch.tanh(parameters["w"]) ** 2)) < 1e-9


def test_differences_along_a_zero_direction_are_zero() -> None:
    parameters = {"w": torch.tensor([0.7, -0.4])}
    _, (product,) = central_difference(lambda p: (torch.tanh(p["w"]),), parameters, {"w": torch.zeros(2)})
    assert torch.equal(product, torch.zeros(2))


@torch.no_grad()
def test_differences_stand_in_where_there_is_no_forward_mode() -> None:
    """The fused LSTM of the CPU has none in float32; an error of the ⅔ power of the rounding is 2e-5."""
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, batch_first=True).float()
    x = torch.randn(5, 6, 3, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, (product,) = directional_derivative(lambda p: functional_call(model, p, (x,))[:1], parameters, direction)
    exact = copy.deepcopy(model).double()
    wide = {name: p.double() for name, p in parameters.items()}
    tangent = {name: d.double() for name, d in direction.items()}
    _, expected = torch.func.jvp(lambda p: functional_call(exact, p, (x.double(),))[0], (wide,), (tangent,))
    assert relative_error(product.double(), expected) < 1e-3


class Slope(nn.Module):
    """How the sum of a network's outputs changes with its inputs, which are told to require gradients in here."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)[0]


def slope_of(dtype: torch.dtype) -> tuple[Callable[[Direction], tuple[Tensor, ...]], Direction, Direction]:
    """The function, its parameters, and a direction."""
    model = Slope()
    x, direction = torch.randn(16, 3), {name: torch.randn_like(p) for name, p in model.named_parameters()}
    model.to(dtype)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return function(model, x.to(dtype)), parameters, {name: d.to(dtype) for name, d in direction.items()}


@torch.no_grad()
def test_a_network_that_calls_autograd_is_differentiated_by_dual_numbers() -> None:
    """In single precision as exactly as that is; a difference has ten times the error."""
    _, (expected, _) = directional_derivative(*slope_of(torch.float64))
    output, parameters, direction = slope_of(torch.float32)
    outputs, (product, _) = directional_derivative(output, parameters, direction)
    assert relative_error(product.double(), expected) < 2e-6
    assert not product.requires_grad
    assert not outputs[0].requires_grad
    _, (differed, _) = central_difference(output, parameters, direction)
    assert relative_error(differed.double(), expected) > 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("change", "passes"), [(0.1, 2), (0.01, 3)])
def test_differences_of_such_networks_look_further_or_not_at_all(change: float, passes: int) -> None:
    """A pass that is a tenth of the outputs away tells more than their rounding; one that is closer may not."""
    output, parameters, direction = slope_of(torch.float32)
    before, (product, _) = directional_derivative(output, parameters, direction)
    length = torch.stack([d.norm() for d in direction.values()]).norm()
    step = {"all": change * before[0].norm() / product.norm() * length / derivatives.OWN_REACH}
    calls = 0

    def counted(p: Direction) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return output(p)

    _, (told,) = along(counted, parameters, [direction], step, data=10**6, differentiates=lambda: True)
    assert calls - (passes == 3) == passes  # forward-mode differentiation by a transform is tried first
    assert relative_error(told, product) < 0.2


class Rounded(nn.Module):
    """To so many steps in a unit. Its derivative is declared to be that of the input."""

    def __init__(self, steps: float = 8) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return x + ((self.steps * x).round() / self.steps - x).detach()


@pytest.mark.parametrize("steps", [0.0, 32.0, 4.0])
def test_differences_across_jumps_are_not_taken_for_derivatives(steps: float) -> None:
    """They grow as steps shrink, and rates would collapse: ever shorter steps see ever more curvature.

    Across large jumps even wide ones are many times as long as the derivative, which is taken there.
    """
    torch.manual_seed(0)
    jumps, unit = steps > 0, Rounded(steps) if steps else nn.Softplus()
    model = nn.Sequential(nn.Linear(40, 300), unit, nn.Linear(300, 300), unit, nn.Linear(300, 5)).float()
    x = torch.randn(300, 40, dtype=torch.float32)
    output, parameters = function(model, x), {n: p.detach() for n, p in model.named_parameters()}
    direction = {n: torch.randn_like(p) for n, p in parameters.items()}
    state: dict[str, Any] = {}
    for step, times in ((1, 0.1), (2, 0.01), (20, 0.001), (21, 0.001)):
        state["step"] = torch.tensor(float(step))
        previous = {n: times * d for n, d in direction.items()}
        _, (product,) = along(output, parameters, [direction], previous, 300, jumps=(known := Jumps(state)))
        assert float(state["smooth"]) == (0 if jumps else 1 if step < 20 else 2)
        assert known.are_crossed == (steps == 32)
        if steps == 32:
            expected = central_difference(output, parameters, direction)[1][1]
        else:
            expected = directional_derivative(output, parameters, direction)[1][1]
        assert relative_error(product, expected) < (1e-6 if jumps else 0.02)


def test_quantized_networks_learn() -> None:
    """With differences across jumps the rate falls to 1e-5, and the loss stays above 0.4."""
    torch.manual_seed(0)
    inner = [nn.Linear(40, 128), Rounded(), nn.ReLU(), nn.Linear(128, 128), Rounded(), nn.ReLU()]
    model = nn.Sequential(*inner, nn.Linear(128, 5)).float()
    x = torch.randn(1000, 40, dtype=torch.float32)
    y = (x[:, :5] * x[:, 5:10]).argmax(1)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for step in range(60):
        part = slice(step % 5 * 200, step % 5 * 200 + 200)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    assert nn.functional.cross_entropy(model(x), y) < 0.3


@pytest.mark.parametrize("used", [["w", "b"], ["w"], []])
def test_a_gradient_is_pulled_back_to_what_the_outputs_depend_on(used: list[str]) -> None:
    """Also under `no_grad`, and with zeros for the rest."""
    x, parameters = torch.randn(5, 3), {"w": torch.randn(3), "b": torch.randn(3)}

    def output(p: Direction) -> tuple[Tensor, ...]:
        return (x * sum((p[name] for name in used), torch.ones(3)) ** 2,)

    gradient = torch.randn(5, 3)
    with torch.no_grad():
        pulled = pulled_back(output, parameters, gradient)
    slope = (gradient * x).sum(0) * 2 * sum((parameters[name] for name in used), torch.ones(3))
    for name, g in pulled.items():
        torch.testing.assert_close(g, slope if name in used else torch.zeros(3))
