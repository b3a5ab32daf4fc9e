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
MOST_TICKS = 6


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
        """Those of the candidates that are on the axis; every second, third, … if they are many."""
        inside = [value for value in candidates if -1e-9 <= self(value) <= 1 + 1e-9]
        kept = inside[:: math.ceil(len(inside) / MOST_TICKS) or 1]
        return [Tick(self(value), text(value)) for value in kept]


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
    """log(1 + x / unit), which has a place for zero; ticks at zero and powers of ten."""
    scale = Scale(lambda x: math.log1p(x / unit), 0.0, math.log1p(max(*values, unit) / unit) * 1.02)
    first, last = math.ceil(math.log10(unit) - 1e-9), math.floor(math.log10(max(*values, unit)))
    powers = [10.0**k for k in range(first, last + 1)]
    fine = [factor * power for power in [10.0 ** (first - 1), *powers] for factor in (1, 2, 5)]
    return scale, [0.0, *(fine if len(powers) < 3 else powers)]


def logarithmic(values: Sequence[float]) -> tuple[Scale, list[float]]:
    """log x, with ticks at 1, 2 and 5 times the powers of ten, or at the powers alone if there are many."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.04 * (high - low), 0.05)
    scale = Scale(math.log10, low - margin, high + margin)
    powers = [10.0**k for k in range(math.floor(low - margin), math.ceil(high + margin) + 1)]
    return scale, powers if high - low > 2.5 else [factor * power for power in powers for factor in (1, 2, 5)]


def linear(values: Sequence[float]) -> tuple[Scale, list[float]]:
    """x itself, with ticks at multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    scale = Scale(lambda x: x, low - margin, high + margin)
    width = (scale.high - scale.low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(width))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)
    return scale, [k * step for k in range(math.floor(scale.low / step), math.ceil(scale.high / step) + 1)]


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
