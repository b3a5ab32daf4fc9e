"""The oracle against closed forms and finite differences, so that natgrad is not compared with a mistake."""

import ast
import pathlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from oracle import (
    empirical_fisher_block,
    empirical_kfac_block,
    forward_kfac_block,
    ggn_block,
    gradient_block,
    hessian_block,
    kfac_block,
    layer_params,
    relative_error,
)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """Double precision and a fixed seed for every test of this file."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias))


def test_oracle_is_independent() -> None:
    tree = ast.parse(pathlib.Path(__file__).with_name("oracle.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not any("natgrad" in name for name in imported)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", ["0", "2"])
def test_gradient_is_that_of_backward(layer: str, bias: bool) -> None:
    model, x, y = mlp(bias), torch.randn(5, 3), torch.randn(5, 2)
    mse_loss(model(x), y).backward()
    grads = [model.get_parameter(name).grad for name in layer_params(model, layer)]
    expected = torch.cat([g.reshape(g.shape[0], -1) for g in grads], 1)
    assert relative_error(gradient_block(model, layer_params(model, layer), x, y, mse_loss), expected) < 1e-14


def test_hessian_is_the_slope_of_the_gradient() -> None:
    model, x, y = mlp(), torch.randn(5, 3), torch.randint(2, (5,))
    params = layer_params(model, "0")
    H = hessian_block(model, params, x, y, cross_entropy)
    step = 1e-5
    for k in range(16):  # P is (4, 4): entry k is row k // 4, and the last column is the bias
        row, column = divmod(k, 4)
        target = model[0].bias[row] if column == 3 else model[0].weight[row, column]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                target += sign * step
            values.append(gradient_block(model, params, x, y, cross_entropy).flatten())
            with torch.no_grad():
                target -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        assert relative_error(H[k], slope) < 1e-7


def test_hessian_is_ggn_where_the_output_is_linear_in_the_layer() -> None:
    model, x, y = mlp(), torch.randn(5, 3), torch.randint(2, (5,))
    params = layer_params(model, "2")
    ggn = ggn_block(model, params, x, y, cross_entropy)
    assert relative_error(ggn, hessian_block(model, params, x, y, cross_entropy)) < 1e-13
    inner = layer_params(model, "0")
    ggn = ggn_block(model, inner, x, y, cross_entropy)
    assert relative_error(ggn, hessian_block(model, inner, x, y, cross_entropy)) > 1e-3


def test_one_linear_layer_with_mse_in_closed_form() -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 2)), torch.randn(5, 3), torch.randn(5, 2)
    expected = torch.kron(torch.eye(2) * 2 / (5 * 2), with_ones(x).T @ with_ones(x))
    assert relative_error(ggn_block(model, ["0.weight", "0.bias"], x, y, mse_loss), expected) < 1e-14
    assert relative_error(kfac_block(model, "0", x, y, mse_loss), expected) < 1e-14


def test_one_linear_layer_with_cross_entropy_in_closed_form() -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 4)), torch.randn(5, 3), torch.randint(4, (5,))
    p, rows = model(x).detach().softmax(1), with_ones(x)
    output_hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    ggn = sum(torch.kron(h, torch.outer(r, r)) for h, r in zip(output_hessians, rows, strict=True)) / 5
    kfac = torch.kron(output_hessians.mean(0), rows.T @ rows / 5)
    assert relative_error(ggn_block(model, ["0.weight", "0.bias"], x, y, cross_entropy), ggn) < 1e-14
    assert relative_error(kfac_block(model, "0", x, y, cross_entropy), kfac) < 1e-14


def test_empirical_fisher_in_closed_form() -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 2)), torch.randn(5, 3), torch.randn(5, 2)

    def half_sse(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().sum(1) / 2

    e, rows = (model(x) - y).detach(), with_ones(x)
    fisher = sum(torch.kron(torch.outer(a, a), torch.outer(r, r)) for a, r in zip(e, rows, strict=True)) * 0.3
    kfac = torch.kron(0.3 * e.T @ e, rows.T @ rows / 5)
    params = ["0.weight", "0.bias"]
    assert relative_error(empirical_fisher_block(model, params, x, y, half_sse, 0.3), fisher) < 1e-14
    assert relative_error(empirical_kfac_block(model, "0", x, y, half_sse, 0.3), kfac) < 1e-14
    # One datum: every outer product is a Kronecker product, so both are the same matrix.
    one = empirical_fisher_block(model, params, x[:1], y[:1], half_sse, 0.3)
    assert relative_error(empirical_kfac_block(model, "0", x[:1], y[:1], half_sse, 0.3), one) < 1e-14


@pytest.mark.parametrize("layer", ["0", "1"])
def test_expand_is_exact_where_positions_do_not_interact(layer: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    x, y = torch.randn(5, 6, 3), torch.randn(5, 6, 2)
    ggn = ggn_block(model, layer_params(model, layer), x, y, mse_loss)
    assert relative_error(kfac_block(model, layer, x, y, mse_loss), ggn) < 1e-13
    assert relative_error(kfac_block(model, layer, x, y, mse_loss, "reduce"), ggn) > 1e-2


class Pooled(nn.Module):
    """Two linear maps at every position, then the mean or the sum over positions."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.first, self.last, self.pool = nn.Linear(3, 4), nn.Linear(4, 2), pool

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.last(self.first(x)), self.pool)(1)


@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("layer", ["first", "last"])
def test_reduce_is_exact_where_positions_are_pooled(layer: str, pool: str) -> None:
    model, x, y = Pooled(pool), torch.randn(5, 6, 3), torch.randn(5, 2)
    ggn = ggn_block(model, layer_params(model, layer), x, y, mse_loss)
    assert relative_error(kfac_block(model, layer, x, y, mse_loss, "reduce"), ggn) < 1e-13
    assert relative_error(kfac_block(model, layer, x, y, mse_loss), ggn) > 1e-2


class Siamese(nn.Module):
    """One layer called on both halves of the input, under two names; the results side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left = self.right = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x[:, :3]), self.right(x[:, 3:])], 1)


def test_calls_of_one_layer_are_positions() -> None:
    model, x, y = Siamese(), torch.randn(5, 6), torch.randn(5, 4)
    ggn = ggn_block(model, ["left.weight", "left.bias"], x, y, mse_loss)
    assert relative_error(kfac_block(model, "left", x, y, mse_loss), ggn) < 1e-13


def test_in_place_activations_change_nothing() -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    blocks = [kfac_block(model, "0", x, y, mse_loss), ggn_block(model, layer_params(model, "0"), x, y, mse_loss)]
    model[1] = nn.ReLU(inplace=True)
    assert torch.equal(kfac_block(model, "0", x, y, mse_loss), blocks[0])
    assert torch.equal(ggn_block(model, layer_params(model, "0"), x, y, mse_loss), blocks[1])


def test_forward_only_keeps_the_inputs() -> None:
    model, x = mlp(), torch.randn(5, 3)
    expected = torch.kron(torch.eye(4), with_ones(x).T @ with_ones(x) / 5)
    assert relative_error(forward_kfac_block(model, "0", x), expected) < 1e-14
    bare = torch.kron(torch.eye(4), x.T @ x / 5)
    assert relative_error(forward_kfac_block(mlp(bias=False), "0", x), bare) < 1e-14


def test_unknown_layers_are_refused() -> None:
    model = nn.Sequential(nn.GRUCell(3, 2))
    with pytest.raises(NotImplementedError, match="GRUCell"):
        kfac_block(model, "0", torch.randn(5, 3), torch.randn(5, 2), mse_loss)
