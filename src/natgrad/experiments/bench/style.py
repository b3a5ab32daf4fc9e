"""The look of the benchmark's plots: one colour a contestant, few lines, plain numbers."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from natgrad.experiments import colours
from natgrad.experiments.figures import INK, PALE, plain

# The same palette as the experiment's, of which these three are contestants too.
COLOURS = {
    "kfac": colours.COLOURS["kfac"].light,
    "adamw": colours.COLOURS["adam"].light,
    "sgd": colours.COLOURS["sgd"].light,
    "muon": "#009E73",
    "soap": "#CC79A7",
    "shampoo": "#E69F00",
    "singd": "#8c8c8c",
}


def finish(axes: Axes, title: str, x_label: str, y_label: str = "") -> None:
    """Labels, grid and frame."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """As a PNG file."""
    figure.savefig(path, format="png")
