"""How far to go where batches are mostly noise: against dense curvature, and on problems that are all noise or none."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from kfac_cases import assert_same, values
from natgrad import rates, trust
from natgrad.averaging import DECAY, EVERY, SHORTEST_WINDOW, Pace, Progress
from natgrad.factors import AVERAGED_DECAY
from natgrad.multiplier import LossMultiplier
from natgrad.trust import Evidence, Trust
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
KINDS = {"mse": mse_loss, "cross_entropy": cross_entropy}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def noise(kind: str, size: int = 6) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets that have nothing to do with the inputs."""
    generator = torch.Generator().manual_seed(0)
    while True:
        x, y = (torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (3, 2))
        yield x, y.argmax(1) if kind == "cross_entropy" else y


def backward(optimizer: natgrad.KFAC, kind: str, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = KINDS[kind](optimizer.preconditioner.model(x), y)
    loss.backward()
    return loss.item()


def curvature(
    model: nn.Module, direction: dict[nn.Parameter, Tensor], loss: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """DᵀFD with the Gauss-Newton matrix of the whole network, by double differentiation."""
    plain = network()
    plain.load_state_dict(model.state_dict())
    tangent = {name: direction[p] for name, p in model.named_parameters()}
    at = {name: p.detach() for name, p in plain.named_parameters()}
    z, JD = torch.func.jvp(lambda theta: torch.func.functional_call(plain, theta, x), (at,), (tangent,))
    return torch.sum(JD * torch.autograd.functional.hvp(loss, z, JD)[1])


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def trained(kind: str, **options: Any) -> tuple[natgrad.KFAC, Iterator[tuple[Tensor, Tensor]]]:
    """On noise, until gradients are averaged from the next step on; no batch refutes the step before it."""
    optimizer, data = natgrad.KFAC(network(), kind, **options), noise(kind)
    while optimizer.preconditioner.steps < trust.FIRST_STEPS:
        backward(optimizer, kind, *next(data))
        optimizer.step()
        first = optimizer.state[optimizer.preconditioner.layers[0].parameters[0]]
        if "promise" in first:
            first["promise"][2] = torch.finfo(torch.float32).max
        first["evidence"] = torch.tensor(Evidence(Trust(first).confirmed))
    if "promise" in first:
        first["promise"][:2] = 0.0
    first["evidence"] = torch.tensor(Evidence(confirmed=0.1))
    return optimizer, data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_the_step_minimizes_the_dense_quadratic_model_along_the_average(kind: str, rate: float) -> None:
    """Measured at the first step; at the second the average is another, and the pace is the same.

    Catches the batch's own gradient in place of the average, in the direction or in its slope; and the other way round
    in what the next batch is to confirm, the fall of the loss on this one.
    """
    optimizer, data = trained(kind, damping=(0.3, 0.3), curvature_period=100, inverse_period=100)
    model = optimizer.preconditioner.model
    optimizer.param_groups[0]["lr"] = rate
    parameters, average, pace = list(model.parameters()), torch.zeros(len(flat(model.parameters()))), None
    for number in range(2):
        x, y = next(data)
        backward(optimizer, kind, x, y)
        g = flat(p.grad for p in parameters)
        average = DECAY * average + (1 - DECAY) * g
        u = DECAY * average + (1 - DECAY) * g
        ahead = dict(zip(parameters, u.split([p.numel() for p in parameters]), strict=True))
        directions = optimizer.preconditioner.directions(lambda p, of=ahead: of[p].view_as(p))
        D = flat(directions[p] for p in parameters)
        if pace is None:
            pace = curvature(model, directions, lambda z, y=y: KINDS[kind](z, y), x) / (u @ D)
        fresh = min(float(g @ D / (u @ D)), 1.0)
        before = flat(parameters)
        optimizer.step()
        told = optimizer.diagnostics()
        assert told["averaging"] == 1
        expected = rate * max(fresh, 0.0) / pace / 2 ** (told["halvings"] if number == 0 else 0)
        assert told["lr"] == pytest.approx(float(expected), rel=1e-6)
        assert relative_error(flat(parameters) - before, -expected * D) < 1e-6
        promised = expected**2 / 2 * pace * (u @ D) - expected * g @ D
        assert Pace(optimizer.state[parameters[0]]).promised == pytest.approx(float(promised), rel=1e-5)
        optimizer.state[parameters[0]]["latest"][3] = -1e9  # whatever is left of the slope, it does not lag


def test_an_average_is_followed_as_far_as_the_batch_agrees() -> None:
    """One that is as long as 4.24 gradients of this batch, and like them otherwise, is out of date."""
    optimizer, data = trained("mse", damping=(0.3, 0.3), curvature_period=100, inverse_period=100)
    backward(optimizer, "mse", *next(data))
    parameters = list(optimizer.preconditioner.model.parameters())
    for p in parameters:
        optimizer.state[p]["average"] = 5 * p.grad
    optimizer.step()
    longer = DECAY * (DECAY * 5 + 1 - DECAY) + 1 - DECAY
    rate = Pace(optimizer.state[parameters[0]]).rate
    assert optimizer.diagnostics()["lr"] == pytest.approx(rate / longer, rel=1e-6)


def test_a_batch_that_is_asked_for_its_slope_is_no_witness() -> None:
    """Those that go on falling are asked more often, so that they would confirm too much."""
    optimizer, data = trained("mse", curvature_period=100, inverse_period=100)
    first = optimizer.state[optimizer.preconditioner.layers[0].parameters[0]]
    for number in range(EVERY + 2):
        if number:
            first["latest"][3] = 1e9  # the slope before the latest step: whatever is left is steeper
        first["progress"] = torch.tensor(Progress(before=1.0))  # or the step might be refuted
        backward(optimizer, "mse", *next(data))
        confirmed, measured = Trust(first).confirmed, first["latest"][0].clone() if number else None
        optimizer.step()
        assert optimizer.diagnostics()["averaging"] == 1
        assert first["latest"][0] != measured
        assert (Trust(first).confirmed != confirmed) == (number in (0, EVERY))


def test_an_average_that_leads_uphill_starts_anew() -> None:
    optimizer, data = trained("mse")
    x, y = next(data)
    backward(optimizer, "mse", x, y)
    averages = {p: -1e3 * p.grad for p in optimizer.preconditioner.model.parameters()}
    for p, average in averages.items():
        optimizer.state[p]["average"] = average
    before = flat(averages)
    optimizer.step()
    assert optimizer.diagnostics()["lr"] == 0
    assert torch.equal(flat(averages), before)
    assert not any(optimizer.state[p]["average"].any() for p in averages)
    backward(optimizer, "mse", x, y)
    optimizer.step()
    assert optimizer.diagnostics()["lr"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_averaged_where_targets_are_noise_and_only_there(kind: str) -> None:
    """Noise, and then the same batch again and again, which confirms everything."""
    optimizer, data = natgrad.KFAC(network(), kind), noise(kind, 32)
    same, averaging = next(data), []
    for step in range(120):
        backward(optimizer, kind, *(next(data) if step < 40 else same))
        optimizer.step()
        averaging.append(optimizer.diagnostics()["averaging"])
    assert not any(averaging[: trust.FIRST_STEPS])
    assert averaging[39] == 1
    assert 0 in averaging[40:]


def test_steps_along_an_average_of_few_batches_may_be_refuted() -> None:
    """Until the first window is over. Catches 8,000 words that went from 8.4 to 23 while nobody looked."""
    optimizer, data = natgrad.KFAC(network(), "mse"), noise("mse", 32)
    weight, looks = next(optimizer.preconditioner.model.parameters()), []
    while len(looks) < 2 * SHORTEST_WINDOW:
        backward(optimizer, "mse", *next(data))
        optimizer.step()
        first = optimizer.state[weight]
        if optimizer.diagnostics()["averaging"] and first["promise"][2] >= 0:
            looks.append(bool(first["promise"][2] < torch.finfo(torch.float32).max))
            assert looks[-1] is (first["progress"][3].item() == 0)
    assert looks[0]
    assert not looks[-1]


def test_factors_are_averaged_with_the_gradients() -> None:
    """Six rows determine them, so that they would be those of the latest batch alone."""
    optimizer, data = trained("mse", curvature_period=1)
    state = optimizer.state[optimizer.preconditioner.layers[0].parameters[0]]
    before, age = state["A"].clone(), state["age"].item()
    x, y = next(data)
    backward(optimizer, "mse", x, y)
    optimizer.step()
    rows = torch.cat([x, torch.ones(6, 1)], dim=1)
    total = AVERAGED_DECAY * age + 1
    torch.testing.assert_close(state["A"], (AVERAGED_DECAY * age * before + rows.T @ rows / 6) / total)


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}], ids=str)
def test_a_given_number_is_not_averaged_away(options: dict[str, Any]) -> None:
    optimizer, data = trained("mse", **options)
    for _ in range(3):
        backward(optimizer, "mse", *next(data))
        optimizer.step()
    assert optimizer.diagnostics().get("averaging", 0) == 0
    assert not any("average" in kept for kept in optimizer.state.values())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).tanh()
        return self.one(h), self.other(h)


