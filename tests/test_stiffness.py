"""Whether the first steps want a heavier λ_G: trials against dense curvature, and what becomes of their results."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import natgrad
from natgrad import stiffness, trust
from natgrad.damping import STIFFNESS, mean_curvature
from natgrad.local_model import LocalModel
from natgrad.multiplier import LossMultiplier
from natgrad.rates import Course, Direction
from natgrad.stiffness import BETTER, MOST, STEP
from natgrad.trust import Trust
from natgrad.undeclared import Undeclared
from oracle import relative_error

PROMISED = stiffness.promised
pytestmark = pytest.mark.usefixtures("float64")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, torch.stack([x.sum(1).tanh(), x[:, 0] * x[:, 1]], dim=1)


def train(optimizer: natgrad.KFAC, steps: int) -> None:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(optimizer.preconditioner.model(x), y).backward()
        optimizer.step()


def trust_of(optimizer: natgrad.KFAC) -> Trust:
    return Trust(optimizer.state[optimizer.preconditioner.layers[0].parameters[0]])


def scripted(monkeypatch: pytest.MonkeyPatch, *best: int) -> list[int]:
    """Let one trial after the other be the best, and then the first; the numbers of trials that there were."""
    tried: list[int] = []

    def promised(multiplier: LossMultiplier, course: Course, naturals: list[Direction]) -> tuple[list[float], Tensor]:
        choice = best[len(tried)] if len(tried) < len(best) else 0
        tried.append(len(naturals))
        return [float(i == choice) for i in range(len(naturals))], PROMISED(multiplier, course, naturals)[1]

    monkeypatch.setattr(stiffness, "promised", promised)
    return tried


def dense_falls(model: nn.Module, course: Course, naturals: Sequence[Direction]) -> list[float]:
    """½ bᵀM⁻¹b over each direction and the previous step, by forward mode through the network."""
    x, y = data()
    at = {course.names[p]: p.detach() for p in naturals[0]}
    gradient = torch.func.grad(lambda theta: mse_loss(torch.func.functional_call(model, theta, x), y))(at)
    falls = []
    for natural in naturals:
        directions = [{course.names[p]: -d for p, d in natural.items()}, *([course.back] if course.previous else [])]
        products = [
            torch.func.jvp(lambda theta: torch.func.functional_call(model, theta, x), (at,), (d,))[1].flatten()
            for d in directions
        ]
        J = torch.stack(products)
        b = torch.stack([sum((gradient[n] * d).sum() for n, d in one.items()) for one in directions])  # type: ignore[misc]
        falls.append(float(b @ torch.linalg.solve(2 * J @ J.mT / y.numel(), b)) / 2)
    return falls


@pytest.mark.parametrize("choice", [0, 1])
def test_trials_promise_what_dense_curvature_says(choice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does the step that is taken, without being measured again."""
    told: list[tuple[list[float], list[float]]] = []

    def promised(multiplier: LossMultiplier, course: Course, naturals: list[Direction]) -> tuple[list[float], Tensor]:
        falls, M = PROMISED(multiplier, course, naturals)
        told.append((falls, dense_falls(optimizer.preconditioner.model, course, naturals)))
        return [float(i == choice) for i in range(len(falls))], M

    monkeypatch.setattr(stiffness, "promised", promised)
    original, firsts = LocalModel.curvature, []

    def curvature(local: LocalModel, directions: Sequence[dict[str, Tensor]], is_first: bool = False) -> Tensor:
        firsts.append(is_first)
        return original(local, directions, is_first)

    monkeypatch.setattr(LocalModel, "curvature", curvature)
    optimizer = natgrad.KFAC(network(), "mse")
    for _ in range(trust.PATIENCE):
        train(optimizer, 1)
        falls, expected = told[-1]
        assert falls == pytest.approx(expected, rel=1e-8)
        step = optimizer.diagnostics()
        assert step["halvings"] == 0
        assert step["predicted_change"] == pytest.approx(-expected[choice], rel=1e-8)
    assert firsts == [True, False, False]  # no trial is taken for the previous step
    assert len(told[1][0]) == 2 + choice
    assert not Undeclared(trust_of(optimizer).state).is_found


