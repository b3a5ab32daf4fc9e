"""Loss curves read back: those of a run, and those recorded in 2017.

Both are lists of points (step, test loss, seconds). Times were not recorded in 2017, so those points have none.
"""

import csv
import itertools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from natgrad.experiments.contestants import LABELS, Record
from natgrad.experiments.mnist import DATA
from natgrad.experiments.runfolder import read_records, read_settings
from natgrad.experiments.settings import Settings

# The article recorded these contestants, with both nonlinearities.
RECORDED = ("sgd", "adam", "kfac-sgd", "kfac-adam")


class Point(NamedTuple):
    """The test loss after ``step`` steps, which took ``seconds`` of training (None if nobody took the time)."""

    step: int
    test_loss: float
    seconds: float | None


@dataclass(frozen=True)
class Curve:
    """One contestant's run.

    Attributes:
        optimizer: Its name in the registry.
        label: How to show it.
        points: Where its test loss was measured.
        last_step: The last step it took (the points may end before).
        step_seconds: Median duration of its steps; None if fewer than two were timed.
    """

    optimizer: str
    label: str
    points: tuple[Point, ...]
    last_step: int
    step_seconds: float | None

    def first_reach(self, threshold: float) -> Point | None:
        """The first point at or below a test loss, or None."""
        return next((p for p in self.points if p.test_loss <= threshold), None)

    @property
    def best(self) -> Point | None:
        """The point of least test loss, or None if it was never measured."""
        return min(self.points, key=lambda p: p.test_loss, default=None)


@dataclass(frozen=True)
class Run:
    """A run folder's settings and curves (name in the registry -> curve)."""

    settings: Settings
    curves: dict[str, Curve]


def read_run(folder: Path, prefix: str = "") -> Run:
    """Read a run folder; ``prefix`` goes before every label.

    Raises:
        SettingsError: The folder holds no run.
    """
    settings, records = read_settings(folder), read_records(folder)
    return Run(settings, {name: curve(name, records, prefix) for name in settings.optimizers})


def curve(optimizer: str, records: Iterable[Record], prefix: str = "") -> Curve:
    """The curve of one optimizer from the records of all."""
    own = [r for r in records if r.optimizer == optimizer]
    points = tuple(Point(r.step, r.test_loss, r.seconds) for r in own if r.test_loss is not None)
    durations = [later.seconds - earlier.seconds for earlier, later in itertools.pairwise(own)]
    return Curve(
        optimizer=optimizer,
        label=prefix + LABELS.get(optimizer, optimizer),
        points=points,
        last_step=own[-1].step if own else 0,
        step_seconds=statistics.median(durations) if durations else None,
    )


def recorded(nonlinearity: str) -> dict[str, Curve]:
    """The article's curves of 2017 (thinned, without times): name in the registry -> curve."""
    return {name: _recorded(nonlinearity, name) for name in RECORDED}


def _recorded(nonlinearity: str, name: str) -> Curve:
    text = (DATA / f"2017-{nonlinearity}-{name}.csv").read_text()
    rows = [(int(row["step"]), float(row["test_loss"])) for row in csv.DictReader(text.splitlines())]
    return Curve(
        optimizer=name,
        label=_RECORDED_LABELS[name],
        points=tuple(Point(step, loss, None) for step, loss in rows),
        last_step=rows[-1][0],
        step_seconds=None,
    )


_RECORDED_LABELS = {"sgd": "SGD", "adam": "Adam", "kfac-sgd": "K-FAC + SGD", "kfac-adam": "K-FAC + Adam"}
