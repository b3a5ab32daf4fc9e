"""`natgrad newton`: it finds that the claims hold, and would find it out if one did not."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from natgrad.cli import app
from natgrad.experiments import newton

WIDTH = 4


@pytest.fixture
def problem() -> tuple[torch.nn.Sequential, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, 30, WIDTH, generator=generator, dtype=torch.float64)
    return newton.network(3, WIDTH, seed=0), x, y


def test_block_is_the_hessian_and_the_step_is_newtons(problem) -> None:
    checks = newton.check_layers(*problem)
    assert [check.name for check in checks] == ["0", "1", "2"]
    for check in checks:
        assert check.hessian < 1e-14
        assert check.identity < 1e-14
        assert check.step < 1e-10
        assert check.gradient < 1e-10
        assert check.holds


def test_the_step_reaches_the_minimum_of_its_layer(problem) -> None:
    """By the loss and not by the gradient: no other value of [W b] that we try is lower."""
    model, x, y = problem
    _, steps = newton.kfac(model, x, y, "exact", damping=0.0)
    P, loss = newton._loss_of_matrix(model, "1", x, y)
    lowest = loss(P - steps["1"])
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1e-1, 1.0):
        other = P - steps["1"] + scale * torch.randn(P.shape, generator=generator, dtype=P.dtype)
        assert loss(other) > lowest
    assert loss(P) > lowest


def test_gaussian_errors_converge_at_rate_one_half(problem) -> None:
    rate = newton.convergence(problem[0], seed=0, samples=(10, 100, 1_000, 10_000))
    assert abs(rate.slope + 0.5) < 0.1
    for error, theory in zip(rate.errors, rate.theory, strict=True):
        assert error == pytest.approx(theory, rel=0.35)  # 20 repetitions of a heavy-tailed square


def test_slope_is_that_of_the_line() -> None:
    samples = (1, 10, 100)
    rate = newton.Convergence(samples, tuple(3 * s**-0.25 for s in samples), (1.0, 1.0, 1.0))
    assert rate.slope == pytest.approx(-0.25)


@pytest.mark.parametrize("field", ["hessian", "identity", "step", "gradient"])
def test_a_claim_that_fails_is_not_said_to_hold(field: str) -> None:
    check = newton.LayerCheck("0", 1e-16, 1e-16, 1e-14, 1e-14)
    assert check.holds
    assert not dataclasses.replace(check, **{field: 1e-3}).holds
    assert not dataclasses.replace(check, **{field: math.nan}).holds


def test_a_failure_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton, "SAMPLES", (10, 100))
    monkeypatch.setattr(newton, "SAME_MATRIX", 0.0)
    assert newton.newton(1, 2, 0, tmp_path, Console(quiet=True)) == 1


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    result = CliRunner().invoke(app, ["newton", "--depth", "2", "--width", "3", "--seed", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "All four claims hold" in result.output
    assert (out / newton.PLOT).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", [["--depth", "0"], ["--width", "33"]])
def test_command_refuses_sizes_out_of_range(option: list[str]) -> None:
    assert CliRunner().invoke(app, ["newton", *option]).exit_code == 2
