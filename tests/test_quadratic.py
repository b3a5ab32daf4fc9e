"""The quadratic model against a dense Gauss-Newton matrix of the whole network, built row by row in reverse mode."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.functional import mse_loss

import natgrad
from linear_cases import MSE, Loss, data_for, every_loss
from natgrad.likelihoods import Gaussian, resolve
from natgrad.quadratic import curvature_matrix, minimize, subsample
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
some_examples = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
Direction = dict[str, Tensor]


def network() -> nn.Sequential:
    """With buffers that a forward pass in train mode changes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def directions_of(model: nn.Module, k: int = 2) -> list[Direction]:
    generator = torch.Generator().manual_seed(1)
    moving = {n: p for n, p in model.named_parameters() if not n.startswith("1.")}
    return [{n: torch.randn(p.shape, generator=generator) for n, p in moving.items()} for _ in range(k)]


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


def of_natgrad(
    model: nn.Module, told: Any, inputs: tuple[Any, ...], directions: list[Direction], **options: Any
) -> Tensor:
    likelihood = resolve(told)
    with torch.no_grad():
        terms = options.pop("terms", None) or likelihood.terms(model(*inputs))
        return curvature_matrix(model, likelihood, (inputs, {}), terms, directions, lambda out: out, **options)


@every_loss
@pytest.mark.parametrize("k", [1, 2, 3])
def test_matrix_is_the_gauss_newton_matrix_along_the_directions(loss: Loss, k: int) -> None:
    """Of the whole network: no layer's block, no Kronecker product. Catches a wrong R for any loss."""
    model = network()
    x, y = data_for(model, loss, torch.randn(6, 3))
    directions = directions_of(model, k)
    M = of_natgrad(model, loss.told, (x,), directions)
    assert M.dtype == torch.float64
    assert relative_error(M, dense(model, x, y, loss, directions)) < 1e-12


def test_buffers_parameters_and_chance_stay_as_they_were() -> None:
    """In train mode the running statistics would move by every evaluation, and dropout would shift the user's draws."""
    model, x = nn.Sequential(*network(), nn.Dropout(0.5)), torch.randn(6, 3)
    model(x)
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        curvature_matrix(model, Gaussian(), ((x,), {}), 18, directions_of(model), lambda out: out)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert before["1.num_batches_tracked"] == 1


def test_all_directions_see_the_same_dropout() -> None:
    """Else the matrix of a direction and its double has not the rank one, and may not even be definite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    (d,) = directions_of(model, 1)
    M = of_natgrad(model, "mse", (torch.randn(5, 3),), [d, {n: 2 * t for n, t in d.items()}])
    assert relative_error(M, M[0, 0] * torch.tensor([[1.0, 2.0], [2.0, 4.0]])) < 1e-12


@every_loss
def test_a_part_of_identical_data_stands_for_all(loss: Loss) -> None:
    """Catches a scale that belongs to the part, of a sum above all."""
    model, seen = network().eval(), []
    x, y = data_for(model, loss, torch.randn(1, 3))
    x, y = x.expand(12, 3), y.expand(12, *y.shape[1:])
    directions, likelihood = directions_of(model), resolve(loss.told)
    terms = likelihood.terms(model(x))
    with torch.no_grad():
        M = curvature_matrix(model, likelihood, ((x,), {}), terms, directions, lambda f: seen.append(len(f)) or f, 4)
    assert seen == [4, 4]
    assert relative_error(M, dense(model, x, y, loss, directions)) < 1e-12


@every_loss
def test_the_last_micro_batch_stands_for_all(loss: Loss) -> None:
    """With the terms of the whole batch: three times those of the forward pass that is evaluated."""
    model = network().eval()
    x, y = data_for(model, loss, torch.randn(4, 3))
    directions, whole = directions_of(model), (x.repeat(3, 1), y.repeat(3, *[1] * (y.ndim - 1)))
    M = of_natgrad(model, loss.told, (x,), directions, terms=resolve(loss.told).terms(model(whole[0])))
    assert relative_error(M, dense(model, *whole, loss, directions)) < 1e-12


def test_keyword_inputs_and_selected_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, scale: float, *, x: Tensor) -> tuple[float, Tensor]:
            return scale, scale * self.layer(x)

    model, x, y = Model(), torch.randn(4, 3), torch.randn(4, 2)
    directions = directions_of(model)
    with torch.no_grad():
        M = curvature_matrix(model, Gaussian(), ((3.0,), {"x": x}), 8, directions, lambda out: out[1])
    plain = nn.Sequential(model.layer)
    expected = dense(plain, x, y, MSE, [{f"0.{n[6:]}": t for n, t in d.items()} for d in directions])
    assert relative_error(M, 9 * expected) < 1e-12


def test_half_precision_is_summed_in_single_precision() -> None:
    """Directions are float32 at least, whatever the parameters are; 6002 rounds to 6016 in bfloat16."""
    model, x = nn.Linear(1, 1, bias=False).bfloat16(), torch.ones(3001, 1, dtype=torch.bfloat16)
    directions = [{"weight": torch.ones(1, 1, dtype=torch.float32)}]
    assert of_natgrad(model, nn.MSELoss(reduction="sum"), (x,), directions, max_data=4000).item() == 6002


def test_evaluation_captures_nothing() -> None:
    """The model's own hooks run again: a forward pass more would count data twice."""
    model, x = network(), torch.randn(6, 3)
    preconditioner = natgrad.Preconditioner(model, "mse")
    of_natgrad(model, "mse", (x,), directions_of(model))
    assert preconditioner.capture.batch.forwards == 0


