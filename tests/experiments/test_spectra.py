"""Quantiles of the factors' eigenvalues, and their charts."""

import pytest
import torch

from natgrad.experiments import spectra


def rotated(eigenvalues):
    """A symmetric matrix with these eigenvalues and none of its eigenvectors along an axis."""
    Q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=torch.Generator().manual_seed(0)))
    return Q @ torch.diag(torch.tensor(eigenvalues)) @ Q.T


def test_quantiles_are_those_of_the_eigenvalues():
    A, G = rotated([float(k) for k in range(11)]), torch.tensor([[4.0], [0.0], [2.0]])  # G a diagonal
    told = spectra.told({"0": (A, G)})
    expected = {"a@1.0": 10, "a@0.9": 9, "a@0.5": 5, "a@0.1": 1, "g@1.0": 4, "g@0.5": 2}
    for key, value in expected.items():
        assert told[f"eigenvalue_{key}/0"] == pytest.approx(value, abs=1e-4)


def test_several_blocks_count_together_and_rounding_below_zero_does_not():
    A = torch.stack([torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([-1e-9, -1e-9]))])
    told = spectra.told({"": (A, A)})
    assert told["eigenvalue_a@1.0/model"] == 2
    assert min(told.values()) >= 0


def test_a_chart_for_each_factor_with_its_damping():
    factors = {name: (rotated([1.0, 2.0]), rotated([3.0, 4.0])) for name in ("0", "2")}
    steps = [(float(s), {**spectra.told(factors), "damping_a/0": 0.5, "damping_g/2": 0.1}) for s in (0, 1, 2)]
    steps.append((3.0, {"lr": 1.0}))  # most steps tell of no spectrum
    charts = spectra.charts(steps)
    assert [chart.title for chart in charts] == [f"Eigenvalues of {f}, layer {n}" for n in "02" for f in "AG"]
    largest, *_, damping = charts[0].series
    assert largest.points == [(step, pytest.approx(2.0)) for step in (0.0, 1.0, 2.0)]
    assert damping.points == [(0.0, 0.5), (1.0, 0.5), (2.0, 0.5)]
    assert charts[1].series[-1].points == []
