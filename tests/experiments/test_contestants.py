import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch

from natgrad.experiments import contestants as module
from natgrad.experiments.autoencoder import Problem
from natgrad.experiments.contestants import CONTESTANTS, LABELS, Contestant
from natgrad.experiments.settings import Settings, SettingsError

# First losses of the original run of 2017. K-FAC's samples are from another stream, so its losses only come close.
FIRST_LOSSES = [("adam", [97.54, 60.82, 41.35], 0.006), ("kfac-sgd", [97.54, 62.4, 44.9, 79.1], 1.5)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "losses", "tolerance"), FIRST_LOSSES)
def test_first_losses_at_full_size_are_the_articles(name, losses, tolerance):
    """The learning rates, the update, and for K-FAC its damping, freshness and sampling."""
    contestant = Contestant(name, Problem(Settings(eval_every=100)))
    assert [contestant.advance().train_loss for _ in losses] == pytest.approx(losses, abs=tolerance)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_learns_and_reports(name, tiny):
    problem = Problem(tiny())
    contestant = Contestant(name, problem)
    records = [contestant.advance() for _ in range(4)]
    assert records[-1].train_loss < records[0].train_loss
    assert [r.step for r in records] == [0, 1, 2, 3]
    assert records[0].seconds == 0
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(records))
    for record in records:
        json.dumps(asdict(record), allow_nan=False)
        assert bool(record.diagnostics) is name.startswith("kfac")
    assert LABELS[name]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_2017_contestants_step_along_another_gradient_than_the_optimizer_alone(name, tiny):
    problem = Problem(tiny())
    alone, preconditioned = Contestant(name, problem), Contestant(f"kfac-{name}", problem)
    assert alone.advance().train_loss == preconditioned.advance().train_loss
    assert alone.advance().train_loss != preconditioned.advance().train_loss


@pytest.mark.parametrize("name", CONTESTANTS)
def test_its_state_can_be_loaded_without_trusting_the_file(name, tiny, tmp_path):
    contestant = Contestant(name, Problem(tiny()))
    contestant.advance()
    torch.save(contestant.state_dict(), tmp_path / "state.pt")
    restored = Contestant(name, Problem(tiny()))
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (restored.step, restored.seconds) == (1, contestant.seconds)
    assert restored.advance().train_loss == contestant.advance().train_loss


def test_both_losses_are_those_of_the_same_parameters(tiny):
    problem = Problem(tiny())
    problem.test = problem.train
    contestant = Contestant("sgd", problem)
    for _ in range(3):
        record = contestant.advance()
        assert record.test_loss == pytest.approx(record.train_loss, rel=1e-6)


def test_evaluation_is_not_training_time(tiny, monkeypatch):
    clock = iter(range(1, 1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    problem = Problem(tiny())
    evaluate = problem.test_loss
    # Each look at the clock lets a second pass; an evaluation looks a hundred times.
    monkeypatch.setattr(problem, "test_loss", lambda model: evaluate(model) + 0 * sum(next(clock) for _ in range(100)))
    contestant = Contestant("sgd", problem)
    assert [contestant.advance().seconds for _ in range(3)] == [0, 1, 2]


def test_the_test_loss_is_measured_when_due(tiny):
    contestant = Contestant("sgd", Problem(tiny(eval_every=2)))
    assert [contestant.advance().test_loss is not None for _ in range(5)] == [True, False, True, False, True]


def test_a_loss_that_is_not_finite_ends_the_race_for_a_contestant(tiny, monkeypatch):
    monkeypatch.setitem(
        CONTESTANTS, "sgd", lambda model, settings: module.Method(torch.optim.SGD(model.parameters(), lr=math.inf))
    )
    contestant = Contestant("sgd", Problem(tiny()))
    contestant.advance()
    assert not contestant.diverged
    record = contestant.advance()
    assert contestant.diverged
    assert (record.train_loss, record.test_loss) == (None, None)


@pytest.mark.parametrize(
    ("name", "nonlinearity", "rate"),
    [
        ("sgd", "sigmoid", 0.2),
        ("sgd", "relu", 0.02),
        ("adam", "sigmoid", 1e-3),
        ("adam", "relu", 1e-4),
        ("kfac-sgd", "relu", 0.02),
        ("kfac-adam", "sigmoid", 1e-3),
    ],
)
def test_learning_rates_are_the_articles(name, nonlinearity, rate):
    method = CONTESTANTS[name](torch.nn.Linear(2, 2), Settings(nonlinearity=nonlinearity))
    assert method.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_an_unknown_name_lists_the_registry(tiny):
    with pytest.raises(
        SettingsError, match="unknown optimizer 'adamw': choose from sgd, adam, kfac-sgd, kfac-adam, kfac"
    ):
        Contestant("adamw", Problem(tiny()))
