"""How damping is eased by what the steps have shown."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from natgrad import trust
from natgrad.trust import Ease, Evidence, Trust

FAIR, POOR = (2 * trust.FAIR_RATE, 2 * trust.FAIR_SHARE), (trust.POOR_RATE / 2, trust.POOR_SHARE / 2)


def settled(start: float, rates: list[float], share: float, averaged: bool = False) -> float:
    ease = Ease(averaged=True, averaged_factor=start) if averaged else Ease(start)
    kept = Trust({"ease": torch.tensor(ease), "evidence": torch.tensor(Evidence(confirmed=share))})
    for rate in rates:
        kept.chose(rate, averaged)
    kept.settle(averaged)
    return kept.ease


@pytest.mark.parametrize(
    ("rate", "share", "factor"),
    [
        (FAIR[0], FAIR[1], trust.EASIER),
        (POOR[0], FAIR[1], trust.HARDER),
        (FAIR[0], POOR[1], trust.HARDER),
        (0.05, FAIR[1], 1.0),
        (FAIR[0], 0.15, 1.0),
    ],
)
def test_damping_is_eased_where_rate_and_share_are_fair_and_not_where_either_is_poor(
    rate: float, share: float, factor: float
) -> None:
    assert settled(0.125, [rate], share) == pytest.approx(0.125 * factor)
    gentler = {trust.EASIER: trust.AVERAGED_EASIER, trust.HARDER: trust.AVERAGED_HARDER, 1.0: 1.0}[factor]
    assert settled(0.125, [rate], share, averaged=True) == pytest.approx(0.125 * gentler)


def test_dampings_of_averaged_gradients_and_of_others_are_eased_apart() -> None:
    """By steps of their own kind: those along averages with the inverses of before tell nothing of either."""
    kept = Trust({"evidence": torch.tensor(Evidence(confirmed=FAIR[1]))})
    kept.chose(FAIR[0], averaged=False)
    kept.chose(POOR[0] ** 4, averaged=True)
    kept.settle(averaged=True)
    assert kept.ease == 1.0
    kept.chose(POOR[0] ** 4, averaged=False)
    kept.chose(FAIR[0], averaged=True)
    kept.settle(averaged=False)
    assert kept.ease == trust.EASIER
    kept.settle(averaged=True)
    assert kept.ease == pytest.approx(trust.AVERAGED_EASIER)


def test_the_rate_is_the_geometric_mean_since_the_last_time() -> None:
    """An arithmetic one would be fair; and rates are forgotten once they were judged."""
    assert settled(0.125, [1.0, 1e-3], FAIR[1]) == 0.125
    kept = Trust({"evidence": torch.tensor(Evidence(confirmed=FAIR[1]))})
    kept.chose(FAIR[0], averaged=False)
    for _ in range(3):
        kept.settle(averaged=False)
    assert kept.ease == trust.EASIER


def test_the_ease_has_bounds_and_a_step_that_was_not_taken_counts() -> None:
    assert settled(2 * trust.LEAST, [FAIR[0]], FAIR[1]) == pytest.approx(trust.LEAST)
    assert settled(0.9, [0.0], FAIR[1]) == 1.0
    assert Trust({}).ease == 1.0
    assert Trust({}).confirmed == 0.0


def test_shares_beyond_nothing_and_all_are_these() -> None:
    kept = Trust({})
    kept.confirm(7.0)
    assert kept.confirmed == 1.0
    kept.confirm(-3.0)
    assert kept.confirmed == pytest.approx(trust.DECAY)


def test_what_comes_after_the_inverses_is_not_what_they_were_made_with() -> None:
    """Inverses that a checkpoint lacks are made anew from it, with the share of their own step."""
    kept = Trust({"evidence": torch.tensor(Evidence(confirmed=0.25))})
    kept.settle(averaged=True)
    kept.confirm(1.0)
    kept.chose(FAIR[0], averaged=True)
    assert kept.settled_share == 0.25
    assert kept.settled_average
    assert kept.confirmed == pytest.approx(0.4)
    assert kept.ease == 1.0


def test_gradients_are_averaged_once_little_is_confirmed_and_until_much_is() -> None:
    """Not at the first steps, and not while nothing is known."""
    little, between, much = (
        {"evidence": torch.tensor(Evidence(share))}
        for share in (0.9 * trust.LITTLE, 0.5 * (trust.LITTLE + trust.MUCH), 1.1 * trust.MUCH)
    )
    state = {"step": torch.tensor(float(trust.FIRST_STEPS)), **little}
    assert Trust(state).averages
    assert not Trust({**state, "step": torch.tensor(trust.FIRST_STEPS - 1.0)}).averages
    assert not Trust({"step": state["step"]}).averages
    assert not Trust({**state, **between}).averages
    once = {**state, "latest": torch.zeros(5)}
    assert Trust({**once, **between}).averages
    assert not Trust({**once, **much}).averages


@pytest.mark.parametrize("state", [{}, {"evidence": torch.tensor(Evidence(confirmed=0.9))}])
def test_a_step_too_long_for_a_loss_that_other_data_confirm_asks_for_no_more_of_them(state: dict[str, Tensor]) -> None:
    """It is the loss that is not quadratic so far. Catches a model of four times the cost on a plateau."""
    kept = Trust(state)
    kept.tried(halvings=2, had_all=False)
    assert kept.more == 1.0


def test_a_misjudged_step_asks_for_more_data_and_ever_fewer_then() -> None:
    kept = Trust({"evidence": torch.tensor(Evidence(confirmed=0.1))})
    assert kept.more == 1.0
    kept.tried(halvings=2, had_all=False)
    kept.tried(halvings=1, had_all=False)
    assert kept.more == trust.MORE**2
    kept.tried(halvings=1, had_all=True)
    kept.tried(halvings=0, had_all=False)
    assert kept.more == pytest.approx(trust.MORE**2 * trust.FEWER**2)
    for _ in range(100):
        kept.tried(halvings=0, had_all=False)
    assert kept.more == 1.0


@pytest.mark.parametrize(("share", "eased"), [(0.0, False), (1.0, True)])
def test_linear_regression_eases_its_damping(share: float, eased: bool) -> None:
    """Noise-free, it needs none: catches an ease that nobody applies, or that no step sets. Pure noise does not."""
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    optimizer = natgrad.KFAC(model, "mse")
    for _ in range(8):
        x = torch.randn(64, 8)
        y = share * x[:, :2] + (1 - share) * 10 * torch.randn(64, 2)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    told = optimizer.diagnostics()
    assert (told["ease"] < 0.1) == eased
    assert (told["damping_g"] / told["stiffening"] < 0.05) == eased


@pytest.mark.parametrize(
    ("share", "promised", "change", "factor"),
    [
        (FAIR[1], -1.0, 1.1 * trust.REFUTED, trust.BACK),
        (FAIR[1], -1.0, 0.9 * trust.REFUTED, trust.FORTH),
        (FAIR[1], -1.0, -5.0, trust.FORTH),
        (FAIR[1], 0.0, 9.0, 1.0),
        (POOR[1], -1.0, 1.1 * trust.NOISY_REFUTED, trust.BACK),
        (POOR[1], -1.0, 0.9 * trust.NOISY_REFUTED, trust.NOISY_FORTH),
        (-1.0, -1.0, 1.1 * trust.NOISY_REFUTED, trust.BACK),
        (-1.0, -1.0, -1.0, trust.NOISY_FORTH),
    ],
)
def test_rates_become_smaller_where_a_batch_refutes_what_was_promised(
    share: float, promised: float, change: float, factor: float
) -> None:
    """By its loss rising more than half of what was promised; a step that promised nothing shows nothing.

    Where little of what steps promise is confirmed, or is not known yet, a fifth refutes, and rates recover slowly.
    """
    kept = Trust({"evidence": torch.tensor(Evidence(confirmed=share, caution=0.25))})
    kept.judge(promised, change, lambda: change)
    assert kept.caution == pytest.approx(0.25 * factor)
    new = Trust({})
    new.judge(-1.0, -1.0, lambda: -1.0)
    assert new.caution == 1.0


@pytest.mark.parametrize(("in_fact", "factor"), [(-0.5, trust.FORTH), (0.9, trust.BACK)])
def test_what_the_model_refutes_is_looked_at_in_fact(in_fact: float, factor: float) -> None:
    """And only that. Catches a first step that halves the loss, cut since the model's parabola rises at its end."""
    kept, asked = Trust({"evidence": torch.tensor(Evidence(confirmed=FAIR[1], caution=0.25))}), []

    def look() -> float:
        asked.append(True)
        return in_fact

    kept.judge(-1.0, -0.9, look)
    assert kept.caution == 0.25 * trust.FORTH
    assert not asked
    kept.judge(-1.0, 0.9, look)
    assert kept.caution == 0.25 * trust.FORTH * factor
    assert asked


