import itertools
import math

import pytest

from natgrad.experiments.charts import TICK_ROOM, Chart, Series, draw, linear, logarithmic, since_zero, text, thin
from natgrad.experiments.colours import COLOURS, INK, ordered
from natgrad.experiments.contestants import CONTESTANTS, Record
from natgrad.experiments.internals import internals

SPANS = [(0.003, 0.003), (26.9, 27.1), (9.0, 11.0), (20, 100), (491, 3460), (1e-14, 10), (0.2, 97), (1, 1e6)]


def chart(*lines, **options):
    series = [Series(f"line {i}", points, INK) for i, points in enumerate(lines)]
    return Chart("Loss", "steps", "units", series, **options)


def test_positions_are_even_in_the_logarithm():
    (line,) = draw(chart([(0, 100.0), (1, 10.0), (3, 1.0)])).lines
    xs, ys = [p[0] for p in line.points], [p[1] for p in line.points]
    assert xs[0] == 0
    assert xs[2] == pytest.approx(2 * xs[1], abs=2e-4)  # log(1 + x)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=2e-4)
    assert 0 < ys[2] < ys[0] < 1
    assert [p[2:] for p in line.points] == [("0", "100"), ("1", "10"), ("3", "1")]


def test_a_linear_axis_shows_what_is_not_positive():
    (line,) = draw(chart([(0, -1.0), (1, 0.0), (2, 1.0)], linear=True)).lines
    low, middle, high = (p[1] for p in line.points)
    assert middle - low == pytest.approx(high - middle, abs=2e-4)
    (line,) = draw(chart([(0, -1.0), (1, 0.0), (2, 1.0)])).lines
    assert [p[2] for p in line.points] == ["2"]


def test_a_chart_without_points_is_not_drawn():
    assert draw(chart([], [(0, -1.0), (1, math.nan)])) is None
    assert [line.label for line in draw(chart([], [(0, 1.0)])).lines] == ["line 1"]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("axis", [linear, logarithmic, lambda values: since_zero(values, min(values))])
def test_every_axis_has_ticks_with_room_between_them(axis, span):
    """At least two, each where its text says."""
    scale, candidates = axis(list(span))
    ticks = sorted(scale.ticks(candidates), key=lambda tick: tick.at)
    assert len(ticks) >= 2
    assert all(0 <= tick.at <= 1.0001 for tick in ticks)
    assert all(b.at - a.at >= TICK_ROOM for a, b in itertools.pairwise(ticks))
    for tick in ticks:
        assert scale(float(tick.text.replace(",", ""))) == pytest.approx(tick.at, abs=1e-3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (0.003, "0.003"), (12.3456, "12.35"), (10_000, "10,000"), (1e-11, "1e-11"), (-2.5e7, "-2.5e7")],
)
def test_numbers_are_short(value, expected):
    assert text(value) == expected


def test_long_curves_are_thinned_and_keep_their_lowest_and_their_last_point():
    points = [(float(x), 1.0 + abs(x - 12_345)) for x in range(20_000)]
    scale, _ = since_zero([x for x, _ in points], 1.0)
    thinned = thin(points, scale)
    assert len(thinned) < 450
    assert (12_345.0, 1.0) in thinned
    assert thinned[0] == points[0]
    assert thinned[-1] == points[-1]
    assert thin(points[:20], scale) == points[:20]


def test_every_contestant_has_a_colour_of_its_own():
    assert COLOURS.keys() == CONTESTANTS.keys()
    assert len({c.light for c in COLOURS.values()}) == len({c.dark for c in COLOURS.values()}) == len(COLOURS)
    assert len(set(ordered(8))) == 8


def told(step, **diagnostics):
    return Record("kfac", step, 1.0, 1.0, float(step), diagnostics)


def test_what_kfac_told_is_drawn_over_the_steps_where_it_told_it():
    layers = {"damping_a/0": 1.0, "damping_a/2": 4.0, "damping_g/0": 3e-3, "damping_g/2": 3e-3}
    records = [
        told(0, lr=0.5, predicted_change=-2.0, **layers),
        told(1, lr=0.6, predicted_change=None),
        told(2, lr=0.7, predicted_change=-1.0, **{**layers, "damping_a/2": 5.0}),
        Record("adam", 0, 1.0, 1.0, 0.0),
    ]
    charts = {one.title: {s.label: list(s.points) for s in one.series} for one in internals("kfac", records)}
    assert charts["Rate and momentum"]["rate"] == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert charts["What a step does to the loss"]["fall predicted by the model"] == [(0, 2.0), (2, 1.0)]
    assert charts["Damping of A"] == {"layer 0": [(0, 1.0), (2, 1.0)], "layer 2": [(0, 4.0), (2, 5.0)]}
    assert charts["Damping of G"] == {"all layers": [(0, 3e-3), (2, 3e-3)]}
    assert not any(series.points for one in internals("adam", records) for series in one.series)


def test_the_condition_of_the_block_is_drawn_where_its_factors_have_none():
    block = internals("kfac", [told(0, **{"condition/0": 9.0})])
    factors = internals("kfac", [told(0, **{"condition/0": 6.0, "condition_a/0": 2.0, "condition_g/0": 3.0})])
    title = "Condition number of the damped block"
    assert title in [one.title for one in block]
    assert title not in [one.title for one in factors]
