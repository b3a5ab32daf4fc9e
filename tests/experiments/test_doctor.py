"""`natgrad doctor`: the facts are this machine's, and the advice follows from them."""

import inspect
import io
import math

import pytest
import torch
from rich.console import Console

import natgrad
from natgrad.experiments import doctor
from natgrad.inverses import INVERSES

QUIET = {"OMP_WAIT_POLICY": "passive"}
FAST = {"float32": 100.0, "bfloat16": 180.0, "cholesky": 10.0, "eigen": 40.0, "ekfac": 40.0}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(doctor, "SIZE", 16)


def test_it_prints_facts_rates_and_advice(small):
    file = io.StringIO()
    doctor.doctor(Console(file=file, width=120))
    text = file.getvalue()
    for part in (natgrad.__version__, torch.__version__, "OMP_WAIT_POLICY", "Measured on cpu", "Gflop/s", "- "):
        assert part in text
    for name in INVERSES:
        assert f'inverse="{name}"' in text
    assert "ms, the default" in text


def test_every_inverse_is_timed_by_its_own_routine(small, monkeypatch):
    calls = []
    for name, inverse in INVERSES.items():
        monkeypatch.setattr(
            inverse,
            "factorize",
            lambda A, G, damping, name=name: calls.append((name, A.shape)) or {"A": A},
            raising=True,
        )
    rates = doctor.measure(torch.device("cpu"))
    assert {name for name, _ in calls} == set(INVERSES)
    assert {shape for _, shape in calls} == {(16, 16)}
    assert all(rates[name] >= 0 for name in INVERSES)


def test_a_missing_routine_is_told_and_not_fatal(small, monkeypatch):
    def missing(*_):
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(INVERSES["eigen"], "factorize", missing)
    rates = doctor.measure(torch.device("cpu"))
    assert math.isnan(rates["eigen"])
    assert doctor.shown(rates)
    assert doctor.advice(QUIET, {"cpu": {**FAST, "eigen": math.nan}}, 1, 2) == ["Nothing to change."]


@pytest.mark.parametrize(
    ("environment", "rates", "threads", "word"),
    [
        ({}, FAST, 2, "OMP_WAIT_POLICY=passive"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, FAST, 2, "OMP_WAIT_POLICY=passive"),
        (QUIET, FAST, 8, "OMP_NUM_THREADS=2"),
        (QUIET, {**FAST, "bfloat16": 5.0}, 2, "On cpu, train in float32"),
        (QUIET, {**FAST, "eigen": 90.0}, 2, "On cpu, keep"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, FAST, 2, "Nothing to change"),
    ],
)
def test_advice(environment, rates, threads, word):
    (line,) = doctor.advice(environment, {"cpu": rates, "cuda": FAST}, threads, processors=2)
    assert word in line


def test_it_compares_with_the_inverse_that_is_the_default():
    assert inspect.signature(natgrad.Preconditioner).parameters["inverse"].default == doctor.DEFAULT_INVERSE


def test_every_device_has_its_own_advice():
    """Catches advice from the rates of one device alone."""
    lines = doctor.advice(QUIET, {"cpu": {**FAST, "bfloat16": 5.0}, "cuda": {**FAST, "eigen": 90.0}}, 2, 2)
    assert [line.partition(",")[0] for line in lines] == ["On cpu", "On cuda"]
