"""Natural gradients with evened singular values, against singular value decompositions in the metric."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad
from natgrad.averaging import noise_left
from natgrad.polar import LEAST, NOISE, ROWS_PER_DIMENSION, SCALES, inverse_root, orthogonalize, pays

pytestmark = pytest.mark.usefixtures("float64")


def positive(*sizes: int) -> Tensor:
    root = torch.randn(*sizes, sizes[-1])
    return root @ root.mT / sizes[-1] + 0.3 * torch.eye(sizes[-1])


def root_of(matrix: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(matrix)
    return (basis * values.sqrt().unsqueeze(-2)) @ basis.mT


def in_metric(A: Tensor, G: Tensor, direction: Tensor) -> Tensor:
    """G^½ Δ A^½."""
    return root_of(G) @ direction @ root_of(A)


def newton_schulz(values: Tensor, bound: Tensor) -> Tensor:
    """What the iteration makes of single eigenvalues."""
    rest, root = values / bound, torch.ones_like(values)
    for scale in SCALES:
        step = (1.5 - 0.5 * scale * rest) * scale**0.5
        rest, root = rest * step**2, root * step
    return root / bound.sqrt()


@settings(deadline=None)
@given(
    out=st.integers(2, 9),
    width=st.integers(2, 9),
    blocks=st.sampled_from([(), (3,)]),
    noise=st.floats(0.0, 1.0),
)
def test_singular_values_are_evened_in_the_metric(out: int, width: int, blocks: tuple[int, ...], noise: float) -> None:
    """s → s f(s² + τ²) of G^-½ V A^-½, f the iteration's root, and the length stays: from both sides, and in blocks."""
    torch.manual_seed(out * 10 + width)
    A, G, V = positive(*blocks, width), positive(*blocks, out), torch.randn(*blocks, out, width)
    natural = torch.linalg.inv(G) @ V @ torch.linalg.inv(A)
    U, s, Vh = torch.linalg.svd(in_metric(A, G, natural), full_matrices=False)
    energy = s.square().sum(-1, keepdim=True)
    shift = (NOISE * noise + LEAST) * energy.sum() / s.numel()
    evened = s * newton_schulz(s.square() + shift, energy + shift)
    expected = (U * evened.unsqueeze(-2)) @ Vh
    expected *= s.norm() / evened.norm()
    result = in_metric(A, G, orthogonalize(V, natural, noise))
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


def test_the_iteration_finds_the_inverse_root() -> None:
    """Within a per cent down to a hundredth of the bound; of ten times smaller ones most of it. Not above it."""
    values = torch.logspace(-3, 0, 60)
    found = newton_schulz(values, torch.tensor(1.0)) * values.sqrt()
    assert found.max() < 1.001
    assert found[values > 0.01].min() > 0.98
    assert found.min() > 0.65
    basis = torch.linalg.qr(torch.randn(60, 60))[0]
    matrix = (basis * values) @ basis.mT
    expected = (basis * (found / values.sqrt())) @ basis.mT
    torch.testing.assert_close(inverse_root(matrix, torch.tensor(1.0)), expected, rtol=1e-8, atol=1e-8)


def test_without_noise_all_directions_are_as_long() -> None:
    U, Vh = torch.linalg.qr(torch.randn(6, 6))[0], torch.linalg.qr(torch.randn(9, 6))[0].mT
    V = (U * torch.tensor([1.0, 0.8, 0.5, 0.4, 0.3, 0.2])) @ Vh
    values = torch.linalg.svdvals(orthogonalize(V, V, 0.0))
    torch.testing.assert_close(values, values.mean().expand(6), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_is_no_direction(dtype: torch.dtype) -> None:
    zero = torch.zeros(3, 5, dtype=dtype)
    torch.testing.assert_close(orthogonalize(zero, zero, 0.5), zero)


def test_rows_pay_for_the_smaller_side() -> None:
    V = torch.zeros(7, 30, 5)
    assert pays(ROWS_PER_DIMENSION * 5, V)
    assert not pays(ROWS_PER_DIMENSION * 5 - 1, V)
    assert not pays(1e9, torch.zeros(30, 1))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 9))


def trained(**options: Any) -> natgrad.Preconditioner:
    """After a few steps, and with gradients."""
    torch.manual_seed(0)
    model = convolution()
    optimizer = natgrad.KFAC(model, loss="cross_entropy", **options)
    for _ in range(6):
        optimizer.zero_grad()
        cross_entropy(model(torch.randn(16, 2, 5, 5)), torch.randint(9, (16,))).backward()
        optimizer.step()
    return optimizer.preconditioner


@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "ekfac"])
def test_directions_of_averages_are_evened_where_rows_pay_for_it(inverse: str) -> None:
    """The convolution sees 16 · 25 positions, the layer after it 16 rows; EKFAC's block is no product."""
    pre = trained(inverse=inverse)
    plain = pre.directions()
    pre.averages = True
    averaged = pre.directions()
    for layer in pre.layers:
        before, after = (layer.to_matrix([natural[p] for p in layer.parameters]) for natural in (plain, averaged))
        state = pre.states()[layer.name]
        V = layer.to_matrix([g for p in layer.parameters if (g := pre.gradient(p)) is not None])
        evened = orthogonalize(V, before, noise_left(float(state["noise"])))
        expected = evened if layer.name == "0" and inverse != "ekfac" else before
        torch.testing.assert_close(after, expected, rtol=1e-8, atol=1e-8)


def test_all_rows_of_a_batch_are_counted_however_many_enter_the_factors() -> None:
    for share in ("auto", 0.25):
        states = trained(batch_fraction=share).states()
        assert {name: float(state["rows"]) for name, state in states.items()} == {"0": 16 * 25, "3": 16}
