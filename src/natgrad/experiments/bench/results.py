"""From records to results: targets, what it took to reach them, performance profiles.

The *target* of a workload is the median over seeds of the least held-out loss of tuned AdamW in a run. A contestant
reaches it at the first evaluation at or below it; a miss is infinite, in a median too. Of an even number of seeds, the
target is the larger of the two middle losses, so that AdamW itself reaches it with more than half of the seeds.

A *performance profile* (Dolan and Moré, 2002) is, for each contestant, the share of workloads on which it took at most
τ times as long as the fastest; a workload that it missed counts for no τ.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from natgrad.experiments.bench.records import Folder, Record
from natgrad.experiments.bench.trial import Outcome

REFERENCE = ("tuned", "adamw")


class Cost(NamedTuple):
    """Steps and training seconds to a loss; both infinite where it was not reached."""

    steps: float
    seconds: float


class Spread(NamedTuple):
    """The median, least and largest of a quantity over seeds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of at least one value; infinite ones are values like others."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


@dataclass(frozen=True)
class Result:
    """A contestant on a workload, in one of the tracks.

    Attributes:
        track: ``"defaults"`` or ``"tuned"``.
        workload: Its name.
        contestant: Its name.
        steps: To the target; None where there is no target.
        seconds: To the target; None where there is no target.
        loss: The least held-out loss.
        step_seconds: Mean of a step.
        settings: Beyond the defaults.
        failures: Why trials ended before their time.
    """

    track: str
    workload: str
    contestant: str
    steps: Spread | None
    seconds: Spread | None
    loss: Spread
    step_seconds: float
    settings: dict[str, object]
    failures: tuple[str, ...]


def runs(folder: Folder, track: str, workload: str, contestant: str) -> list[Record]:
    """The records of one contestant in a track on a workload, one for each seed."""
    wanted = (track, workload, contestant)
    found = [r for k, r in folder.records.items() if (k.stage, k.workload, k.contestant) == wanted]
    return sorted(found, key=lambda record: record.key.index)


def target(folder: Folder, workload: str) -> float | None:
    """The loss to reach; None while tuned AdamW has not run, or where it never had a finite loss."""
    reference = runs(folder, REFERENCE[0], workload, REFERENCE[1])
    if not reference:
        return None
    loss = statistics.median_high(record.outcome.best for record in reference)
    return loss if math.isfinite(loss) else None


def cost(outcome: Outcome, target: float) -> Cost:
    """What the first evaluation at or below the target had taken."""
    evaluations = zip(outcome.steps, outcome.seconds, outcome.values.get("loss", []), strict=False)
    for steps, seconds, loss in evaluations:
        if loss is not None and loss <= target:
            return Cost(steps, seconds)
    return Cost(math.inf, math.inf)


def results(folder: Folder, track: str) -> list[Result]:
    """All contestants of a track on all workloads that have records in it, in the order in which they were run."""
    pairs = dict.fromkeys((k.workload, k.contestant) for k in folder.records if k.stage == track)
    return [_result(track, workload, contestant, folder) for workload, contestant in pairs]


def _result(track: str, workload: str, contestant: str, folder: Folder) -> Result:
    outcomes = [record.outcome for record in runs(folder, track, workload, contestant)]
    goal = target(folder, workload)
    costs = None if goal is None else [cost(outcome, goal) for outcome in outcomes]
    steps = sum(outcome.total_steps for outcome in outcomes)
    return Result(
        track=track,
        workload=workload,
        contestant=contestant,
        steps=None if costs is None else Spread.of(c.steps for c in costs),
        seconds=None if costs is None else Spread.of(c.seconds for c in costs),
        loss=Spread.of(outcome.best for outcome in outcomes),
        step_seconds=sum(o.seconds[-1] for o in outcomes if o.seconds) / steps if steps else math.nan,
        settings=outcomes[0].settings,
        failures=tuple(dict.fromkeys(outcome.failure for outcome in outcomes if outcome.failure)),
    )


def profile(times: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Performance profiles: for each contestant, its ratio to the fastest on each workload that it solved, sorted.

    The share ρ(τ) is the number of entries ≤ τ over the number of workloads.

    Args:
        times: Contestant → workload → time, infinite for a miss. A workload that a contestant has no time for is a
            miss too.
    """
    workloads: Sequence[str] = list(dict.fromkeys(w for own in times.values() for w in own))
    fastest = {w: min(own.get(w, math.inf) for own in times.values()) for w in workloads}
    return {
        contestant: sorted(own[w] / fastest[w] if fastest[w] else 1.0 for w in own if math.isfinite(own[w]))
        for contestant, own in times.items()
    }
