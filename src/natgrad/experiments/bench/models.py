"""The two cost models: how much longer a step takes than a plain one, and how that and the memory grow.

`overhead` is the ratio of mean steps, and how much the longest step exceeds the median, so that rare expensive steps
show. `scaling` fits powers: with y ∝ xᵉ, e is the slope of log y over log x by least squares.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from natgrad.experiments.bench.contestants import CONTESTANTS
from natgrad.experiments.bench.cost import PLAIN, Row, collect, ratio
from natgrad.experiments.bench.style import COLOURS, finish, save
from natgrad.experiments.figures import GREY, new_figure
from natgrad.experiments.settings import SettingsError
from natgrad.experiments.table import Sheet

AXES = ("article", "fresh", "batch", "width", "depth", "period")
# Where the name of an axis does not say it.
LABELS = {"article": "article: images a step", "fresh": "article, all fresh: images a step"}
SCALED = ("batch", "width", "depth")


def overhead(path: Path, axes: Sequence[str], contestants: Sequence[str], steps: int, console: Console) -> None:
    """Measure what is missing, and write ``overhead.md`` and ``overhead.png``.

    Raises:
        SettingsError: There is no such axis or contestant.
    """
    for axis in axes:
        if axis not in AXES:
            raise SettingsError(f"unknown axis {axis!r}: choose from {', '.join(AXES)}")
    rows = collect(path, axes, contestants, steps, console)
    sheet = overhead_sheet(rows)
    sheet.show(console)
    (path / "overhead.md").write_text(sheet.markdown())
    _draw(rows, path / "overhead.png")


def scaling(path: Path, contestants: Sequence[str], steps: int, console: Console) -> None:
    """Measure what is missing, and write ``scaling.md``."""
    rows = collect(path, SCALED, contestants, steps, console)
    sheet = scaling_sheet(rows)
    sheet.show(console)
    (path / "scaling.md").write_text(sheet.markdown())


def overhead_sheet(rows: Sequence[Row]) -> Sheet:
    """Ratios to plain SGD, case by case."""
    lines: list[tuple[str, ...] | None] = []
    axis = ""
    for row in rows:
        if row.contestant == PLAIN:
            continue
        lines += [None] if axis not in ("", row.axis) else []
        axis = row.axis
        lines.append(
            (
                f"{row.axis} {row.value:,}",
                CONTESTANTS[row.contestant].label,
                f"{row.mean:.3g}",
                f"{ratio(row, rows):.2f}",
                f"{row.largest / row.median:.2f}",
                str(row.steps),
            )
        )
    header = ("case", "optimizer", "seconds", "× plain", "longest / median", "steps")
    return Sheet("A step, over forward + backward + SGD (means)", header, lines, text_columns=2)


def scaling_sheet(rows: Sequence[Row]) -> Sheet:
    """Exponents of the plain step, of what a contestant adds to it, and of the memory it keeps."""
    lines: list[tuple[str, ...] | None] = []
    for axis in dict.fromkeys(row.axis for row in rows):
        plain = {row.value: row.mean for row in rows if (row.axis, row.contestant) == (axis, PLAIN)}
        lines += [None] if lines else []
        lines.append((axis, "plain step", exponent(plain), "", ""))
        for name in dict.fromkeys(row.contestant for row in rows if row.contestant != PLAIN):
            own = [row for row in rows if (row.axis, row.contestant) == (axis, name)]
            added = exponent({row.value: row.mean - plain[row.value] for row in own})
            state = exponent({row.value: row.state for row in own})
            estimated = [f"{row.state / row.estimate:.2f}" for row in own if row.estimate]
            lines.append((axis, CONTESTANTS[name].label, added, state, " ".join(estimated)))
    header = ("of", "optimizer", "time", "state", "state / describe's estimate")
    note = "time: of the plain step itself, and of what the optimizer adds to it; state: bytes kept between steps."
    return Sheet("Exponents e of growth, xᵉ", header, lines, [note], text_columns=2)


def exponent(values: dict[int, float]) -> str:
    """The fitted power of y in x; empty where there is nothing to fit, as where nothing is added."""
    points = [(math.log(x), math.log(y)) for x, y in values.items() if y > 0]
    if len(points) < 2 or len({x for x, _ in points}) < 2:
        return ""
    return f"{statistics.linear_regression(*zip(*points, strict=True)).slope:.2f}"


def _draw(rows: Sequence[Row], path: Path) -> None:
    axes = list(dict.fromkeys(row.axis for row in rows))
    figure = new_figure(2.6 * len(axes), 2.9, constrained=True)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for name in dict.fromkeys(row.contestant for row in rows if row.contestant != PLAIN):
            own = [row for row in rows if (row.axis, row.contestant) == (axis, name)]
            style = {"color": COLOURS[name], "marker": "o", "markersize": 4, "label": CONTESTANTS[name].label}
            panel.plot([row.value for row in own], [ratio(row, rows) for row in own], **style)
        panel.axhline(1, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        ticks = sorted({row.value for row in rows if row.axis == axis})
        panel.set_xticks(ticks)
        panel.minorticks_off()
        finish(
            panel,
            "",
            LABELS.get(axis, axis),
            "× plain step" if axis == axes[0] else "",
        )
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)
