"""The oracle's layer kinds against indices written out: rows by explicit loops, blocks in closed form."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from layer_modules import Conv1D, randomized
from oracle import _Probed, as_matrix, ggn_block, gradient_block, kfac_block, layer_params, output_rows, relative_error

pytestmark = pytest.mark.usefixtures("float64")


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """(B, N, S, in)."""
    return _Probed(nn.Sequential(layer), "0", x).calls[0].rows()


def positions(*sizes: int) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, sizes)))


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_convolution(groups: int) -> None:
    """Entry (c, i, j) of row (h, w) is pixel (h s − p + i d, w s − p + j d) of channel c, zero beyond the border."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=groups)
    x = torch.randn(2, 4, 5, 6)
    _, _, H, W = layer(x).shape
    width = 4 // groups
    rows = rows_of(layer, x)
    assert rows.shape == (groups, 2, H * W, width * 6 + 1)
    for b, n, (s, (h, w)) in itertools.product(range(groups), range(2), enumerate(positions(H, W))):
        expected = []
        for c, i, j in positions(width, 3, 2):
            row, column = 2 * h - 1 + i, w - 2 + 2 * j
            inside = 0 <= row < 5 and 0 <= column < 6
            expected.append(float(x[n, b * width + c, row, column]) if inside else 0.0)
        assert torch.allclose(rows[b, n, s], torch.tensor([*expected, 1.0]))


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_transposed_convolution(groups: int) -> None:
    """Input (i) spreads to output i s − p + k d: output t is reached from i by the tap k with t = i s − p + k d."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, groups=groups)
    x = torch.randn(2, 4, 5)
    length, width = layer(x).shape[2], 4 // groups
    rows = rows_of(layer, x)
    for b, n, t in positions(groups, 2, length):
        expected = torch.zeros(width, 3)
        for c, k, i in positions(width, 3, 5):
            if t == 2 * i - 1 + 2 * k:
                expected[c, k] += x[n, b * width + c, i]
        assert torch.allclose(rows[b, n, t, :-1], expected.flatten())
    P = as_matrix(layer, list(layer.parameters()))
    z = torch.einsum("boi,bnsi->bnso", P, rows)
    assert torch.allclose(z, output_rows(layer, layer(x)))


def test_rows_of_tokens_are_one_hot() -> None:
    tokens = torch.tensor([[0, 2, 1], [2, 2, 4]])
    rows = rows_of(nn.Embedding(5, 3, padding_idx=4), tokens)
    expected = nn.functional.one_hot(tokens, 5).to(rows.dtype)
    expected[1, 2] = 0
    assert torch.equal(rows, expected[None])


def test_rows_of_a_transposed_linear_layer() -> None:
    x = torch.randn(2, 3, 4)
    rows = rows_of(Conv1D(5, 4), x)
    assert torch.allclose(rows[0, ..., :-1], x)
    assert torch.equal(rows[0, ..., -1], torch.ones(2, 3))


def test_a_grouped_convolution_is_that_many_convolutions() -> None:
    """Each with its own input and kernel; their blocks are those of the separate modules."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)).double()
    x, y = torch.randn(3, 4, 6), torch.randn(3, 2)

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Conv1d(2, 3, 3) for _ in range(2))
            for i, part in enumerate(self.parts):
                part.weight.data = whole[0].weight.data[3 * i : 3 * i + 3]
                part.bias.data = whole[0].bias.data[3 * i : 3 * i + 3]
            self.rest = whole[1:]

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(torch.cat([self.parts[0](x[:, :2]), self.parts[1](x[:, 2:])], 1))

    halves = Halves()
    for sharing in ("expand", "reduce"):
        expected = torch.stack([kfac_block(halves, f"parts.{i}", x, y, mse_loss, sharing) for i in (0, 1)])
        assert relative_error(kfac_block(whole, "0", x, y, mse_loss, sharing), expected) < 1e-12
    params = layer_params(whole, "0")
    expected = torch.stack([ggn_block(halves, layer_params(halves, f"parts.{i}"), x, y, mse_loss) for i in (0, 1)])
    assert relative_error(ggn_block(whole, params, x, y, mse_loss), expected) < 1e-12
    expected = torch.stack([gradient_block(halves, layer_params(halves, f"parts.{i}"), x, y, mse_loss) for i in (0, 1)])
    assert relative_error(gradient_block(whole, params, x, y, mse_loss), expected) < 1e-12


def test_a_norm_in_closed_form() -> None:
    """z = γ x̂ + β under squared error: Σ_n Σ_s [x̂ 1]ᵀ[x̂ 1] for each channel, as positions do not meet again."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(randomized(nn.LayerNorm(3))), torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    x_hat = nn.functional.layer_norm(x, (3,)).flatten(0, 1)
    scale, shift, cross = x_hat.square().sum(0), torch.full((3,), 20.0), x_hat.sum(0)
    top, bottom = torch.cat([scale.diag(), cross.diag()], 1), torch.cat([cross.diag(), shift.diag()], 1)
    expected = torch.cat([top, bottom]) * 2 / 60
    assert relative_error(kfac_block(model, "0", x, y, mse_loss), expected) < 1e-12
    assert relative_error(ggn_block(model, layer_params(model, "0"), x, y, mse_loss), expected) < 1e-12


def test_layers_that_share_their_parameters_are_positions_of_one() -> None:
    """Whatever the calls are called: twice the same module is the same as two modules with the same parameters."""
    torch.manual_seed(0)
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight, two.bias = one.weight, one.bias
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    twice, tied = nn.Sequential(one, nn.Tanh(), one), nn.Sequential(one, nn.Tanh(), two)
    for sharing in ("expand", "reduce"):
        expected = kfac_block(twice, "0", x, y, mse_loss, sharing)
        assert relative_error(kfac_block(tied, ["0", "2"], x, y, mse_loss, sharing), expected) < 1e-13


def test_frozen_parameters_are_no_columns() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    whole = kfac_block(model, "0", x, y, mse_loss)
    model[0].bias.requires_grad_(False)
    weights = [0, 1, 2, 4, 5, 6]
    assert relative_error(kfac_block(model, "0", x, y, mse_loss), whole[weights][:, weights]) < 1e-13
