"""By what the loop multiplies its loss: found from labels, from the loss module, or from a step that was taken."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from kfac_cases import assert_same, values
from kfac_cases import network as with_adamw
from natgrad import local_model, multiplier, scaler
from natgrad.forward import Forward
from natgrad.likelihoods import Categorical, Gaussian, Likelihood
from natgrad.local_model import Change
from natgrad.multiplier import CERTAIN, EVERY, LossMultiplier
from natgrad.quadratic import HALVINGS
from natgrad.trust import Trust
from natgrad.undeclared import PATIENCE, Found

pytestmark = pytest.mark.usefixtures("float64")
Loss = Callable[[Tensor, Tensor], Tensor]
FACTORS = [1.0, 2.0**10, 2.0**-10]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


# In training.


def network() -> nn.Sequential:
    """Layers only: AdamW's own constant, which is absolute, sees by what a loss is multiplied."""
    return nn.Sequential(*[module for module in with_adamw() if not isinstance(module, nn.PReLU)])


def data(seed: int, count: int = 12) -> tuple[Tensor, Tensor]:
    return random(count, 3, seed=seed), (random(count, seed=100 + seed) > 0).long()


def regression(f: Tensor, y: Tensor) -> Tensor:
    return mse_loss(f, functional.one_hot(y, 2).double())


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": regression}


def steps(optimizer: natgrad.KFAC, loss: Loss, seeds: range, factor: float = 1.0, scaler: Any = None) -> None:
    for seed in seeds:
        x, y = data(seed)
        optimizer.zero_grad()
        value = factor * loss(optimizer.preconditioner.model(x), y)
        if scaler is None:
            value.backward()
            optimizer.step()
        else:
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()


def parameters(optimizer: natgrad.KFAC) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in optimizer.preconditioner.model.named_parameters()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float) -> None:
    assert {name: t for name, t in one.items() if not torch.allclose(t, other[name], rtol=rtol, atol=1e-9)} == {}


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical", "forward"])
@pytest.mark.parametrize("factor", FACTORS)
def test_a_multiplied_loss_of_labels_takes_the_same_steps(factor: float, fisher: Any) -> None:
    """Parameters, factors and weight decay; the empirical Fisher would be off by the square."""
    one, other = (natgrad.KFAC(network(), "cross_entropy", fisher=fisher, weight_decay=1e-3) for _ in range(2))
    steps(one, cross_entropy, range(6))
    steps(other, cross_entropy, range(6), factor)
    assert other.diagnostics()["loss_multiplier"] == pytest.approx(factor)
    assert_close(parameters(other), parameters(one), 1e-5)
    for name, factors in one.preconditioner.factors().items():
        for F, G in zip(factors, other.preconditioner.factors()[name], strict=True):
            assert torch.allclose(F, G, rtol=1e-5)
    assert other.diagnostics()["predicted_change"] == pytest.approx(
        factor * one.diagnostics()["predicted_change"], rel=1e-4
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("factor", [1.0, 64.0])
@pytest.mark.parametrize("growth", [2.0, 64.0])
def test_a_gradient_scaler_changes_nothing(name: str, factor: float, growth: float) -> None:
    """Not even where nothing but the gradients of the parameters tells of it; and it grows twice on the way.

    Catches a previous step that is judged before the scaler is known, and undone.
    """
    one, other = (natgrad.KFAC(network(), name) for _ in range(2))
    steps(one, LOSSES[name], range(2, 10), factor)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_factor=growth, growth_interval=3)
    steps(other, LOSSES[name], range(2, 10), factor, scaler)
    assert scaler.get_scale() == 2.0**12 * growth**2
    assert_close(parameters(other), parameters(one), 1e-9)


def test_a_gradient_scaler_may_come_in_the_middle() -> None:
    """Catches one that is taken for a loss that is multiplied by as much."""
    one, other = (natgrad.KFAC(network(), "cross_entropy") for _ in range(2))
    steps(one, cross_entropy, range(2, 10), 64.0)
    steps(other, cross_entropy, range(2, 6), 64.0)
    steps(other, cross_entropy, range(6, 10), 64.0, torch.amp.GradScaler("cpu", init_scale=2.0**12))
    assert_close(parameters(other), parameters(one), 1e-9)


