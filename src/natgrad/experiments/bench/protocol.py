"""The protocol: who runs what for how long, so that nobody has an advantage.

1. *Tune*: on each workload every contestant has the same number of trials (`natgrad.experiments.bench.spaces`), each of
   a third of a run's time, with a seed of its own. The settings with the least held-out loss are its *tuned* ones.
2. *Run*: every contestant with its defaults, and tuned, with the same seeds and the same time.
3. *Target*: what tuned AdamW reaches in a run (`natgrad.experiments.bench.results`): three times what tuning allowed.

Those that share stage, workload and number race each other. What is already in the folder is not run again.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from natgrad.experiments.bench import workloads
from natgrad.experiments.bench.contestants import find
from natgrad.experiments.bench.memory import MEMORY, measure, read_memory
from natgrad.experiments.bench.records import Folder, Key
from natgrad.experiments.bench.spaces import trials
from natgrad.experiments.bench.trial import Outcome, Trial, race
from natgrad.experiments.bench.workload import Workload
from natgrad.experiments.bench.workloads.regression import linear
from natgrad.experiments.runfolder import write_json
from natgrad.experiments.settings import SettingsError

TUNING_SHARE = 1 / 3
TUNING_SEED = 0
TRACKS = ("defaults", "tuned")


@dataclass(frozen=True)
class Plan:
    """What is asked for; a name that does not exist is a `SettingsError`.

    Attributes:
        workloads: Their names.
        contestants: Their names.
        scale: Of each workload's own training time.
    """

    workloads: Sequence[str]
    contestants: Sequence[str]
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in self.workloads:
            workloads.find(name)
        for name in self.contestants:
            find(name)

    def load(self, name: str) -> Workload:
        """A workload, with the time limit that was asked for."""
        workload = workloads.find(name)()
        return replace(workload, seconds=self.scale * workload.seconds)


def tune(plan: Plan, folder: Folder, count: int, console: Console) -> None:
    """Run ``count`` trials of every contestant on every workload."""
    for workload in _loaded(plan):
        for index in range(count):
            settings = {name: trials(find(name).space, count)[index] for name in plan.contestants}
            _race(folder, workload, "tune", index, settings, console)


def run(plan: Plan, folder: Folder, seeds: int, tracks: Sequence[str], console: Console) -> None:
    """Run every contestant on every workload with seeds 1, 2, …

    Raises:
        SettingsError: There is no such track; or it is the tuned one, and not everybody was tuned alike.
    """
    if not set(tracks) <= set(TRACKS):
        raise SettingsError(f"unknown track among {', '.join(tracks)}: choose from {', '.join(TRACKS)}")
    for workload in _loaded(plan):
        tuned = best(folder, workload.name, plan.contestants) if "tuned" in tracks else {}
        for seed in range(1, seeds + 1):
            for track in tracks:
                settings = tuned if track == "tuned" else {name: {} for name in plan.contestants}
                _race(folder, workload, track, seed, settings, console)


def measure_memory(plan: Plan, path: Path, threads: int, console: Console) -> None:
    """Measure the peak memory of those that have none yet, one process at a time, and write it down."""
    for workload, contestant in itertools.product(plan.workloads, plan.contestants):
        if contestant not in read_memory(path).get(workload, {}):
            console.print(f"{workload}, memory: {contestant}", highlight=False)
            peak = measure(workload, contestant, threads)
            measured = read_memory(path)  # anew: a session with other workloads may write here too
            measured.setdefault(workload, {})[contestant] = peak
            write_json(path / MEMORY, measured)


def best(folder: Folder, workload: str, contestants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each contestant's settings with the least held-out loss in its trials; its defaults, where every trial failed.

    Raises:
        SettingsError: They had no trials, or not equally many.
    """
    tried: dict[str, list[Outcome]] = {contestant: [] for contestant in contestants}
    for key, record in folder.records.items():
        if (key.stage, key.workload) == ("tune", workload) and key.contestant in tried:
            tried[key.contestant].append(record.outcome)
    counts = {contestant: len(outcomes) for contestant, outcomes in tried.items()}
    if 0 in counts.values() or len(set(counts.values())) > 1:
        listed = ", ".join(f"{contestant} {count}" for contestant, count in counts.items())
        raise SettingsError(
            f"the tuned track needs equally many trials of each contestant, and on {workload} there are: {listed}. Run "
            "`natgrad bench tune` with these contestants and one number of --trials, or give --track defaults"
        )
    return {c: min(outcomes, key=lambda outcome: outcome.best).settings for c, outcomes in tried.items()}


def _loaded(plan: Plan) -> list[Workload]:
    """The workloads, all of them before any runs, as one may lack its data.

    Every contestant has then done what it does only once in a process.
    """
    loaded = list(map(plan.load, plan.workloads))
    # Two steps of something tiny: torch imports some of its modules at their first use, which is not training.
    tiny = linear("", 0.0, dimension=4, depth=3, batch=8)
    for name in plan.contestants:
        trial = Trial(find(name), {}, tiny, seed=0, seconds=math.inf)
        trial.step()
        trial.step()
    return loaded


def _race(
    folder: Folder, workload: Workload, stage: str, index: int, settings: Mapping[str, dict[str, Any]], console: Console
) -> None:
    """Let those run whose trial is missing, or was made with other settings, as when a space has changed."""
    limit = workload.seconds * (TUNING_SHARE if stage == "tune" else 1)
    folder.check_limit(stage, workload.name, limit)
    keys = {name: Key(stage, workload.name, name, index) for name in settings}
    missing = [name for name in settings if not folder.holds(keys[name], settings[name])]
    if not missing:
        return
    seed = TUNING_SEED if stage == "tune" else index
    console.print(
        f"{workload.name}, {stage} {index}: {', '.join(missing)}, {limit:g} s each", highlight=False, soft_wrap=True
    )
    running = [Trial(find(name), settings[name], workload, seed, limit) for name in missing]
    race(running)
    folder.add(limit, [(keys[trial.outcome.contestant], trial.outcome) for trial in running])
    for trial in running:
        console.print(describe(trial.outcome), highlight=False, soft_wrap=True)


def describe(outcome: Outcome) -> str:
    """One line for the console."""
    settings = ", ".join(f"{name}={value}" for name, value in outcome.settings.items())
    result = f"{outcome.best:10.4g} after {outcome.total_steps} steps"
    return f"  {outcome.contestant:8} {result:28} {outcome.failure} {settings}".rstrip()
