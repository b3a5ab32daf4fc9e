"""`gaussian-errors.png`: how fast Gaussian output errors give K-FAC its output factor, on logarithmic axes."""

from pathlib import Path

from matplotlib.ticker import NullLocator

from natgrad.experiments.colours import COLOURS
from natgrad.experiments.figures import GREY, INK, PALE, new_figure, plain
from natgrad.experiments.newton import Convergence

_TICKS = tuple(digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5))


def draw(rate: Convergence, path: Path) -> None:
    """Draw measured and theoretical errors into a PNG file.

    Args:
        rate: What was measured.
        path: The file to write.
    """
    figure = new_figure(6, 4.2)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.12, right=0.97, top=0.91, bottom=0.12)
    axes.loglog(rate.samples, rate.theory, color=GREY, linewidth=1, label="theory, slope −½")
    label = f"measured, slope {rate.slope:.2f}".replace("-", "−")
    axes.loglog(
        rate.samples, rate.errors, color=COLOURS["kfac"].light, marker="o", markersize=5, linestyle="none", label=label
    )
    axes.set_title("Gaussian output errors give BBᵀ in expectation", fontsize=11, color=INK, loc="left")
    axes.set_xlabel("samples", color=INK)
    axes.set_ylabel("relative error of the output factor", color=INK)
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in _TICKS if low <= tick <= high])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(plain())
    axes.yaxis.set_major_formatter(plain())
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(which="major", color=PALE, linewidth=0.7)
    axes.legend(frameon=False, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, format="png")
