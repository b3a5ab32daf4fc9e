"""Beside stage 7: by what a gradient scaler multiplies the loss, for gradients that half precision can tell.

It takes S out of the gradients of the parameters, but not out of the one at the output, g_f. So gᵀd, of the parameters'
gradient g, is what g_f · (J d) would be without it, along any direction d. The one is compared with the other along the
gradient itself, at the price of a pass of the model in forward mode. Gradients that were clipped look like those of a
scaler; but a scaler's number is a power of two.
"""

import math
import warnings
from functools import cache

from torch import Tensor

from natgrad.local_model import LocalModel

# A ratio beyond this says that something was multiplied; within it, that a batch is not the whole data.
NOISE = 4.0
# Off by so much in its logarithm, no ratio is a power of two. Nothing clips by more than LARGE.
POWER, LARGE = 0.02, 512.0


def compared(gradients: dict[str, Tensor], local: LocalModel) -> float:
    """gᵀd / (g_f · J d) along the gradients themselves, by parameter name; NaN where nothing is told."""
    there = local.slope(gradients)
    return sum(float(g.double().square().sum()) for g in gradients.values()) / there if there else math.nan


def told(ratio: float, before: float, noise: float) -> float:
    """S, from that ratio.

    Args:
        ratio: As it is now.
        before: S, if the loss is multiplied by what it was before.
        noise: The ratio may differ from that by so much.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        return before  # nothing is learnt
    if 1 / NOISE < ratio < NOISE:
        return 1.0
    if 1 / noise < ratio * before < noise:
        return before
    return max(1.0, 2.0 ** round(-math.log2(ratio)))  # scalers use powers of two


def unless_clipped(ratio: float) -> float:
    """S, from that ratio of all data; 1 for gradients that were clipped, of which it warns."""
    exponent = -math.log2(ratio) if ratio > 0 else 0.0
    if abs(exponent - round(exponent)) < POWER:
        return 2.0 ** round(exponent)
    if ratio < 1 / NOISE:
        _tell_of_clipping()
    return 1.0


@cache
def _tell_of_clipping() -> None:
    warnings.warn(
        "natgrad: the gradients of the parameters are less than a quarter as long as the one at the output says. If "
        "they were clipped, leave that out, as by `max_grad_norm=0.0` of a Trainer: natgrad finds out how far to go. "
        "If the loss has terms besides the one that natgrad was told of, declare them too.",
        RuntimeWarning,
        stacklevel=3,
    )
