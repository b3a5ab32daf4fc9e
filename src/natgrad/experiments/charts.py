"""Line charts for a page: from numbers to positions between 0 and 1, which a browser stretches to any width.

A :class:`Chart` is what is to be drawn, a :class:`Drawing` where. Both axes grow from the lower left corner. The page
draws the lines as one stretched picture and the texts above it, so that texts keep their size on a telephone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from natgrad.experiments.colours import Colour

Points = Sequence[tuple[float, float]]

# Of a curve, so many points at most are drawn: about one for every second pixel.
MOST_POINTS = 400
# Between two ticks lies at least this share of the axis, so that their texts do not touch on a telephone.
TICK_ROOM = 0.13


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), its colour, and how it is dashed (in pixels, as SVG writes it; empty is solid)."""

    label: str
    points: Points
    colour: Colour
    dash: str = ""


@dataclass(frozen=True)
class Chart:
    """What is to be drawn.

    Attributes:
        title: Above it.
        x_label, y_label: With units.
        series: The lines; points that are not on a logarithmic axis are left out.
        linear: Whether the vertical axis is linear and not logarithmic.
        x_unit: Below this value of x, the horizontal axis is linear; above, logarithmic.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    linear: bool = False
    x_unit: float = 1.0


@dataclass(frozen=True)
class Tick:
    """A number beside an axis, at ``at`` between 0 and 1."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A drawn series: its points as (position, position, x as text, y as text)."""

    label: str
    colour: Colour
    dash: str
    points: list[tuple[float, float, str, str]]


@dataclass(frozen=True)
class Drawing:
    """Where everything is."""

    chart: Chart
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]


@dataclass(frozen=True)
class Scale:
    """An axis: ``transform`` makes values evenly spaced; from ``low`` to ``high``, both transformed."""

    transform: Callable[[float], float]
    low: float
    high: float

    def __call__(self, value: float) -> float:
        """The position of a value, 0 to 1."""
        return (self.transform(value) - self.low) / (self.high - self.low)

    def ticks(self, candidates: Iterable[float]) -> list[Tick]:
        """Those of the candidates that are on the axis and have room; the earlier ones go first."""
        kept: list[Tick] = []
        for value in candidates:
            tick = Tick(self(value), text(value))
            if -1e-9 <= tick.at <= 1 + 1e-9 and all(abs(tick.at - other.at) >= TICK_ROOM for other in kept):
                kept.append(tick)
        return kept


def draw(chart: Chart) -> Drawing | None:
    """Positions of everything in a chart; None if there is no point to draw."""
    series = [(one, _drawable(one.points, chart.linear)) for one in chart.series]
    points = [point for _, points in series for point in points]
    if not points:
        return None
    x, x_candidates = since_zero([x for x, _ in points], chart.x_unit)
    y, y_candidates = (linear if chart.linear else logarithmic)([y for _, y in points])
    lines = [
        Line(one.label, one.colour, one.dash, [(_short(x(a)), _short(y(b)), text(a), text(b)) for a, b in thin(own, x)])
        for one, own in series
        if own
    ]
    return Drawing(chart, x.ticks(x_candidates), y.ticks(y_candidates), lines)


def since_zero(values: Sequence[float], unit: float) -> tuple[Scale, list[float]]:
    """log(1 + x / unit), which has a place for zero."""
    highest = max(*values, unit)
    scale = Scale(lambda x: math.log1p(x / unit), 0.0, 1.02 * math.log1p(highest / unit))
    return scale, [0.0, *([tick for tick in round_numbers(unit, highest) if unit <= tick <= highest] or [highest])]


def logarithmic(values: Sequence[float]) -> tuple[Scale, list[float]]:
    """log x."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = 0.04 * (high - low) or 0.3
    scale = Scale(math.log10, low - margin, high + margin)
    _, between = linear([10**scale.low, 10**scale.high])
    within_a_decade = high - low < 1  # where 1, 2, 5 and 10 are too few
    ticks = [tick for tick in between if tick > 0]
    return scale, ticks if within_a_decade else round_numbers(10**scale.low, 10**scale.high)


def linear(values: Sequence[float]) -> tuple[Scale, list[float]]:
    """x itself, with ticks at multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    scale = Scale(lambda x: x, low - margin, high + margin)
    width = TICK_ROOM * (scale.high - scale.low)
    power = 10.0 ** math.floor(math.log10(width))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)
    return scale, [k * step for k in range(math.floor(scale.low / step), math.ceil(scale.high / step) + 1)]


def round_numbers(low: float, high: float) -> list[float]:
    """From the power of ten below ``low`` on: first the powers of ten, then 5 times and 2 times those."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    return [factor * power for factor in (1, 5, 2) for power in powers]


def thin(points: Points, x: Scale) -> Points:
    """At most one point for each part of the axis, the last one in it, and the lowest of all."""
    kept = {math.floor(x(point[0]) * MOST_POINTS): point for point in points}
    lowest = min(points, key=lambda point: point[1])
    return sorted({*kept.values(), lowest})


def text(value: float) -> str:
    """A number in few characters: 0.003, 1e-5, 12.5, 10,000."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{float(f'{value:.4g}'):,.10g}"


def _drawable(points: Points, linear: bool) -> Points:
    return [(x, y) for x, y in points if math.isfinite(y) and (linear or y > 0)]


def _short(position: float) -> float:
    return round(position, 4)
