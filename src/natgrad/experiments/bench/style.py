"""The look of the benchmark's plots: one colour a contestant, few lines, plain numbers."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's palette: distinguishable with any colour vision. natgrad has the strongest.
COLOURS = {
    "kfac": "#D55E00",
    "adamw": "#0072B2",
    "sgd": "#56B4E9",
    "muon": "#009E73",
    "soap": "#CC79A7",
    "shampoo": "#E69F00",
    "singd": "#8c8c8c",
}
INK, GREY, PALE = "#333333", "#8c8c8c", "#e8e8e8"


def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot: no window system, no global list of figures to clean up."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(axes: Axes, title: str, x_label: str, y_label: str = "") -> None:
    """Labels, grid and frame."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """As a PNG file."""
    figure.savefig(path, format="png")
