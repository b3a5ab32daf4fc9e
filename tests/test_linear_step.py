"""Linear layers: what the preconditioner makes of a gradient, against dense solves and an invariance."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from oracle import kfac_block, relative_error

Factors = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def matrix_gradient(layer: nn.Module) -> Tensor:
    """Gradient in P = [W b], shape (out, in+1)."""
    columns = [layer.weight.grad] if layer.bias is None else [layer.weight.grad, layer.bias.grad[:, None]]
    return torch.cat(columns, 1)


def network(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 5, bias=bias))


def step(model: nn.Module, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Factors]:
    """Gradients before and after one preconditioning, and the factors (A, G) it used."""
    x, y = torch.randn(9, 3), torch.randint(5, (9,))
    preconditioner = natgrad.Preconditioner(model, "cross_entropy", fisher="exact", factor_decay=0.0, **options)
    cross_entropy(model(x), y).backward()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    before = {name: matrix_gradient(layer).clone() for name, layer in layers.items()}
    preconditioner.step()
    return before, {name: matrix_gradient(layer) for name, layer in layers.items()}, preconditioner.factors()


def dense_solve(block: Tensor, gradient: Tensor) -> Tensor:
    return torch.linalg.solve(block, gradient.flatten()).reshape_as(gradient)


def eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[0])


@pytest.mark.parametrize("bias", [True, False])
def test_a_pair_damps_each_factor(bias: bool) -> None:
    """Catches the two dampings exchanged, and the bias row or column left behind."""
    before, after, factors = step(network(bias), damping=(0.3, 0.02))
    for name, (A, G) in factors.items():
        expected = dense_solve(torch.kron(G + 0.02 * eye(G), A + 0.3 * eye(A)), before[name])
        assert relative_error(after[name], expected) < 1e-10


@pytest.mark.parametrize("bias", [True, False])
def test_a_number_is_split_by_the_mean_diagonals(bias: bool) -> None:
    """Catches π upside down. It is Martens and Grosse (2015), section 6.3."""
    before, after, factors = step(network(bias), damping=0.05)
    for name, (A, G) in factors.items():
        pi = (A.diagonal().mean() / G.diagonal().mean()).sqrt()
        root = 0.05**0.5
        expected = dense_solve(torch.kron(G + root / pi * eye(G), A + pi * root * eye(A)), before[name])
        assert relative_error(after[name], expected) < 1e-10


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("damping", [1e-4, 0.05, 10.0])
def test_eigen_inverts_the_damped_block_exactly(bias: bool, damping: float) -> None:
    """Against the oracle's block, which knows nothing of where natgrad keeps its constants."""
    model = network(bias)
    torch.manual_seed(1)
    x, y = torch.randn(9, 3), torch.randint(5, (9,))
    blocks = {name: kfac_block(model, name, x, y, cross_entropy) for name in ("0", "2")}
    torch.manual_seed(1)
    before, after, _ = step(model, damping=damping, inverse="eigen")
    for name, block in blocks.items():
        expected = dense_solve(block + damping * eye(block), before[name])
        assert relative_error(after[name], expected) < 1e-8


def test_factors_are_a_weighted_mean_without_a_bias_to_the_start() -> None:
    """Catches a first batch that counts as if it had been there for ever."""
    model = network(bias=True)
    batches = [(torch.randn(9, 3), torch.randint(5, (9,))) for _ in range(3)]
    weights = [0.25, 0.5, 1.0]

    def factors(decay: float, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        copied = copy.deepcopy(model)
        preconditioner = natgrad.Preconditioner(
            copied, "cross_entropy", fisher="exact", factor_decay=decay, damping=1.0, batch_fraction=1.0
        )
        for x, y in batches:
            cross_entropy(copied(x), y).backward()
            preconditioner.step()
        return [factor for pair in preconditioner.factors().values() for factor in pair]

    single = [factors(0.0, [batch]) for batch in batches]
    for running, *seen in zip(factors(0.5, batches), *single, strict=True):
        expected = sum(w * F for w, F in zip(weights, seen, strict=True)) / sum(weights)
        assert relative_error(running, expected) < 1e-12


def test_undamped_step_does_not_see_an_affine_map_of_the_inputs() -> None:
    """Two nets that are one function of x, the second fed with x' = x M + m: after a step they still are one."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
    x, y = torch.randn(40, 3), torch.randn(40, 4)
    M, m = torch.randn(3, 3) + 2 * torch.eye(3), torch.randn(3)
    mapped = copy.deepcopy(plain)
    with torch.no_grad():  # W x + b = W' (Mᵀ x + m) + b'
        mapped[0].weight.copy_(torch.linalg.solve(M, plain[0].weight.T).T)
        mapped[0].bias.sub_(mapped[0].weight @ m)
    start, ends = plain(x).detach(), []
    for model, x_seen in ((plain, x), (mapped, x @ M + m)):
        assert relative_error(model(x_seen).detach(), start) < 1e-12
        preconditioner = natgrad.Preconditioner(model, "mse", fisher="exact", damping=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mse_loss(model(x_seen), y).backward()
        preconditioner.step()
        optimizer.step()
        with torch.no_grad():
            ends.append(model(x_seen))
    assert (ends[0] - start).norm() > 0.01 * start.norm()
    assert relative_error(ends[1] - start, ends[0] - start) < 1e-8
