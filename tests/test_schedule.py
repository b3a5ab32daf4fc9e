"""Intervals of curvature: a partition of the steps, the same from any step on, and a turn for each layer in each."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.schedule import LONGEST, OFTEN, SHARE, Period, due, interval, starts, turn

periods = st.one_of(st.just("auto"), st.integers(1, 20))


def intervals(period: Period, steps: int) -> list[int]:
    return [step for step in range(steps) if starts(step, period)]


def test_an_automatic_interval_is_a_share_of_the_steps_before_it() -> None:
    """Catches gaps that grow too early, too fast or without an end."""
    firsts = intervals("auto", 500)
    gaps = [later - first for first, later in itertools.pairwise(firsts)]
    assert firsts[:14] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 19]
    assert gaps == [min(LONGEST, 1 + int(first * SHARE)) for first in firsts[:-1]]
    assert gaps[-1] == LONGEST


@given(periods, st.integers(0, 10_000))
def test_a_step_is_in_the_interval_that_it_names(period: Period, step: int) -> None:
    """Catches a long run whose intervals drift: the arithmetic and the walk must agree."""
    first, length = interval(step, period)
    assert first <= step < first + length
    assert interval(first, period) == interval(first + length - 1, period) == (first, length)
    assert starts(first + length, period)


@given(periods, st.integers(0, 400), st.dictionaries(st.text(max_size=3), st.floats(0, 1e9), max_size=30))
def test_every_layer_has_one_turn_in_an_interval(period: Period, step: int, costs: dict[str, float]) -> None:
    """Catches a layer that is never refreshed, or twice."""
    first, length = interval(step, period)
    turns = [name for at in range(first, first + length) for name in turn(at, period, costs)]
    assert sorted(turns) == sorted(costs)


@given(periods, st.integers(0, 400), st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_all_are_due_at_the_start_of_an_interval_and_then_those_of_few_rows(
    period: Period, step: int, shares: dict[str, float]
) -> None:
    """Catches periods that the user gave and that are not kept, and layers that gather without need."""
    chosen = due(step, period, shares)
    if starts(step, period):
        assert chosen == shares.keys()
    else:
        assert all(shares[name] < 1 for name in chosen)
        assert not (chosen and period != "auto")


@pytest.mark.parametrize(("share", "times"), [(1.0, 1), (0.5, 2), (0.25, 4), (1 / 8, 8), (0.01, 8)])
def test_in_the_end_as_many_rows_come_together_as_one_batch_of_enough_has(share: float, times: int) -> None:
    """Up to every second step: catches a layer whose factors starve."""
    first, length = interval(10_000, "auto")
    turns = [step for step in range(first, first + length) if due(step, "auto", {"a": share})]
    assert times - 1 <= len(turns) - (first % max(OFTEN, int(share * LONGEST)) != 0) <= times


def test_no_pass_is_made_for_vectors_alone() -> None:
    """They come along with others, are due where intervals start, and alone where there is nothing else."""
    shares = {"wide": 0.5, "norm": 1 / 8}
    first, length = interval(10_000, "auto")
    inside = range(first + 1, first + length)
    of_all = {step for step in inside if step % (LONGEST // 2) == 0}
    assert {step for step in inside if "norm" in due(step, "auto", shares)} > of_all
    assert {step for step in inside if "norm" in due(step, "auto", shares, {"norm"})} == of_all
    assert due(first, "auto", shares, {"norm"}) == shares.keys()
    alone = {"norm": 1 / 8}
    assert all(due(step, "auto", alone, {"norm"}) == due(step, "auto", alone) for step in inside)


def test_turns_spread_the_cost() -> None:
    """Catches layers spread by number where one costs as much as all others together."""
    costs = {"large": 64.0, **{f"small {i}": 1.0 for i in range(64)}}
    first, length = interval(10_000, "auto")
    by_step = [turn(first + k, "auto", costs) for k in range(length)]
    assert [len(names) for names in by_step if "large" in names] == [1]
    assert max(len(names) for names in by_step) == 8
    assert turn(20, 4, costs) == set(costs)
    assert turn(21, 4, costs) == set()


@pytest.mark.parametrize("step", [0, 3, 8, 9, 43, 44])
def test_early_inverses_are_refreshed_together(step: int) -> None:
    assert turn(step, "auto", {"a": 1.0, "b": 8.0}) == ({"a", "b"} if starts(step, "auto") else set())
