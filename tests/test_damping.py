"""Damping rules against their formulas."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from natgrad import damping
from natgrad.damping import Damping, Evidence

pytestmark = pytest.mark.usefixtures("float64")
NO_EVIDENCE = Evidence(float("nan"), float("nan"))


def factors() -> tuple[Tensor, Tensor]:
    """Mean diagonals 4 and 0.25."""
    return torch.tensor([[6.0, 1.0], [1.0, 2.0]]), torch.tensor([[0.1, 0.2, 0.0], [0.2, 0.5, 0.0], [0.0, 0.0, 0.15]])


def numbers(d: Damping) -> tuple[float, float, float]:
    return float(d.a), float(d.g), d.product


def test_split_is_in_proportion_to_the_mean_eigenvalues() -> None:
    """π = 4, so that both factors are damped by the same share: catches the trace in place of the mean."""
    a, g, product = numbers(damping.pi_split(0.01)(*factors(), NO_EVIDENCE))
    assert (a, g, product) == pytest.approx((0.4, 0.025, 0.0))
    assert a / 4 == pytest.approx(g / 0.25)
    assert a * g == pytest.approx(0.01)


@pytest.mark.parametrize("zero", [(True, False), (False, True), (True, True)])
def test_split_is_equal_where_a_factor_is_zero(zero: tuple[bool, bool]) -> None:
    """Behind dead units π would be 0, infinite or not a number."""
    A, G = (factor * (not z) for factor, z in zip(factors(), zero, strict=True))
    assert numbers(damping.pi_split(0.01)(A, G, NO_EVIDENCE)) == pytest.approx((0.1, 0.1, 0.0))


def test_automatic_is_the_ridge_of_the_evidence() -> None:
    A, G = torch.diag(torch.tensor([92.0, 1.0, 3.0])), factors()[1]
    evidence = Evidence(noise_to_signal=0.05, curvature=0.2)
    a, g, product = numbers(damping.automatic(A, G, evidence))
    assert a == pytest.approx(damping.RIDGE * 0.05 * 8)  # between 2, the mean of 1 and 3, and 32, that of all
    assert (g, product) == pytest.approx((damping.STIFFNESS * 0.2, 0.0))
    assert numbers(damping.automatic(9 * A, G, evidence))[0] == pytest.approx(9 * a)  # inputs in other units
    assert numbers(damping.automatic(A, 1e-9 * G, evidence)) == pytest.approx((a, g, 0.0))


def test_noise_counts_by_the_square_of_what_is_not_half_confirmed() -> None:
    """And by a twenty-fifth at least: a batch that comes again confirms whatever was learnt from it by heart."""
    A, G = torch.diag(torch.tensor([92.0, 1.0, 3.0])), factors()[1]
    a = [numbers(damping.automatic(A, G, Evidence(0.05, 0.2, confirmed)))[0] for confirmed in (0.0, 0.25, 0.5, 1.0)]
    assert a == pytest.approx([12.0, 3.0, 0.48, 0.48])


def test_averaged_gradients_have_lost_their_noise() -> None:
    """It counts even less than where all is confirmed; neither side is left almost undamped."""
    A, G = torch.diag(torch.tensor([92.0, 1.0, 3.0])), factors()[1]
    noisy, clean = (Evidence(ratio, 0.2, confirmed=0.1, averaged=True) for ratio in (5.0, 0.05))
    own = damping.AVERAGED_STIFFNESS * float(G.diagonal().mean())
    assert numbers(damping.automatic(A, G, noisy)) == pytest.approx((12.0, own, 0.0))
    least = damping.AVERAGED_STIFFNESS * damping.LEAST_OWN * 0.2
    assert numbers(damping.automatic(A, 0 * G, noisy)) == pytest.approx((12.0, least, 0.0))
    assert numbers(damping.automatic(A, G, clean))[0] == pytest.approx(damping.AVERAGED_LEAST * 32)


def test_those_of_averaged_gradients_are_eased_with_their_bound() -> None:
    """Catches a Burgers equation at fresh points that is solved ten times less well, as λ_A stays at its least."""
    A, G = torch.diag(torch.tensor([92.0, 1.0, 3.0])), factors()[1]
    own, eased = damping.AVERAGED_STIFFNESS * float(G.diagonal().mean()), Evidence(0.05, 0.2, ease=0.1, averaged=True)
    expected = 0.1 * damping.AVERAGED_LEAST * 32, 0.1 * own, 0.0
    assert numbers(damping.automatic(A, G, eased)) == pytest.approx(expected)
    least = numbers(damping.automatic(A, G, replace(eased, ease=1e-9)))[0]
    assert least == pytest.approx(damping.LEAST * 32)


def test_both_dampings_are_eased_within_what_float32_inverts() -> None:
    A, G = torch.diag(torch.tensor([92.0, 1.0, 3.0])), factors()[1]
    before, eased, least = (numbers(damping.automatic(A, G, Evidence(0.05, 0.2, 0.0, e))) for e in (1.0, 0.1, 1e-9))
    assert eased == pytest.approx((before[0] / 10, before[1] / 10, 0.0))
    assert least[0] == pytest.approx(damping.LEAST * 32)


@pytest.mark.parametrize("noise", [0.0, 1e9])
def test_a_scaling_is_not_held_back(noise: float) -> None:
    """A layer with one input, as a normalization's, would take steps as many times shorter as its gradient is noisy."""
    a, g, _ = numbers(damping.automatic(torch.ones(1, 1), factors()[1], Evidence(noise, 0.2)))
    assert (a, g) == pytest.approx((0.0, damping.STIFFNESS * 0.2))


