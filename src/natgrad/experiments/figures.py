"""What all of natgrad's plots share: a figure without a window, and plain numbers beside its axes."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from natgrad.experiments import colours

# Plots are for paper.
INK, GREY, PALE = colours.INK.light, colours.GREY.light, "#e8e8e8"


def new_figure(width: float, height: float, *, constrained: bool = False) -> Figure:
    """A figure of so many inches without pyplot: no window system, no global list of figures to clean up.

    Args:
        width: In inches.
        height: In inches.
        constrained: Let matplotlib find room for the labels.
    """
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)
    return figure


def plain() -> FuncFormatter:
    """Numbers as 0.01, 1 and 10,000."""
    return FuncFormatter(lambda value, _: f"{value:,g}")
