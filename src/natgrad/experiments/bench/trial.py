"""One contestant at work on one workload, with its own clock, and several of them taking turns.

The clock runs from `zero_grad` to the end of `step`: forward, backward, update, inverses, compilation. Drawing the
batch and evaluating are not training. The model is evaluated before the first step, after the last, and in between
whenever the time has grown by 5%, but at most every half percent of the limit: a time to target is known to 5%.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.optim import Optimizer

from natgrad.experiments.bench.contestants import Contestant, NotApplicableError
from natgrad.experiments.bench.workload import Workload

GROWTH, SHARE = 1.05, 0.005


@dataclass
class Outcome:
    """What became of a trial.

    Attributes:
        contestant: Its name.
        settings: What it was given, beyond its defaults.
        steps: Number of steps at each evaluation.
        seconds: Training time at each evaluation.
        train_loss: Loss of the latest batch at each evaluation; None before the first step.
        values: Of each quantity that the workload evaluates, among them ``"loss"``, at each evaluation; None where it
            was not finite.
        total_steps: Steps taken.
        failure: Why it ended before its time, or was not run; empty otherwise.
    """

    contestant: str
    settings: dict[str, Any]
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float | None] = field(default_factory=list)
    values: dict[str, list[float | None]] = field(default_factory=dict)
    total_steps: int = 0
    failure: str = ""

    @property
    def best(self) -> float:
        """The least held-out loss; infinite if there is none."""
        return min((loss for loss in self.values.get("loss", []) if loss is not None), default=math.inf)

    def to_json(self) -> dict[str, Any]:
        """A dictionary for `json.dump`."""
        return asdict(self)


class Trial:
    """A contestant training its own copy of the model for so many seconds.

    Attributes:
        outcome: So far.
        elapsed: Training seconds.
        model: Its copy.
        optimizers: What trains it.
    """

    def __init__(
        self, contestant: Contestant, settings: dict[str, Any], workload: Workload, seed: int, seconds: float
    ) -> None:
        self.outcome = Outcome(contestant.name, settings)
        self.elapsed = 0.0
        self._workload, self._limit, self._due = workload, seconds, 0.0
        self._batches = workload.batches(seed)
        self.model = workload.model(seed)
        self._latest: float | None = None
        own = {key: value for key, value in settings.items() if key != "decay"}
        self._rates: list[tuple[dict[str, Any], float]] = []
        self.optimizers: list[Optimizer] = []
        try:
            self.optimizers = contestant.build(self.model, workload, **own)
        except NotApplicableError as error:
            self.outcome.failure = f"does not apply: {error}"
        if settings.get("decay"):
            self._rates = [(group, group["lr"]) for o in self.optimizers for group in o.param_groups]

    @property
    def is_finished(self) -> bool:
        """Whether its time is up, or it failed."""
        return bool(self.outcome.failure) or self.elapsed >= self._limit

    def advance(self) -> None:
        """Take one step, and evaluate if that is due; the first call evaluates before it."""
        if not self.outcome.steps:
            self._evaluate()
        self.step()
        has_moved = self.outcome.total_steps > self.outcome.steps[-1]
        if has_moved and (self.is_finished or self.elapsed >= self._due):
            self._evaluate()

    def step(self) -> None:
        """Take one step with the clock running; what is raised on the way becomes the outcome's failure."""
        for group, initial in self._rates:
            group["lr"] = initial * max(0.0, 1 - self.elapsed / self._limit)
        x, y = next(self._batches)
        start = time.perf_counter()
        try:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss = self._workload.loss(self.model(x), y)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
        except Exception as error:  # of a rival's package, which must not end the benchmark
            self.outcome.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            return
        self.elapsed += time.perf_counter() - start
        self.outcome.total_steps += 1
        self._latest = loss.item()
        if not math.isfinite(self._latest):
            self.outcome.failure = "diverged"

    def _evaluate(self) -> None:
        self._due = max(self.elapsed * GROWTH, self.elapsed + SHARE * self._limit)
        outcome = self.outcome
        outcome.steps.append(outcome.total_steps)
        outcome.seconds.append(round(self.elapsed, 3))
        outcome.train_loss.append(_json(self._latest))
        for name, value in self._workload.evaluate(self.model).items():
            outcome.values.setdefault(name, []).append(_json(value))


def race(trials: Sequence[Trial]) -> None:
    """Let them take turns until all are finished; next is whoever has trained for the shortest time.

    The contestants share the machine, and it is never equally fast twice: so whatever slows one down slows down all.
    """
    while active := [trial for trial in trials if not trial.is_finished]:
        min(active, key=lambda trial: trial.elapsed).advance()


def _json(value: float | None) -> float | None:
    """To five digits; None for what JSON cannot hold."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None