@pytest.mark.parametrize("scale", [None, 2.0**12])
def test_passes_that_tell_scalers_from_factors_are_rare(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pass of the model at every step of a loop that multiplies its loss."""
    optimizer, passes, slope = natgrad.KFAC(network(), "cross_entropy"), list[int](), local_model.LocalModel.slope

    def counted(local: local_model.LocalModel, direction: dict[str, Tensor]) -> float:
        passes.append(optimizer.preconditioner.steps)
        return slope(local, direction)

    monkeypatch.setattr(local_model.LocalModel, "slope", counted)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    for seed in range(4 * EVERY):  # some steps are undone
        if optimizer.preconditioner.steps <= 2 * EVERY:
            steps(optimizer, cross_entropy, range(seed, seed + 1), 3.0, scaler)
    assert sorted(set(passes)) == [0, EVERY, 2 * EVERY]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("make", [nn.MSELoss, nn.CrossEntropyLoss, lambda: nn.CrossEntropyLoss(label_smoothing=0.2)])
def test_a_module_tells_the_factor_whatever_the_targets(make: Callable[[], nn.Module], factor: float) -> None:
    """In the first step already."""
    loss = make()

    def of(f: Tensor, y: Tensor) -> Tensor:
        return loss(f, functional.one_hot(y, 2).double()) if isinstance(loss, nn.MSELoss) else loss(f, y)

    one, other = (natgrad.KFAC(network(), loss) for _ in range(2))
    steps(one, of, range(4))
    steps(other, of, range(4), factor)
    assert_close(parameters(other), parameters(one), 1e-5)


def test_a_module_called_for_several_targets_counts_with_their_sum() -> None:
    """As in mixup; and a call for something else does not count."""
    loss = nn.CrossEntropyLoss()
    optimizer = natgrad.KFAC(network(), loss)
    x, y = data(0)
    f = optimizer.preconditioner.model(x)
    (0.6 * loss(f, y) + 1.4 * loss(f, 1 - y) + 50 * loss(random(12, 2).requires_grad_(), y)).backward()
    optimizer.step()
    assert optimizer.diagnostics()["loss_multiplier"] == pytest.approx(2.0)


def test_a_given_rate_means_the_gradient_as_it_is() -> None:
    """As for every optimizer with a rate of its own."""
    moves = []
    for factor in (1.0, 4.0):
        optimizer = natgrad.KFAC(network(), "cross_entropy", lr=0.1, momentum=0.0, damping=(0.1, 0.1))
        before = parameters(optimizer)["0.weight"]
        steps(optimizer, cross_entropy, range(1), factor)
        moves.append(parameters(optimizer)["0.weight"] - before)
    assert torch.allclose(moves[1], 4 * moves[0])


# From a step that was taken.


def same_batch(optimizer: natgrad.KFAC, count: int, factor: float) -> None:
    for _ in range(count):
        steps(optimizer, regression, range(1), factor)


@pytest.mark.parametrize("factor", [30.0, 1e3, 2e-2])
def test_a_step_tells_the_factor_of_a_squared_error(factor: float) -> None:
    """Exactly, on the same data, however long the step was and though nothing is linear.

    A factor below one comes by tenths at most, as a short step on other data shows noise.
    """
    optimizer = natgrad.KFAC(network(), "mse")
    before = parameters(optimizer)
    same_batch(optimizer, 2, factor)
    if factor > 1:
        assert optimizer.diagnostics()["undone_steps"] == 1
        assert_close(parameters(optimizer), before, 1e-9)
    same_batch(optimizer, 2, factor)
    assert optimizer.diagnostics()["loss_multiplier"] == pytest.approx(factor, rel=1e-3)
    assert optimizer.diagnostics()["undone_steps"] == (factor > 1)


def test_an_undone_step_leaves_factors_and_momentum_as_if_it_had_not_been() -> None:
    optimizer = natgrad.KFAC(network(), "mse", factor_decay=0.9)
    start = values(optimizer)
    steps(optimizer, regression, range(1), 1e3)
    factors = values(optimizer)
    steps(optimizer, regression, range(1, 2), 1e3)
    after = values(optimizer)
    for name in ("0.weight", "0.bias", "2.weight"):
        assert torch.allclose(after[name], start[name], atol=1e-9)
        assert f"{name}.velocity" not in after
    assert torch.equal(after["0.weight.A"], factors["0.weight.A"])
    assert torch.equal(after["0.weight.step"], factors["0.weight.step"])


def test_a_run_resumed_before_a_step_is_undone_undoes_it_too() -> None:
    one, other = (natgrad.KFAC(network(), "mse") for _ in range(2))
    steps(one, regression, range(1), 1e3)
    other.preconditioner.model.load_state_dict(one.preconditioner.model.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer in (one, other):
        steps(optimizer, regression, range(1, 4), 1e3)
        assert optimizer.undone_steps == 1
    assert_same(values(other), values(one))


@pytest.mark.parametrize("lr", ["auto", 0.1])
def test_parameters_that_overflow_return_to_where_they_were(lr: float | str) -> None:
    """As the check before a step sees some of the data only. A given rate is the user's to answer for."""

    class Explosive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).exp().exp()

    optimizer = natgrad.KFAC(Explosive(), "cross_entropy", lr=lr, momentum="auto")
    before = parameters(optimizer)
    steps(optimizer, cross_entropy, range(1))
    with torch.no_grad():
        for p in optimizer.preconditioner.model.parameters():
            p.add_(1e3)
            optimizer.state[p]["velocity"].add_(1e3)
    steps(optimizer, cross_entropy, range(1, 2))
    if lr == "auto":
        assert_close(parameters(optimizer), before, 1e-9)
        assert optimizer.diagnostics()["undone_steps"] == 1
        assert optimizer.diagnostics()["skipped_steps"] == 0
        steps(optimizer, cross_entropy, range(2, 4))
        assert all(p.isfinite().all() for p in parameters(optimizer).values())
    else:
        assert optimizer.diagnostics()["undone_steps"] == 0
        assert optimizer.diagnostics()["skipped_steps"] == 1


