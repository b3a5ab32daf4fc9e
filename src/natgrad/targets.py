"""What one pass tells of the number that multiplies the declared loss, by its module or by its targets.

Where targets are bounded no gradient at the output is longer than they allow, and that at a label is as long: see
:mod:`natgrad.multiplier`.
"""

import math

import torch
from torch import Tensor

from natgrad.forward import Forward
from natgrad.layers import at_least_float32
from natgrad.likelihoods import Likelihood

# The targets are looked at in so many data at most, and in so many entries.
DATA, ENTRIES = 64, 4096
# The largest ratios are S s if what they are divided by differs so many times more than they do, and by so much at
# least: soft targets, of share q of the reach, would show up to the error q.
EVIDENCE, VARIETY = 10.0, 0.01


def at_least(forward: Forward, likelihood: Likelihood, terms: float) -> tuple[float, bool]:
    """A lower bound of S s from one forward and backward pass, and whether it is S s itself.

    Args:
        forward: The pass.
        likelihood: Of the declared loss.
        terms: What the declared loss's reduction divides by.

    Returns:
        The bound, 0 where nothing is known, and whether it is attained.
    """
    if forward.multiplier is not None and (number := float(forward.multiplier)):
        if number < 0:
            raise ValueError(
                f"the loss that natgrad was given enters the training loop's loss times {number:g}, and natgrad "
                "minimizes it: change the sign, or give natgrad the module of another loss."
            )
        # The module's value has the divisor of this pass alone, the declared loss that of all passes of the step.
        return number * likelihood.scale(forward.terms(likelihood)) / likelihood.scale(terms), True
    if forward.gradient is None or not forward.gradient.numel() or forward.find is not None:
        return 0.0, False
    data = len(forward.output)
    enough = data if forward.lengths else min(DATA, max(1, ENTRIES * data // forward.output.numel()))
    some = slice(None, None, max(1, data // enough))
    g = forward.gradient[some]
    reach = likelihood.reach(at_least_float32(forward.output[some]), g)
    if reach is None:
        return 0.0, False
    if forward.weights is not None:
        reach = reach * forward.weights.curvature[some]
    precision = torch.finfo(forward.output.dtype)
    # In 1 − p digits cancel, in p they do not.
    kept = (g.abs() > 64 * precision.tiny * precision.eps) & ((g > 0) | (reach > precision.eps**0.5))
    kept &= reach.isfinite() & (reach > 0)
    return _top(g.abs()[kept], likelihood.scale(terms) * reach[kept], likelihood.of_labels)


def emphasis(forward: Forward) -> float:
    """What the loop's loss multiplies each criterion of a pass by; NaN where the pass does not tell."""
    if forward.likelihood is None or (forward.multiplier is not None and float(forward.multiplier) < 0):
        return math.nan
    terms = forward.terms(forward.likelihood)
    bound, attained = at_least(forward, forward.likelihood, terms)
    return bound * forward.likelihood.scale(terms) if attained else math.nan


def _top(size: Tensor, reach: Tensor, of_labels: bool) -> tuple[float, bool]:
    """The largest of size / reach, up to outliers, and whether many share it; of labels alone all do."""
    if not size.numel():
        return 0.0, False
    if size.numel() > ENTRIES:
        # At random, lest a regular pattern meet one output only.
        at = torch.randint(size.numel(), (ENTRIES,), generator=torch.Generator().manual_seed(0)).to(size.device)
        size, reach = size[at], reach[at]
    ratio = size / reach
    low, top = _quantiles(ratio, 0.75, 0.95)
    least, most = _quantiles(reach[ratio >= low], 0.05, 0.95)
    variety, apart = 1 - least / most, EVIDENCE * (1 - low / top)
    return top, variety > max(VARIETY, apart) or (of_labels and apart < VARIETY)


def _quantiles(values: Tensor, *shares: float) -> list[float]:
    """Those of the values that are above so many of them; torch's own takes several times as long for a few."""
    least_first: list[float] = values.sort().values[[round(share * (len(values) - 1)) for share in shares]].tolist()
    return least_first