@pytest.mark.parametrize(("noise", "bound"), [(0.0, damping.LEAST), (1e9, damping.MOST)])
def test_automatic_stays_within_what_float32_inverts(noise: float, bound: float) -> None:
    A, G = factors()
    assert numbers(damping.automatic(A, G, Evidence(noise, 0.2)))[0] == pytest.approx(bound * 4)


@pytest.mark.parametrize("blocks", [(), (3,)])
def test_the_mean_without_the_largest_eigenvalue(blocks: tuple[int, ...]) -> None:
    """Against an eigendecomposition, for inputs whose mean is far from zero; a diagonal, and a single entry."""
    rows = torch.randn(*blocks, 50, 8) + 3
    A = rows.mT @ rows / 50
    expected = torch.linalg.eigvalsh(A)[..., :-1].mean()
    assert damping.mean_without_largest(A).item() == pytest.approx(float(expected), rel=1e-6)
    assert damping.mean_without_largest(torch.tensor([[1.0], [5.0], [3.0]])).item() == pytest.approx(2)
    assert damping.mean_without_largest(torch.tensor([[7.0]])).item() == pytest.approx(7)


def test_the_curvature_counts_every_output_alike() -> None:
    G, column = factors()[1], torch.tensor([[1.0], [2.0]])
    assert damping.mean_curvature([G, column]) == pytest.approx((0.75 + 3) / 5)
    assert damping.mean_curvature([]) == 0


@pytest.mark.parametrize(
    ("told", "inverse", "expected"),
    [
        ((0.3, 0.02), "cholesky", (0.3, 0.02, 0.0)),
        ((0.3, 0.02), "eigen", (0.3, 0.02, 0.0)),
        (0.01, "cholesky", (0.4, 0.025, 0.0)),
        (0.01, "eigen", (0.0, 0.0, 0.01)),
        (0, "eigen", (0.0, 0.0, 0.0)),
        (0, "cholesky", (0.0, 0.0, 0.0)),
    ],
)
def test_what_the_argument_means(told: float | tuple[float, float], inverse: str, expected: tuple[float, ...]) -> None:
    assert numbers(damping.resolve(told, inverse)(*factors(), NO_EVIDENCE)) == pytest.approx(expected)


def test_auto_is_the_automatic_rule_for_every_inverse() -> None:
    assert damping.resolve("auto", "cholesky") is damping.resolve("auto", "eigen") is damping.automatic


@pytest.mark.parametrize(
    "told", [-1.0, (0.1, -0.1), (0.1, 0.1, 0.1), (), "large", [0.1, 0.1], None, float("nan"), (0.1, "auto")]
)
def test_damping_that_is_refused(told: object) -> None:
    with pytest.raises(ValueError, match="`damping` must be a number, a pair of numbers") as raised:
        damping.resolve(told, "cholesky")
    assert str(raised.value).endswith(f'or "auto"; not {told!r}.')


def test_means_over_layers_are_plain_numbers() -> None:
    mean = damping.mean([Damping(torch.tensor(1.0), 2.0, 0.5), Damping(3.0, torch.tensor(6.0), 0.5)])
    assert mean == {"damping_a": 2.0, "damping_g": 4.0, "damping": 0.5}
    assert all(type(value) is float for value in mean.values())
