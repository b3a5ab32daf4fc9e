"""Tuning, runs, and what happens when they are stopped or asked for twice."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from natgrad.experiments.bench import memory, protocol
from natgrad.experiments.bench.contestants import CONTESTANTS, Contestant
from natgrad.experiments.bench.protocol import Plan, best, run, tune
from natgrad.experiments.bench.records import Folder, Key
from natgrad.experiments.bench.report import report
from natgrad.experiments.bench.spaces import Choice
from natgrad.experiments.bench.workload import Workload
from natgrad.experiments.bench.workloads import WORKLOADS
from natgrad.experiments.download import DownloadError
from natgrad.experiments.settings import SettingsError

NAMES = ("slow", "fast", "adamw")
pytestmark = pytest.mark.usefixtures("line", "rate")


@pytest.fixture
def plan() -> Plan:
    return Plan(("line", "other"), NAMES)


def everything(path: Path, plan: Plan, console: Console) -> Folder:
    folder = Folder(path)
    tune(plan, folder, 3, console)
    run(plan, folder, 2, protocol.TRACKS, console)
    return folder


def test_the_whole_protocol(tmp_path: Path, plan: Plan, console: Console) -> None:
    folder = everything(tmp_path, plan, console)
    stages = {("tune", i) for i in range(3)} | {(track, seed) for track in protocol.TRACKS for seed in (1, 2)}
    assert {(k.workload, k.contestant, k.stage, k.index) for k in folder.records} == {
        (w, c, *stage) for w in plan.workloads for c in NAMES for stage in stages
    }
    for key, record in folder.records.items():
        assert record.limit == (10.0 if key.stage == "tune" else 30.0)
        assert record.outcome.total_steps == record.limit
        # The first weight tells the seed: tuning has one of its own.
        seed = 0 if key.stage == "tune" else key.index
        assert record.outcome.values["loss"][0] == (1 + seed) ** 2


def test_tuned_settings_are_the_best_of_the_trials(tmp_path: Path, plan: Plan, console: Console) -> None:
    folder = everything(tmp_path, plan, console)
    chosen = best(folder, "line", NAMES)
    assert chosen["fast"] == {}  # 0.1, where the space ends at 0.03
    assert chosen["slow"]["lr"] in (0.02, 0.03)
    assert folder.records[Key("tuned", "line", "slow", 1)].outcome.settings == chosen["slow"]
    assert folder.records[Key("defaults", "line", "slow", 1)].outcome.settings == {}


@pytest.mark.parametrize("races", range(1, 14))
def test_a_stopped_benchmark_goes_on_where_it_was(
    tmp_path: Path, plan: Plan, console: Console, monkeypatch: pytest.MonkeyPatch, races: int
) -> None:
    whole = everything(tmp_path / "whole", plan, console)
    original, left = protocol.race, [races]

    def interrupted(trials: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        original(trials)

    monkeypatch.setattr(protocol, "race", interrupted)
    with pytest.raises(KeyboardInterrupt):
        everything(tmp_path / "parts", plan, console)
    left[0] = 14 - races
    parts = everything(tmp_path / "parts", plan, console)
    assert left[0] == 0  # nothing was raced twice
    assert parts.records.keys() == whole.records.keys()
    assert {k: r.outcome for k, r in parts.records.items()} == {k: r.outcome for k, r in whole.records.items()}
    assert {r.session for r in parts.records.values()} == {0, 1}
    assert len(json.loads((tmp_path / "parts" / "environment.json").read_text())) == 2


def test_what_is_there_is_not_run_again(
    tmp_path: Path, plan: Plan, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything(tmp_path, plan, console)
    raced: list[str] = []
    original = protocol.race
    monkeypatch.setattr(protocol, "race", lambda ts: (raced.extend(t.outcome.contestant for t in ts), original(ts)))
    everything(tmp_path, plan, console)
    assert raced == []
    # A contestant whose space has changed is tuned again, but for its defaults.
    monkeypatch.setitem(
        CONTESTANTS, "slow", Contestant("slow", "slow", {"lr": Choice(0.01)}, CONTESTANTS["slow"].build)
    )
    tune(plan, Folder(tmp_path), 3, console)
    assert raced == ["slow"] * 4


def test_unequal_tuning_is_refused(tmp_path: Path, plan: Plan, console: Console) -> None:
    folder = Folder(tmp_path)
    tune(Plan(("line",), ("slow", "fast")), folder, 2, console)
    with pytest.raises(SettingsError, match="on line there are: slow 2, fast 2, adamw 0"):
        run(plan, folder, 1, ("tuned",), console)
    tune(Plan(("line",), ("adamw",)), folder, 1, console)
    with pytest.raises(SettingsError, match="slow 2, fast 2, adamw 1"):
        best(folder, "line", NAMES)


def test_another_time_limit_is_refused(tmp_path: Path, console: Console) -> None:
    run(Plan(("line",), ("slow",)), Folder(tmp_path), 1, ("defaults",), console)
    with pytest.raises(SettingsError, match=r"had 30 seconds, and these would have 12: give the same --scale"):
        run(Plan(("line",), ("fast",), scale=0.4), Folder(tmp_path), 1, ("defaults",), console)


def test_names_that_do_not_exist_are_refused_before_anything_runs(tmp_path: Path, console: Console) -> None:
    with pytest.raises(SettingsError, match="unknown workload 'no'"):
        Plan(("line", "no"), NAMES)
    with pytest.raises(SettingsError, match="unknown contestant 'no'"):
        Plan(("line",), ("no",))
    with pytest.raises(SettingsError, match="unknown track among final: choose from defaults, tuned"):
        run(Plan(("line",), NAMES), Folder(tmp_path), 1, ("final",), console)


def test_the_report_tells_targets_ratios_and_misses(
    tmp_path: Path, plan: Plan, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natgrad.experiments.bench.report.WORKLOADS", ("line", "other"))
    monkeypatch.setattr("natgrad.experiments.bench.report.COLOURS", dict.fromkeys(NAMES, "k"))
    folder = everything(tmp_path, plan, console)
    (tmp_path / memory.MEMORY).write_text(json.dumps({"line": {"slow": 7e6, "fast": None}}))
    report(folder, console)
    text = (tmp_path / "table.md").read_text()
    tuned, defaults, *_ = text.split("### ")[1:]
    rows = {row.split(" | ")[1]: row.split(" | ") for row in defaults.splitlines() if row.startswith("| line ")}
    rows |= {row.split(" | ")[1]: row.split(" | ") for row in defaults.splitlines()[:7] if row.startswith("|  |")}
    assert rows["slow"][2:5] == ["∞", "∞", "–"]
    assert rows["slow"][6] == "7 |"
    assert rows["fast"][6] == "– |"
    assert float(rows["fast"][4]) < 1
    assert "| line ≤ " in tuned
    for name in ("profile.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_missing_data_are_told_before_anything_runs(
    tmp_path: Path, plan: Plan, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking() -> Workload:
        raise DownloadError("no network")

    monkeypatch.setitem(WORKLOADS, "other", lacking)
    with pytest.raises(DownloadError):
        tune(plan, Folder(tmp_path), 1, console)
    assert not Folder(tmp_path).records


def test_two_sessions_share_the_file_of_memory(
    tmp_path: Path, plan: Plan, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(workload: str, contestant: str, threads: int) -> float:
        """While another session writes what it has measured."""
        (tmp_path / memory.MEMORY).write_text(json.dumps({"theirs": {"slow": 1.0}}))
        return 2.0

    monkeypatch.setattr(protocol, "measure", measure)
    protocol.measure_memory(Plan(("line",), ("slow",)), tmp_path, 1, console)
    assert memory.read_memory(tmp_path) == {"theirs": {"slow": 1.0}, "line": {"slow": 2.0}}
