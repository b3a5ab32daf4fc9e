"""The colours of plots and pages: a contestant has the same everywhere, one for paper and one for a dark screen."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.colors import to_hex


class Colour(NamedTuple):
    """One colour, as it looks on a light and on a dark ground."""

    light: str
    dark: str


# Okabe and Ito's palette: distinguishable with any colour vision. K-FAC, what the plots are about, has the strongest.
COLOURS = {
    "kfac": Colour("#D55E00", "#FF8B3D"),
    "adam": Colour("#0072B2", "#4FA8E8"),
    "sgd": Colour("#56B4E9", "#9BD7FA"),
    "kfac-sgd": Colour("#009E73", "#2CCB9C"),
    "kfac-adam": Colour("#CC79A7", "#EBA6CA"),
}
INK = Colour("#333333", "#dddddd")
GREY = Colour("#8c8c8c", "#8c8c8c")


def ordered(count: int) -> Sequence[Colour]:
    """Colours of things in an order, such as layers: viridis without its end that the ground swallows."""
    viridis = colormaps["viridis"]
    shares = [i / max(count - 1, 1) for i in range(count)]
    return [Colour(to_hex(viridis(0.85 * share)), to_hex(viridis(0.28 + 0.72 * share))) for share in shares]