def test_a_step_that_is_undone_makes_rates_smaller_and_there_is_a_least() -> None:
    state = {"evidence": torch.tensor(Evidence(confirmed=FAIR[1]))}
    assert Trust(state).lets_stand(-1.0, 0.9 * trust.REFUTED)
    assert Trust(state).caution == 1.0
    assert not Trust(state).lets_stand(-1.0, 1.1 * trust.REFUTED)
    assert not Trust({}).lets_stand(-1.0, 1.1 * trust.NOISY_REFUTED)
    assert Trust(state).caution == trust.BACK
    for _ in range(10):
        Trust(state).lets_stand(-1.0, 1.1)
    assert Trust(state).caution == pytest.approx(trust.SLOWEST)


def test_a_rare_class_that_weighs_much_does_not_hold_training_up() -> None:
    """Every batch with one of its data refuted the step before, and rates fell to 1e-8 for a thousand steps."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 100.0]))
    optimizer = natgrad.KFAC(model, loss=loss)
    labels = (torch.rand(2000) < 0.01).long()
    data = torch.randn(2000, 20) + labels[:, None] * torch.linspace(-1, 1, 20)
    cautions = []
    for _ in range(240):
        chosen = torch.randint(2000, (64,))
        optimizer.zero_grad()
        loss(model(data[chosen]), labels[chosen]).backward()
        optimizer.step()
        cautions.append(optimizer.diagnostics(per_layer=False)["caution"])
    with torch.no_grad():
        assert loss(model(data), labels) < 0.6
    assert sum(caution < 0.1 for caution in cautions) < 24


def test_a_batch_that_shows_few_of_many_classes_does_not_lead_away() -> None:
    """Of a thousand, a batch of 64 shows one in sixteen: the loss was at 25 after 60 steps, from 7 at first."""
    torch.manual_seed(0)
    centers = torch.randn(1000, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1000))
    optimizer = natgrad.KFAC(model, loss="cross_entropy")
    labels = torch.randint(1000, (1000,))
    held = centers[labels] + 0.5 * torch.randn(1000, 16)
    for _ in range(60):
        y = torch.randint(1000, (64,))
        optimizer.zero_grad()
        cross_entropy(model(centers[y] + 0.5 * torch.randn(64, 16)), y).backward()
        optimizer.step()
    with torch.no_grad():
        assert cross_entropy(model(held), labels) < 6
    assert optimizer.undone_steps


def test_a_step_that_is_refused_on_some_of_the_data_is_looked_at_on_more() -> None:
    """Batch statistics of an eighth are others: of 100 steps on a full batch 71 were refused for that."""
    kept = Trust({"evidence": torch.tensor(Evidence(confirmed=0.9))})
    kept.tried(halvings=8, had_all=False, refused=True)
    assert kept.more == trust.MANY_MORE
    kept.tried(halvings=8, had_all=True, refused=True)
    assert kept.more == pytest.approx(trust.MANY_MORE * trust.FEWER)

    torch.manual_seed(0)
    x = torch.randn(1024, 6)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3] * x[:, 4]], 1)
    hidden = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()]
    model = nn.Sequential(*hidden, nn.Linear(16, 3))
    optimizer, rates = natgrad.KFAC(model, "mse"), []
    for _ in range(60):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        rates.append(optimizer.diagnostics(per_layer=False)["lr"])
    assert rates.count(0.0) < 10