def test_a_loss_that_natgrad_does_not_know_is_told_of() -> None:
    """Catches training that stands still and says nothing."""
    torch.manual_seed(0)
    model, x, y = TwoHeads(), torch.randn(8, 3), torch.arange(8) % 2
    optimizer = natgrad.KFAC(model, "cross_entropy", output=lambda outputs: outputs[0])

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            one, other = model(x)
            (cross_entropy(one, y) + 30 * cross_entropy(other, 1 - y)).backward()
            optimizer.step()

    with pytest.warns(RuntimeWarning, match=r"the loop's loss has terms that.*sum over several outputs") as warned:
        train(8)
    assert len(warned) == 1


@pytest.mark.parametrize("predicted", [-1.0 / 256, math.nan])
def test_training_that_stands_still_is_told_of(predicted: float) -> None:
    """Once; and also where nothing can be predicted."""
    refusals = rates.Refusals()
    told = {"predicted_change": predicted, "halvings": 8.0}
    for _ in range(rates.REFUSED - 1):
        refusals.note(0.0, told, 1.0)
    with pytest.warns(RuntimeWarning, match=r"5 steps in a row were not taken.*large penalty"):
        refusals.note(0.0, told, 1.0)
    for alpha in (0.0, 0.1, *[0.0] * rates.REFUSED):
        refusals.note(alpha, told, 1.0)


