"""`curves.png`: the test loss against steps and against training time, on logarithmic axes.

Colour is the contestant's, the same in every plot; runs compared with each other differ by line style. Where the
problem is the article's own, its curves of 2017 are thin grey lines behind the steps, and Adam's best of 2017 is a
dotted line behind the times.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator

from natgrad.experiments.colours import COLOURS
from natgrad.experiments.colours import INK as OTHER
from natgrad.experiments.curves import Curve, Run, recorded
from natgrad.experiments.figures import GREY, INK, PALE, new_figure, plain

_STYLES = ("-", "--", ":", "-.")
# Where the name of a recorded curve stands: left-aligned below its minimum, or where that is crowded, right-aligned at
# this step and so many points above it.
_NAMES_AT = {("relu", "adam"): (200, -9.0), ("relu", "sgd"): (99_999, 7.0)}
_LOSS_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100)


def draw(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draw the test losses of one or several runs into a PNG file.

    Args:
        runs: The runs to overlay.
        title: What was run; shown above the plot.
        path: The file to write.
    """
    figure = new_figure(11, 5)
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.055, right=0.985, top=0.86, bottom=0.11, wspace=0.06)
    figure.text(0.055, 0.945, "Test loss of a deep autoencoder on MNIST", fontsize=13, weight="bold", color=INK)
    figure.text(0.055, 0.895, title, fontsize=9.5, color=GREY)
    for nonlinearity in _references(runs):
        _draw_recorded(by_steps, by_seconds, nonlinearity)
    for curve, style in _styled(runs):
        _draw_curve(by_steps, [(p.step, p.test_loss) for p in curve.points], curve, style)
        # No time had passed at step 0, which a logarithmic axis cannot show.
        _draw_curve(by_seconds, [(p.seconds, p.test_loss) for p in curve.points if p.seconds], curve, style)
    # Symmetric-log, so that step 0, where everybody starts together, is on the axis.
    by_steps.set_xscale("symlog", linthresh=1, linscale=0.3)
    by_seconds.set_xscale("log")
    _finish(by_steps, "steps")
    _finish(by_seconds, "training seconds")
    by_steps.set_xlim(left=0)  # The margin would show a negative step.
    by_steps.set_ylabel("half squared error per image", color=INK)
    if by_seconds.lines:
        # The corner that every curve that has started above its best leaves free.
        by_seconds.legend(loc="lower left", frameon=False, labelcolor=INK, fontsize=10)
    figure.savefig(path, format="png")


def _references(runs: Sequence[Run]) -> list[str]:
    """The nonlinearities whose curves of 2017 are of the very problem that was run."""
    return list(dict.fromkeys(run.settings.nonlinearity for run in runs if run.settings.is_full_size))


def _styled(runs: Sequence[Run]) -> Iterator[tuple[Curve, str]]:
    """All curves with their line styles, one style a run."""
    for run, style in zip(runs, cycle(_STYLES), strict=False):
        yield from ((curve, style) for curve in run.curves.values() if curve.points)


def _draw_recorded(by_steps: Axes, by_seconds: Axes, nonlinearity: str) -> None:
    curves = recorded(nonlinearity)
    for curve in curves.values():
        steps, losses = zip(*((p.step, p.test_loss) for p in curve.points), strict=True)
        by_steps.plot(steps, losses, color=GREY, linewidth=0.8, alpha=0.7)
        _name_recorded(by_steps, curve, nonlinearity)
    if (best := curves["adam"].best) is not None:
        by_seconds.axhline(best.test_loss, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
        by_seconds.annotate(
            f"Adam's best in 2017: {best.test_loss:.4g} after {best.step:,} steps",
            (0.01, best.test_loss),
            xycoords=("axes fraction", "data"),
            **_note(-9),
        )


def _name_recorded(axes: Axes, curve: Curve, nonlinearity: str) -> None:
    best = curve.best
    assert best is not None  # The recorded curves are complete.
    name = f"{curve.label}, 2017"
    if (crowded := _NAMES_AT.get((nonlinearity, curve.optimizer))) is None:
        axes.annotate(name, (best.step, best.test_loss), **_note(-9))
    else:
        step, above = crowded
        loss = next(p.test_loss for p in curve.points if p.step >= step)
        axes.annotate(name, (step, loss), ha="right", **_note(above))


def _note(points: float) -> dict[str, Any]:
    """The look of a small grey note, its baseline so many points above what it annotates."""
    return {"xytext": (0, points), "textcoords": "offset points", "fontsize": 7.5, "color": GREY}


def _draw_curve(axes: Axes, points: Sequence[tuple[float, float]], curve: Curve, style: str) -> None:
    if not points:
        return
    colour = COLOURS.get(curve.optimizer, OTHER).light
    x, best = min(points, key=lambda point: point[1])
    label = f"{curve.label}, best {best:.3g}"
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.9, linestyle=style, label=label)
    axes.plot([x], [best], marker="o", markersize=4.5, color=colour)


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, color=INK)
    axes.set_yscale("log")
    axes.margins(x=0.08, y=0.06)
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in _LOSS_TICKS if low <= tick <= high])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(plain())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain())
    axes.grid(which="major", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
