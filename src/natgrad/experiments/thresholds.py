"""How long each contestant took to each test loss, and how that compares with Adam.

Reaching a threshold means the first *measured* test loss at or below it. Adam is the baseline; if it did not get there
in the run, the article's recorded curve stands in for it where the problem is the article's (its steps as recorded, its
seconds as those steps times the median step of this run's Adam), and otherwise the length of its run is a lower bound.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from natgrad.experiments.curves import Curve, Run, recorded

# The two odd ones are the minima recorded in 2017: Adam's (after 4,917 steps), and the best of all (K-FAC + Adam).
ADAM_BEST_2017, BEST_2017 = 8.48507, 3.06471
THRESHOLDS = (50.0, 30.0, 20.0, 15.0, 10.0, ADAM_BEST_2017, 5.0, BEST_2017, 2.5, 2.0, 1.0)


@dataclass(frozen=True)
class Cost:
    """What a threshold took.

    Attributes:
        steps: Steps taken to get there.
        seconds: Training time to get there; None if not known.
        is_bound: It was not reached: the cost is more than this.
        is_recorded: The steps are from the recorded curve of 2017, the seconds estimated.
    """

    steps: int
    seconds: float | None
    is_bound: bool = False
    is_recorded: bool = False


@dataclass(frozen=True)
class Row:
    """One contestant at one threshold; a ratio is Adam's cost over its own (None if there is nothing to divide)."""

    threshold: float
    label: str
    cost: Cost
    adam: Cost | None

    @property
    def steps_ratio(self) -> float | None:
        """How many times fewer steps than Adam."""
        if self.adam is None or self.cost.is_bound or self.cost.steps == 0:
            return None
        return self.adam.steps / self.cost.steps

    @property
    def seconds_ratio(self) -> float | None:
        """How many times less training time than Adam."""
        if self.adam is None or self.cost.is_bound or not self.cost.seconds or self.adam.seconds is None:
            return None
        return self.adam.seconds / self.cost.seconds


def rows(runs: Sequence[Run]) -> list[Row]:
    """One row per contestant for every threshold that at least one contestant reached after it had started above it."""
    return [
        row
        for threshold in THRESHOLDS
        if any(_came_down_to(threshold, curve) for run in runs for curve in run.curves.values())
        for run in runs
        for row in _rows_at(threshold, run, runs)
    ]


def cost(curve: Curve, threshold: float) -> Cost | None:
    """What the threshold took, or a bound on it; None if the test loss was never measured."""
    if (point := curve.first_reach(threshold)) is not None:
        return Cost(point.step, point.seconds)
    if not curve.points:
        return None
    return Cost(curve.points[-1].step, curve.points[-1].seconds, is_bound=True)


def adam_cost(run: Run, runs: Sequence[Run], threshold: float) -> Cost | None:
    """The baseline for a run: its own Adam, or another run's on the same problem, or the record of 2017."""
    adam = next(_adams(run, runs), None)
    measured = None if adam is None else cost(adam, threshold)
    if measured is not None and not measured.is_bound:
        return measured
    if not run.settings.is_full_size:
        return measured
    record = cost(recorded(run.settings.nonlinearity)["adam"], threshold)
    assert record is not None
    step_seconds = None if adam is None else adam.step_seconds
    seconds = None if step_seconds is None else step_seconds * record.steps
    return Cost(record.steps, seconds, record.is_bound, is_recorded=True)


def _rows_at(threshold: float, run: Run, runs: Sequence[Run]) -> Iterator[Row]:
    adam = adam_cost(run, runs, threshold)
    for curve in run.curves.values():
        own = adam if curve.optimizer == "adam" else cost(curve, threshold)
        if own is not None:
            yield Row(threshold, curve.label, own, adam)


def _adams(run: Run, runs: Sequence[Run]) -> Iterator[Curve]:
    same_problem = [other for other in runs if other.settings.problem == run.settings.problem]
    yield from (r.curves["adam"] for r in [run, *same_problem] if "adam" in r.curves)


def _came_down_to(threshold: float, curve: Curve) -> bool:
    point = curve.first_reach(threshold)
    return point is not None and point.step > 0