def test_a_network_without_curvature_is_told_of_where_there_is_an_error() -> None:
    """No step is promised there, and so none was refused: parameters stood for ever without a word."""
    told = {"predicted_change": 0.0, "halvings": 0.0}
    for least, is_told in [(1.0, True), (1e-4, False)]:
        refusals = rates.Refusals(most_error=1.0)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(rates.REFUSED):
                refusals.note(0.0, told, least)
        assert any("the output is saturated" in str(one.message) for one in seen) is is_told


def test_steps_refused_where_all_is_learnt_are_none_of_the_users_concern() -> None:
    """Nor are single ones, or some that others interrupt."""
    refusals = rates.Refusals()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for alpha, predicted in [(0.1, -1.0), *[(0.0, -1e-3 / 2**8)] * 9, *[(0.0, -1.0), (0.2, -1.0)] * 9]:
            refusals.note(alpha, {"predicted_change": predicted, "halvings": 0.0 if alpha else 8.0}, 1.0)
        refusals.note(0.1, {}, 1.0)  # not tried


def test_steps_on_noise_become_shorter() -> None:
    """A random walk would lead away from the best constant, at any distance from it; 1 is the loss of the mean."""
    optimizer, data = natgrad.KFAC(network(), "mse"), noise("mse", 32)
    losses = []
    for _ in range(300):
        losses.append(backward(optimizer, "mse", *next(data)))
        optimizer.step()
    assert optimizer.diagnostics()["shortening"] < 0.2
    assert sum(losses[-50:]) / 50 < 1.1


