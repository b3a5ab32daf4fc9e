"""Targets, costs and profiles on records made by hand."""

import math
from pathlib import Path

import pytest

from natgrad.experiments.bench.records import Folder, Key
from natgrad.experiments.bench.results import Cost, Spread, cost, profile, results, target
from natgrad.experiments.bench.trial import Outcome


def outcome(contestant: str, losses: list[float | None], seconds: float = 1.0) -> Outcome:
    """Ten steps between evaluations, each ``seconds`` long."""
    count = len(losses)
    steps = [10 * i for i in range(count)]
    return Outcome(contestant, {}, steps, [s * seconds for s in steps], [None] * count, {"loss": losses}, steps[-1])


def folder(path: Path, runs: dict[tuple[str, str, int], Outcome], workload: str = "line") -> Folder:
    made = Folder(path)
    made.add(1.0, [(Key(stage, workload, name, seed), run) for (stage, name, seed), run in runs.items()])
    return made


@pytest.mark.parametrize(("best", "expected"), [([3.0], 3.0), ([1.0, 5.0, 2.0], 2.0), ([1.0, 4.0, 2.0, 3.0], 3.0)])
def test_the_target_is_what_tuned_adamw_reaches_with_half_of_the_seeds(
    tmp_path: Path, best: list[float], expected: float
) -> None:
    runs = {("tuned", "adamw", seed): outcome("adamw", [9.0, b, b + 1]) for seed, b in enumerate(best)}
    distractors = {("defaults", "adamw", 0): outcome("adamw", [0.1]), ("tuned", "kfac", 0): outcome("kfac", [0.1])}
    made = folder(tmp_path, {**runs, **distractors})
    assert target(made, "line") == expected
    (adamw,) = [r for r in results(made, "tuned") if r.contestant == "adamw"]
    assert math.isfinite(adamw.seconds.median)


def test_there_is_no_target_without_tuned_adamw(tmp_path: Path) -> None:
    made = folder(tmp_path, {("defaults", "adamw", 1): outcome("adamw", [1.0])})
    assert target(made, "line") is None
    assert results(made, "defaults")[0].seconds is None


def test_a_cost_is_that_of_the_first_evaluation_at_or_below() -> None:
    run = outcome("kfac", [5.0, None, 2.0, 3.0, 1.0], seconds=0.5)
    assert cost(run, 2.0) == Cost(20, 10.0)
    assert cost(run, 1.5) == Cost(40, 20.0)
    assert cost(run, 0.5) == Cost(math.inf, math.inf)


def test_medians_count_misses_as_infinite() -> None:
    assert Spread.of([3.0, 1.0, math.inf]) == (3.0, 1.0, math.inf)
    assert Spread.of([math.inf, 1.0, math.inf]) == (math.inf, 1.0, math.inf)
    assert Spread.of([2.0, 4.0]) == (3.0, 2.0, 4.0)


def test_results_of_three_seeds(tmp_path: Path) -> None:
    runs = {("tuned", "adamw", seed): outcome("adamw", [9.0, 8.0, 2.0]) for seed in (1, 2, 3)}
    for seed, losses in enumerate(([9.0, 1.0], [9.0, 5.0, 5.0, 2.0], [9.0, 3.0]), start=1):
        runs["tuned", "kfac", seed] = outcome("kfac", losses, seconds=2.0)
    runs["tuned", "kfac", 3].failure = "diverged"
    found = {r.contestant: r for r in results(folder(tmp_path, runs), "tuned")}
    assert found["adamw"].steps == (20, 20, 20)
    assert found["kfac"].steps == (30, 10, math.inf)
    assert found["kfac"].seconds == (60.0, 20.0, math.inf)
    assert found["kfac"].loss == (2.0, 1.0, 3.0)
    assert found["kfac"].failures == ("diverged",)


def test_a_performance_profile() -> None:
    """Four workloads: the last solved by nobody, the third by one; a time that is missing is a miss."""
    inf = math.inf
    times = {
        "a": {"1": 2.0, "2": 9.0, "3": 5.0, "4": inf},
        "b": {"1": 4.0, "2": 3.0, "3": inf, "4": inf},
        "c": {"1": 2.0},
    }
    assert profile(times) == {"a": [1.0, 1.0, 3.0], "b": [1.0, 2.0], "c": [1.0]}


def test_a_target_that_is_reached_before_the_first_step() -> None:
    assert profile({"a": {"1": 0.0}, "b": {"1": 0.0}}) == {"a": [1.0], "b": [1.0]}


def test_records_are_read_back(tmp_path: Path) -> None:
    runs = {("tuned", "adamw", 1): outcome("adamw", [9.0, None]), ("tune", "kfac", 0): outcome("kfac", [1.0])}
    made = folder(tmp_path, runs)
    made.add(2.0, [(Key("tuned", "other", "sgd", 4), outcome("sgd", [3.0]))])
    assert Folder(tmp_path).records == made.records
    assert sorted(file.name for file in tmp_path.glob("*.jsonl")) == ["line.jsonl", "other.jsonl"]
