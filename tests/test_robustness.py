"""The defaults train whatever is scaled, shifted or doubled: no divergence, and nothing to tune."""

import dataclasses
import functools

import pytest

from robustness_cases import SETTINGS, TASKS, Run, Setting, run

SMALL = Setting(batch=200, images=600, steps=10)
SAME = ("loss x 1e3", "loss x 1e-3")
FAST = [
    ("tanh MLP, cross-entropy", tuple(SETTINGS)),
    ("ConvNet with BatchNorm, cross-entropy", ("as it is", "batch 64", "inputs x 100", "inputs + 10", *SAME)),
    ("sigmoid autoencoder, MSE", ("as it is", "inputs / 100", "inputs + 10", "twice as deep", *SAME)),
    ("tanh autoencoder, BCE", ("as it is", "inputs x 100", "twice as wide", *SAME)),
    ("tanh MLP, MSE", ("as it is", *SAME)),
    ("ReLU MLP with dropout, cross-entropy", ("as it is", *SAME)),
    ("ReLU autoencoder, MSE", ("as it is", *SAME)),
]


def small(setting: Setting) -> Setting:
    """The same on fewer images and steps."""
    batch = {64: 64, 2000: 600, 10_000: 600}.get(setting.batch, SMALL.batch)
    return dataclasses.replace(setting, batch=batch, images=SMALL.images, steps=SMALL.steps)


@functools.cache
def small_run(task: str, setting: Setting, seed: int = 0) -> Run:
    return run(TASKS[task], setting, seed)


def assert_learns(result: Run, share: float, wrong: int = 0) -> None:
    """All the way down; a step may go wrong while the scale of a squared error is found out, or as a batch shows too
    little of the data, and is undone.

    Args:
        result: Of a run.
        share: Of the loss that may be left.
        wrong: Steps that may go wrong besides.
    """
    assert result.learnt < share, result
    assert result.skipped == 0
    assert result.undone <= max(1, len(result.losses) // 10)
    rises = [i for i, loss in enumerate(result.losses) if not loss < 1.3 * result.losses[0]]
    assert len(rises) <= result.undone + wrong, result.losses


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in FAST for name in names if name not in SAME])
def test_it_learns(task: str, name: str) -> None:
    """Halves the loss of data it has not seen in ten steps."""
    assert_learns(small_run(task, small(SETTINGS[name])), 0.6)


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in FAST for name in names if name in SAME])
def test_a_scaled_loss_trains_as_if_it_were_not(task: str, name: str) -> None:
    """Catches steps that are a thousand times too long, or too short: then nothing is left, or nothing happens.

    Where targets tell the scale the run is the same up to rounding; else a few steps are spent on finding it.
    """
    plain = small_run(task, small(SETTINGS["as it is"]))
    if "MSE" not in task:
        scaled = small_run(task, small(SETTINGS[name]))
        assert scaled.after == pytest.approx(plain.after, rel=0.1)
    else:
        longer = dataclasses.replace(small(SETTINGS[name]), steps=SMALL.steps + 4)
        scaled = small_run(task, longer)
        assert scaled.learnt < 1.5 * plain.learnt, scaled
    assert_learns(scaled, 0.6)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("task", ["tanh MLP, cross-entropy", "tanh MLP, MSE"])
def test_other_seeds_learn(task: str, seed: int) -> None:
    assert_learns(small_run(task, small(SETTINGS["loss x 1e3"]), seed), 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("task", TASKS)
def test_five_seeds_learn_at_full_length(task: str, name: str) -> None:
    for seed in range(5):
        result = run(TASKS[task], SETTINGS[name], seed)
        # One of the first steps may learn the noise of 64 data.
        assert_learns(result, 0.6, wrong=int(SETTINGS[name].batch == 64))
        if name in SAME:
            assert result.learnt < 1.5 * run(TASKS[task], SETTINGS["as it is"], seed).learnt