def test_an_error_that_explodes_makes_steps_refutable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looked back at steps after the first window, and a loss of distances went to 10²⁸."""
    optimizer, data = natgrad.KFAC(network(), "mse"), noise("mse", 32)
    told, promise = list[bool](), LossMultiplier.promise

    def noted(self: LossMultiplier, slope: float, bend: float, evident: bool = True) -> None:
        told.append(evident)
        promise(self, slope, bend, evident)

    monkeypatch.setattr(LossMultiplier, "promise", noted)
    for scale in (*[1.0] * 60, 5.0):
        x, y = next(data)
        backward(optimizer, "mse", x, scale * y)
        optimizer.step()
    assert told[-2:] == [False, True]


def test_errors_are_compared_with_the_window_before() -> None:
    pace = Pace({"progress": torch.tensor(Progress(before=2.0)), "step": torch.zeros(())})
    assert not pace.has_lost(19.0)
    assert pace.has_lost(21.0)
    for error in (21.0, 21.0, 21.0, 201.0):
        assert not pace.diverges(201.0)
        pace.note(error, 0.0, of_residuals=True, noisy=False)
    assert not pace.diverges(199.0)
    assert pace.diverges(201.0)
    pace.note(19.0, 0.0, of_residuals=True, noisy=False)  # the others were those of outliers
    assert not pace.diverges(201.0)
    first = Pace({"progress": torch.tensor(Progress())})
    assert not first.has_lost(1e9)
    assert not first.diverges(1e9)


@pytest.mark.parametrize("onset", range(20, 40))
def test_an_error_that_stays_a_thousandfold_is_seen_whenever_it_begins(onset: int) -> None:
    """Also where the window ends soon, whose mean had the new errors in it then."""
    pace = Pace({"progress": torch.tensor(Progress()), "step": torch.tensor(0.0)})
    seen = 0
    for step in range(onset + 10):
        pace.state["step"] += 1
        error = 1000.0 if step >= onset else 1.0
        pace.note(error, 0.0, of_residuals=True, noisy=False)
        seen += pace.diverges(error)
        assert step > onset + 2 or not seen
    assert seen


def test_an_error_that_grows_a_hundredfold_is_told_of() -> None:
    rates._tell_of_divergence.cache_clear()
    optimizer, data, numbers = natgrad.KFAC(network(), "mse"), noise("mse", 32), list[int]()
    for _ in range(60):
        backward(optimizer, "mse", *next(data))
        optimizer.step()
    with warnings.catch_warnings(record=True, action="always") as told:
        for growth in range(16):
            x, y = next(data)
            backward(optimizer, "mse", x, 3.0**growth * y)
            optimizer.step()
            numbers.append(len(told))
    assert numbers[:4] == [0, 0, 0, 0]
    assert numbers[-1] == 1
    assert "more than ten times as long as it was" in str(told[0].message)


@pytest.mark.parametrize("interrupted", [3, 4])
def test_an_interrupted_run_of_averages_is_bitwise_an_uninterrupted_one(interrupted: int) -> None:
    """Catches a window, a pace or an average that starts anew."""
    whole, data = trained("mse", inverse_period=5)
    for _ in range(interrupted):
        backward(whole, "mse", *next(data))
        whole.step()
    resumed = natgrad.KFAC(network(), "mse", inverse_period=5)
    resumed.preconditioner.model.load_state_dict(whole.preconditioner.model.state_dict())
    resumed.load_state_dict(whole.state_dict())
    for _ in range(12):
        x, y = next(data)
        for optimizer in (whole, resumed):
            backward(optimizer, "mse", x, y)
            optimizer.step()
        assert_same(values(resumed), values(whole))
    assert whole.diagnostics()["averaging"] == 1
