"""The cost models and the measurement of memory; no assertion on a time."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from natgrad.experiments.bench import cost, memory, models, protocol
from natgrad.experiments.bench.protocol import Plan


def test_exponents_are_recovered() -> None:
    assert models.exponent({n: 3.0 * n**2 for n in (2, 4, 8)}) == "2.00"
    assert models.exponent({n: 5.0 / n for n in (2, 4, 8)}) == "-1.00"
    assert models.exponent({2: 1.0, 4: -1.0}) == ""
    assert models.exponent({}) == ""


def rows() -> list[cost.Row]:
    """Plain steps grow as x², what natgrad adds as x³, its state as x."""
    made = []
    for x in (2, 4, 8):
        made.append(cost.Row("width", x, "sgd", 5, x**2, x**2, x**2, 0, 0))
        made.append(cost.Row("width", x, "kfac", 5, x**2 + x**3, x**2, 3 * x**2, 100 * x, 80 * x))
    return made


def test_the_sheets_of_the_cost_models() -> None:
    overhead = models.overhead_sheet(rows())
    assert [line[0] for line in overhead.lines] == ["width 2", "width 4", "width 8"]
    assert [line[3:5] for line in overhead.lines] == [("3.00", "3.00"), ("5.00", "3.00"), ("9.00", "3.00")]
    plain, added = models.scaling_sheet(rows()).lines
    assert plain[2] == "2.00"
    assert added[2:] == ("3.00", "1.00", "1.25 1.25 1.25")


def test_cost_is_measured_once(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "WIDTHS", (4, 9))
    monkeypatch.setattr(cost, "BASE_BATCH", 20)
    models.overhead(tmp_path, ("width",), ("adamw", "kfac"), 3, console)
    found = [json.loads(line) for line in (tmp_path / cost.FILE).read_text().splitlines()]
    assert [(r["value"], r["contestant"]) for r in found] == [(w, c) for w in (4, 9) for c in ("sgd", "adamw", "kfac")]
    kfac = [r for r in found if r["contestant"] == "kfac"]
    # After so few steps there may be no velocity yet, a fifth of all here.
    assert all(1.25 * r["state"] >= r["estimate"] > 0 for r in kfac)
    assert (tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(cost, "measure", lambda *arguments: pytest.fail("measured again"))
    models.overhead(tmp_path, ("width",), ("kfac",), 3, console)


def test_the_periods_reach_natgrad() -> None:
    (case,) = [c for c in cost.cases(("period",)) if c.value == 5]
    assert case.settings == {"curvature_period": 5, "inverse_period": 5}
    assert {(c.axis, c.value) for c in cost.cases(("article",))} == {("article", 500), ("article", 10_000)}
    assert all(set(c.settings.values()) == {1} for c in cost.cases(("fresh",)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_is_that_of_another_process(console: Console, tmp_path: Path) -> None:
    protocol.measure_memory(Plan(("linear",), ("sgd",)), tmp_path, 1, console)
    measured = json.loads((tmp_path / memory.MEMORY).read_text())["linear"]["sgd"]
    assert 0 < measured < 1e9
    assert memory.measure("linear", "nobody", 1) is None
    assert memory.resident("VmHWM") >= memory.resident("VmRSS") > 1e6