# Which data are evaluated.


def test_subsample_takes_every_kth_datum_of_what_has_the_batch_dimension() -> None:
    x, mask, table = torch.arange(10.0), torch.arange(20.0).reshape(10, 2), torch.randn(3, 10)
    args, kwargs = subsample(((x, table, 0.5), {"mask": mask, "flag": True}), 4)
    assert args[0].tolist() == [0, 2, 4, 6, 8]
    assert args[1] is table
    assert args[2] == 0.5
    assert torch.equal(kwargs["mask"], mask[::2])
    assert kwargs["flag"] is True


@pytest.mark.parametrize("inputs", [((torch.zeros(7),), {}), ((), {"flag": 1}), ((torch.tensor(3.0),), {}), ((), {})])
def test_small_batches_and_inputs_without_data_are_taken_whole(inputs: Any) -> None:
    assert subsample(inputs, 4) is inputs


# The minimizer.


def definite(k: int, seed: int, rank: int | None = None) -> Tensor:
    rows = torch.randn(rank or k + 2, k, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows


@some_examples
@hypothesis.given(k=st.integers(1, 3), seed=st.integers(0, 1000), data=st.data())
def test_minimize_is_the_closed_form_over_the_free_entries(k: int, seed: int, data: st.DataObject) -> None:
    """Catches the fixed entries' pull on the free ones left out."""
    M, b = definite(k, seed), torch.randn(k, generator=torch.Generator().manual_seed(seed + 1))
    fixed = [data.draw(st.sampled_from([None, 0.0, 0.7, -2.0])) for _ in range(k)]
    c = minimize(M, b, fixed)
    free = torch.tensor([value is None for value in fixed])
    assert torch.equal(c[~free], torch.tensor([value for value in fixed if value is not None], dtype=c.dtype))
    assert torch.allclose((b + M @ c)[free], torch.zeros(int(free.sum())), atol=1e-8)


def test_a_tiny_previous_step_is_not_taken_for_a_null_direction() -> None:
    """Near the end, the natural gradient may be 10⁶ times as long as the last step."""
    M, b, size = definite(2, 0), torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 1e-8])
    scaled = minimize(torch.outer(size, size) * M, size * b, [None, None])
    assert torch.allclose(scaled * size, torch.linalg.solve(M, -b), rtol=1e-6)


@pytest.mark.parametrize(
    ("M", "b", "expected"),
    [
        ([[2.0, 0.0], [0.0, 0.0]], [-1.0, 0.0], [0.5, 0.0]),
        ([[2.0, 0.0], [0.0, -1e-20]], [-1.0, -1.0], [0.5, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [-1.0, -1.0], [0.0, 0.0]),
        ([[1.0, 1.0], [1.0, 1.0]], [-1.0, -1.0], [0.5, 0.5]),  # twice the same direction shares the step
    ],
)
def test_null_directions_are_not_moved_along(M: list[list[float]], b: list[float], expected: list[float]) -> None:
    c = minimize(torch.tensor(M), torch.tensor(b), [None, None])
    assert torch.allclose(c, torch.tensor(expected))


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
    change = b @ c + 0.5 * c @ of_natgrad(model, told, (x,), directions) @ c
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(c[0] * directions[0][n] + c[1] * directions[1][n])
        assert torch.allclose(reduce(model(x), y) - loss, change)