# What fresh data confirm.


def confirmed(optimizer: natgrad.KFAC) -> float:
    return Trust(optimizer.state[next(iter(optimizer.preconditioner.model.parameters()))]).confirmed


def test_a_batch_that_comes_again_confirms_what_was_promised() -> None:
    """Least squares: the promise is kept to rounding. Catches a wrong sign, or the wrong end of the step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = natgrad.KFAC(model, "mse", damping=0.1)
    x, y = random(8, 3), random(8, 2, seed=1)
    for _ in range(3):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    told = optimizer.diagnostics()
    assert confirmed(optimizer) == pytest.approx(1, rel=1e-6)
    assert told["previous_change"] < 0


def test_other_data_confirm_what_they_see_of_it() -> None:
    """By their own loss before and after each step. Catches an average that forgets too fast."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = natgrad.KFAC(model, "mse", damping=0.1, momentum=0.0)
    shares, before = [], copy.deepcopy(model)
    for seed in range(4):
        x = random(20, 3, seed=seed)
        y = x[:, :2] + 0.3 * random(20, 2, seed=10 + seed)
        if seed:
            seen = (mse_loss(model(x), y) - mse_loss(before(x), y)).item()
            shares.append(min(max(seen / optimizer.diagnostics()["actual_change"], 0.0), 1.0))
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    expected = shares[0]
    for share in shares[1:]:
        expected += 0.2 * (share - expected)
    assert 0 < expected < 1
    assert confirmed(optimizer) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("error", "repeated", "expected"),
    [(1e30, False, [False, True]), (1e30, True, [False, False]), (torch.finfo(torch.float32).max, False, [False] * 2)],
    ids=["another batch", "the same batch", "noise"],
)
def test_a_step_is_doubted_where_the_loss_rises_at_its_end(
    error: float, repeated: bool, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By more than the fall of 1 that it promised; though errors have not grown, as those of labels that are missed."""
    doubts = []

    def stands(_: natgrad.KFAC, multiplier: LossMultiplier, finite: bool) -> bool:
        multiplier.state["promise"], multiplier.is_repeated = torch.tensor([-2.0, 2.0, error, 1.0]), repeated
        doubts.append([multiplier.in_doubt(finite, partial(torch.tensor, back)) for back in (0.9, 1.1)])
        return True

    monkeypatch.setattr(natgrad.KFAC, "_stands", stands)
    optimizer = natgrad.KFAC(network(), "cross_entropy")
    optimizer.zero_grad()
    cross_entropy(optimizer.preconditioner.model(random(6, 3)), torch.arange(6) % 2).backward()
    optimizer.step()
    assert doubts == [expected]


@pytest.mark.parametrize("numeric", [True, False])
def test_nothing_is_looked_for_where_nobody_asks(numeric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With numbers for rate and momentum what multiplies the loss makes no difference, and takes half of a step."""
    looks = []
    monkeypatch.setattr(multiplier, "at_least", lambda *given: looks.append(given) or (1.0, True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = natgrad.KFAC(model, "cross_entropy", **({"lr": 0.1, "momentum": 0.9} if numeric else {}))
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(torch.randn(20, 4)), torch.randint(3, (20,))).backward()
        optimizer.step()
    assert bool(looks) is not numeric


def test_steps_that_are_refused_tell_of_a_larger_loss_or_of_another() -> None:
    """Catches terms that were not declared, once they are found, taken for a loss that is multiplied by millions."""
    state: dict[str, Any] = {}
    refused = LossMultiplier(state, lambda **_: pytest.fail("nobody asks"), a_pass(), Gaussian(), 3.0)
    refused.reject()
    refused.reject()
    assert refused.loss == 2.0 ** (2 * HALVINGS)
    state["found"] = torch.tensor(Found(refused=PATIENCE))
    refused.reject()
    assert refused.loss == 1.0


def test_no_loss_is_multiplied_by_any_number() -> None:
    """Refusals told 10²⁶ of a critic, whose loss is linear in its output, and steps had no length for ever."""
    refused = LossMultiplier({}, lambda **_: pytest.fail("nobody asks"), a_pass(), Gaussian(), 3.0)
    told = []
    for _ in range(8):
        refused.reject()
        told.append(refused.loss)
    assert told == [2.0**8, 2.0**16, 2.0**24, *[1.0] * 5]


def a_pass() -> Forward:
    return Forward((), {}, torch.zeros(3, 1), [])


def of(state: dict[str, Any], told: Any, likelihood: Likelihood | None = None) -> LossMultiplier:
    """That of a pass of three data whose local model is ``told``."""
    return LossMultiplier(state, lambda **_: told, a_pass(), likelihood or Gaussian(), 3.0)


class Told:
    """A local model that tells the same change of every step."""

    multiplier = scaler = 1.0
    has_other_statistics = False

    def __init__(self, slope: float, bend: float, spread: float = 0.0, steepening: float = 0.0) -> None:
        self._change, self._spread, self._steepening = Change(slope, bend), spread, steepening

    def change(self, step: object) -> Change:
        return self._change

    def spread(self, step: object) -> float:
        return self._spread

    def steepening(self, step: object) -> float:
        return self._steepening


def test_a_loss_that_does_not_bend_tells_no_multiplier() -> None:
    """It was divided by its bend, and s became 10³⁷."""
    state: dict[str, Any] = {"promise": torch.tensor([-1.0, 0.0, 1.0, 0.0])}
    multiplier = of(state, Told(-2.0, 0.0))
    multiplier.accepts({})
    assert multiplier.loss == 1.0


def test_a_multiplier_that_was_trusted_is_looked_at_again_where_a_step_is_refuted() -> None:
    """One step that told nothing had made it trusted for good, and each that followed was too long and undone."""
    state: dict[str, Any] = {"promise": torch.tensor([-1.0, 1.0, 1.0, 1.0])}
    multiplier = of(state, Told(-10.0, 2.0))
    assert not multiplier.accepts({})
    assert multiplier.loss == pytest.approx((10 + 1) / 2)
    assert multiplier.promised == -0.5


@pytest.mark.parametrize(("steepening", "stands"), [(0.9, True), (1.1, False), (0.0, False)])
def test_a_step_that_a_batch_was_against_from_the_start_is_not_undone(steepening: float, stands: bool) -> None:
    """Batches with an event that is rare were: each undid the step before, and its own gradient was thrown away."""
    state: dict[str, Any] = {"promise": torch.tensor([-1.0, 1.0, 1.0, 1.0])}
    told = Told(-5.0, 0.5, steepening=steepening)
    multiplier = of(state, told, Categorical())
    multiplier.bound = 1.0, True
    assert multiplier.risen_by({}, -1.0) == (0.0 if stands else 4.75)
    assert multiplier.risen_by({}, -100.0) == 4.75  # which refutes nothing
    assert multiplier.accepts({}) is stands
    assert Trust(state).caution == (1.0 if stands else 0.25)


@pytest.mark.parametrize("trusted", [0.0, 1.0])
@pytest.mark.parametrize("spread", [0.83, 0.84])
def test_chance_is_no_multiplier(spread: float, trusted: float) -> None:
    """Each batch that differed much from others made a wrong s of one that had been seen to be right."""
    state: dict[str, Any] = {"promise": torch.tensor([-1.0, 1.0, 1.0, trusted])}
    multiplier = of(state, Told(-10.0, 2.0, spread))
    multiplier.accepts({})
    found = not trusted or spread < (10 + 1 - 3 * 2) / CERTAIN
    assert multiplier.loss == pytest.approx((10 + 1) / 2 if found else 1.0)
    assert float(state["promise"][3]) == (0.0 if found else trusted)  # of chance nothing is learnt


@pytest.mark.parametrize(("bend", "bound", "found"), [(0.1, 0.0, True), (0.1, 0.5, False), (0.6, 0.5, True)])
def test_a_step_cut_short_tells_nothing_where_targets_do(bend: float, bound: float, found: bool) -> None:
    """A loss that is not the declared one, as a symmetric contrastive one, made s 245 at the first step."""
    state: dict[str, Any] = {"promise": torch.tensor([-1.0, bend, 1.0, 0.0])}
    multiplier = of(state, Told(-10.0, 2.0), Categorical())
    multiplier.bound = bound, False
    multiplier.accepts({})
    assert multiplier.loss == pytest.approx((10 + 1) / 2 if found else 1.0)


def test_a_batch_that_is_seen_again_leaves_nothing_to_chance() -> None:
    state: dict[str, Any] = {"promise": torch.tensor([-1.0, 1.0, 1.0, 1.0])}
    told = Told(-10.0, 2.0, math.inf)
    multiplier = of(state, told)
    multiplier.is_repeated = True
    multiplier.accepts({})
    assert multiplier.loss == pytest.approx(5.5)


@pytest.mark.parametrize("s", [7.0, 1.0])
def test_a_scaler_is_looked_for_now_and_then(s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a pass of the model. Catches a look at every step, where steps alone tell the multiplier."""
    seen: list[float] = []
    monkeypatch.setattr(scaler, "compared", lambda *_: seen.append(1.0) or 1.0)
    state: dict[str, Any] = {
        "promise": torch.tensor([-1.0, 1.0, 1.0, 1.0]),
        "multiplier": torch.tensor([s, 1.0]),
        "step": torch.tensor(1.0),
    }
    of(state, Told(-10.0, 2.0)).update({}, evaluate=True)
    assert seen == []
    state["step"] = torch.tensor(16.0)
    of(state, Told(-10.0, 2.0)).update({}, evaluate=True)
    assert len(seen) == (s != 1)
