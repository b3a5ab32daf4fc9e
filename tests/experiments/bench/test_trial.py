"""The clock, the evaluations, failures and turns, on a workload whose steps take one second of a test's clock."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from natgrad.experiments.bench.contestants import Contestant, NotApplicableError
from natgrad.experiments.bench.trial import GROWTH, SHARE, Trial, race
from natgrad.experiments.bench.workload import Workload

Line = Callable[..., Workload]


def sgd(model: nn.Module, workload: Workload, lr: float = 0.1) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=lr)]


def start(workload: Workload, build: Callable[..., list[torch.optim.Optimizer]] = sgd, **settings: object) -> Trial:
    return Trial(Contestant("c", "c", {}, build), settings, workload, seed=1, seconds=workload.seconds)


def test_seconds_are_of_training_alone(line: Line) -> None:
    trial = start(line(seconds=30.0))
    race([trial])
    outcome = trial.outcome
    assert outcome.total_steps == 30
    assert outcome.seconds == [float(step) for step in outcome.steps]
    assert outcome.steps[:20] == list(range(20))
    assert outcome.train_loss[0] is None
    # Gradient descent on w² with rate 0.1: the loss falls by 0.8² a step, and an evaluation is of the weight after it.
    assert outcome.values["loss"][:3] == pytest.approx([4.0, 4.0 * 0.64, 4.0 * 0.64**2], rel=1e-4)
    assert outcome.train_loss[1:3] == pytest.approx([4.0, 4.0 * 0.64], rel=1e-4)


def test_evaluations_are_dense_enough_and_no_denser(line: Line) -> None:
    trial = start(line(seconds=2_000.0), lr=0.0)
    race([trial])
    seconds = trial.outcome.seconds
    assert (seconds[0], seconds[-1]) == (0.0, 2_000.0)
    for earlier, later in itertools.pairwise(seconds):
        due = max(earlier * GROWTH, earlier + SHARE * 2_000.0)
        assert later == pytest.approx(due, abs=1.0) or later == seconds[-1]


def test_decay_falls_linearly_to_zero(line: Line) -> None:
    trial = start(line(seconds=4.0), lr=0.8, decay=True)
    rates = []
    while not trial.is_finished:
        trial.advance()
        rates.append(trial.optimizers[0].param_groups[0]["lr"])
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_a_failure_ends_its_own_trial_alone(line: Line) -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            raise ArithmeticError("singular\nmatrix")

    broken = start(line(), lambda model, workload: [Broken(model.parameters())])
    healthy = start(line())
    race([broken, healthy])
    assert broken.outcome.failure == "ArithmeticError: singular"
    assert broken.outcome.values["loss"] == [4.0]
    assert healthy.outcome.total_steps == 30


def test_divergence_ends_a_trial(line: Line) -> None:
    trial = start(line(seconds=1e6), lr=1e8)
    race([trial])
    assert trial.outcome.failure == "diverged"
    assert trial.outcome.best == 4.0
    assert trial.outcome.total_steps < 100


def test_what_does_not_apply_takes_no_step(line: Line) -> None:
    def refuse(model: nn.Module, workload: Workload) -> list[torch.optim.Optimizer]:
        raise NotApplicableError("no matrix")

    trial = start(line(), refuse)
    race([trial])
    assert trial.outcome.failure == "does not apply: no matrix"
    assert trial.outcome.best == float("inf")


def test_next_is_who_has_trained_for_the_shortest_time(line: Line) -> None:
    order: list[str] = []

    class Counted(Trial):
        def advance(self) -> None:
            order.append(self.outcome.contestant)
            super().advance()
            self.elapsed += 2.0 * (self.outcome.contestant == "heavy")

    limit = 6.0
    race([Counted(Contestant(name, name, {}, sgd), {}, line(), 1, limit) for name in ("light", "heavy")])
    assert order == ["light", "heavy", "light", "light", "light", "heavy", "light", "light"]
