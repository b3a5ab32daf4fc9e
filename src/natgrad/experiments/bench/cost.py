"""What a step costs, as a function of batch, width, depth and period: measured once, for the two cost models.

Each case is a network and a batch on which plain SGD (forward, backward, update) and the others take turns, step by
step, so that the machine's noise hits all alike and ratios hold. A few steps at the beginning are not counted: they
compile, allocate, and are where natgrad renews its curvature most often.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

import natgrad
from natgrad.experiments import autoencoder, mnist
from natgrad.experiments.bench.contestants import find
from natgrad.experiments.bench.trial import Trial
from natgrad.experiments.bench.workload import Workload, epochs, seeded
from natgrad.experiments.bench.workloads.autoencoders import article
from natgrad.experiments.runfolder import environment, write_atomically, write_json
from natgrad.experiments.settings import Settings
from natgrad.likelihoods import Gaussian

FILE = "cost.jsonl"
WARM_UP = 5
BASE_WIDTH, BASE_DEPTH, BASE_BATCH = 256, 6, 500
BATCHES, WIDTHS, DEPTHS = (125, 500, 2_000, 8_000), (64, 144, 256, 576, 1024), (3, 6, 12, 24)
PERIODS = (1, 2, 5, 10)
PLAIN = "sgd"


@dataclass(frozen=True)
class Case:
    """A place at which steps are measured.

    Attributes:
        axis: What is varied around the base: ``"batch"``, ``"width"``, ``"depth"``, ``"period"``; or ``"article"``,
            the article's network with so many images a step, and ``"fresh"``, the same with curvature and inverses
            made anew at every step.
        value: Its value.
        build: The workload.
        settings: For natgrad.
    """

    axis: str
    value: int
    build: Callable[[], Workload]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What was measured of one contestant in one case.

    Attributes:
        axis: As the case's.
        value: As the case's.
        contestant: Its name.
        steps: How many were measured.
        mean: Seconds of a step.
        median: Seconds of a step.
        largest: Seconds of a step.
        state: Bytes of the tensors that the optimizers keep between steps.
        estimate: The same as ``natgrad.describe`` tells it beforehand; 0 for the others.
    """

    axis: str
    value: int
    contestant: str
    steps: int
    mean: float
    median: float
    largest: float
    state: int
    estimate: int


def chain(width: int, depth: int, batch: int) -> Workload:
    """``depth`` equal layers with sigmoids that reconstruct MNIST, its images scaled to ``width`` (a square) pixels."""
    side = math.isqrt(width)
    images, _ = mnist.embedded()
    images = functional.interpolate(images.reshape(-1, 1, 28, 28), size=(side, side), mode="area").flatten(1)

    def build() -> nn.Module:
        return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.Sigmoid())])

    return Workload(
        name="chain",
        title=f"{depth} layers of {width}, batch {batch}",
        model=seeded(build),
        batches=lambda seed: epochs(images, images, batch, seed),
        loss=autoencoder.half_squared_error,
        natgrad_loss=Gaussian(reduction="batchmean"),
        evaluate=lambda model: {},
        seconds=0.0,
    )


def cases(axes: Sequence[str]) -> list[Case]:
    """All cases along these axes."""
    base = {"width": BASE_WIDTH, "depth": BASE_DEPTH, "batch": BASE_BATCH}
    values = {"batch": BATCHES, "width": WIDTHS, "depth": DEPTHS}
    found = [
        Case(axis, value, partial(chain, **{**base, axis: value}), {})
        for axis in axes
        for value in values.get(axis, ())
    ]
    if "period" in axes:
        periods = [(p, {"curvature_period": p, "inverse_period": p}) for p in PERIODS]
        found += [Case("period", p, partial(chain, **base), own) for p, own in periods]
    sizes = {500: Settings(batch_size=500), 10_000: Settings()}
    for axis, settings in (("article", {}), ("fresh", {"curvature_period": 1, "inverse_period": 1})):
        if axis in axes:
            found += [Case(axis, n, partial(article, "article", 0.0, own), settings) for n, own in sizes.items()]
    return found


def measure(case: Case, contestants: Sequence[str], steps: int) -> list[Row]:
    """Let plain SGD and the contestants take turns for so many steps each, after the warm-up."""
    workload = case.build()
    trials = [
        Trial(find(name), case.settings if name == "kfac" else {}, workload, seed=1, seconds=float("inf"))
        for name in dict.fromkeys([PLAIN, *contestants])
    ]
    seconds: dict[str, list[float]] = {trial.outcome.contestant: [] for trial in trials}
    for step in range(WARM_UP + steps):
        for trial in trials:
            before = trial.elapsed
            trial.step()
            if step >= WARM_UP and not trial.outcome.failure:
                seconds[trial.outcome.contestant].append(trial.elapsed - before)
    return [_row(case, trial, seconds[trial.outcome.contestant]) for trial in trials if not trial.outcome.failure]


def collect(path: Path, axes: Sequence[str], contestants: Sequence[str], steps: int, console: Console) -> list[Row]:
    """The rows along these axes: those in the folder's file, and the missing ones, which are measured and added."""
    file = path / FILE
    rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    for case in cases(axes):
        there = {row.contestant for row in rows if (row.axis, row.value) == (case.axis, case.value)}
        if there.issuperset([PLAIN, *contestants]):
            continue
        console.print(f"{case.axis} {case.value}: {steps} steps each", highlight=False)
        path.mkdir(parents=True, exist_ok=True)
        rows = [row for row in rows if (row.axis, row.value) != (case.axis, case.value)]
        rows += measure(case, contestants, steps)
        text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        write_atomically(file, partial(Path.write_text, data=text))
        write_json(path / "environment.json", environment(torch.get_num_threads()))
    return [row for row in rows if row.axis in axes and row.contestant in (PLAIN, *contestants)]


def ratio(row: Row, rows: Sequence[Row]) -> float:
    """The mean step over the mean step of plain SGD in the same case."""
    plain = next(r for r in rows if (r.axis, r.value, r.contestant) == (row.axis, row.value, PLAIN))
    return row.mean / plain.mean


def _row(case: Case, trial: Trial, seconds: list[float]) -> Row:
    tensors = [t for o in trial.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
    is_natgrad = any(isinstance(o, natgrad.KFAC) for o in trial.optimizers)
    return Row(
        axis=case.axis,
        value=case.value,
        contestant=trial.outcome.contestant,
        steps=len(seconds),
        mean=statistics.fmean(seconds),
        median=statistics.median(seconds),
        largest=max(seconds),
        state=sum(t.nbytes for t in tensors),
        estimate=natgrad.describe(trial.model).memory if is_natgrad else 0,
    )