@pytest.mark.parametrize(("fall", "stiffening"), [(1 + BETTER / 2, 1.0), (1 + 2 * BETTER, STEP)])
def test_rounding_makes_no_trial_better(fall: float, stiffening: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where G is a multiple of I all trials go the same way, and the losses multiplied by a number must do the same."""

    def promised(multiplier: LossMultiplier, course: Course, naturals: list[Direction]) -> tuple[list[float], Tensor]:
        return [1.0, fall], PROMISED(multiplier, course, naturals)[1]

    monkeypatch.setattr(stiffness, "promised", promised)
    optimizer = natgrad.KFAC(network(), "mse")
    train(optimizer, 1)
    assert optimizer.diagnostics()["stiffening"] == stiffening


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
@pytest.mark.parametrize("choice", [0, 1])
def test_the_best_is_taken_and_stays_in_place(inverse: str, choice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step goes along it, and so do those that follow by the same inverses."""
    scripted(monkeypatch, choice)
    factor = [1.0, STEP][choice]
    optimizer = natgrad.KFAC(network(), "mse", inverse=inverse, inverse_period=9)
    train(optimizer, 1)
    pre, told = optimizer.preconditioner, optimizer.diagnostics()
    assert told["stiffening"] == factor
    by_hand = natgrad.KFAC(network(), "mse", inverse=inverse, inverse_period=9)
    scripted(monkeypatch)
    train(by_hand, 1)
    for layer in pre.layers:
        state, g = pre.states()[layer.name], f"damping_g/{layer.name}"
        assert told[g] == pytest.approx(factor * by_hand.diagnostics()[g])
        A, G = (state[k] + told[f"damping_{k.lower()}/{layer.name}"] * torch.eye(len(state[k])) for k in "AG")
        V = torch.randn(len(G), len(A), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected = torch.linalg.inv(G) @ V @ torch.linalg.inv(A)
        assert relative_error(pre.metric.inverse.solve(state, V), expected) < 1e-8
        step = layer.to_matrix([optimizer.state[p]["velocity"] for p in layer.parameters])
        gradient = layer.to_matrix([p.grad for p in layer.parameters if p.grad is not None])
        assert relative_error(step, -told["lr"] * torch.linalg.inv(G) @ gradient @ torch.linalg.inv(A)) < 1e-8


def test_it_goes_up_and_down_between_bounds_until_it_was_refused_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = scripted(monkeypatch, 1, 1, 1, 0, 1)
    optimizer = natgrad.KFAC(network(), "mse", inverse_period=1, curvature_period=1)
    seen = []
    for _ in range(5 + trust.PATIENCE + 2):
        train(optimizer, 1)
        seen.append(optimizer.diagnostics()["stiffening"])
    # Heavier or not; at 10 heavier or lighter; at the bound lighter or not.
    assert seen == [STEP, MOST, STEP, STEP, MOST, *[MOST] * (trust.PATIENCE + 2)]
    assert tried == [2, 3, 2, 3, 3, *[2] * (trust.PATIENCE + 2)]
    scripted(monkeypatch, 1)
    optimizer = natgrad.KFAC(network(), "mse", inverse_period=1, curvature_period=1)
    train(optimizer, 1)
    scripted(monkeypatch, 2)  # lighter again
    train(optimizer, 1)
    tried = scripted(monkeypatch)
    train(optimizer, trust.PATIENCE + 3)
    assert optimizer.diagnostics()["stiffening"] == 1
    assert tried == [2] * trust.PATIENCE


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.1}, {"momentum": 0.5}, {"damping": (1.0, 1.0)}, {"params": "uneven"}, {"inverse_period": 2}],
    ids=str,
)
def test_what_is_given_is_not_tried(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything between two refreshes of the inverses."""
    model, tried = network(), scripted(monkeypatch)
    if "params" in options:
        options = {"params": [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]}
    train(natgrad.KFAC(model, "mse", **options), 2)
    assert tried == ([2] if "inverse_period" in options else [])


def test_nothing_is_tried_where_part_of_the_loss_was_not_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = scripted(monkeypatch)
    monkeypatch.setattr(Undeclared, "is_found", True)
    train(natgrad.KFAC(network(), "mse"), 1)
    assert tried == []


def test_nothing_is_tried_where_gradients_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = scripted(monkeypatch)
    optimizer = natgrad.KFAC(network(), "mse")
    train(optimizer, trust.FIRST_STEPS)
    trials, record = len(tried), trust_of(optimizer)
    record.found(1.0, is_refusal=False)  # still open
    record.witness(0.0)
    train(optimizer, 1)
    assert optimizer.diagnostics()["averaging"] == 1
    assert len(tried) == trials


def test_directions_that_are_not_finite_promise_nothing() -> None:
    M, b = torch.eye(2), torch.tensor([-1.0, 0.0])
    assert stiffness._fall(M, b, [0, 1]) == pytest.approx(0.5)
    assert stiffness._fall(M, -b, [0, 1]) == 0.0  # uphill
    assert stiffness._fall(torch.nan * M, b, [0, 1]) == stiffness._fall(M, torch.inf * b, [0, 1]) == 0.0


def test_no_trial_is_left_in_place_by_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may be short, and a user may interrupt: damping was ten times what was settled, until the next refresh."""
    optimizer = natgrad.KFAC(network(), "mse")

    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stiffness, "promised", fails)
    with pytest.raises(torch.OutOfMemoryError):
        train(optimizer, 1)
    pre = optimizer.preconditioner
    for layer in pre.layers:
        state, applied = pre.states()[layer.name], pre.metric.applied[layer.name]
        made = pre.metric.inverse.factorize(state["A"], state["G"], applied.damping)
        assert torch.equal(state["G_inverse"], made["G_inverse"])
        curvature = mean_curvature([one["G"] for one in pre.states().values()])
        assert float(applied.damping.g) == pytest.approx(STIFFNESS * curvature)
