"""Stage 6, where a bound is given: how far a natural gradient may go."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def clip_scale(natural: dict[nn.Parameter, Tensor], bound: float, rates: Mapping[Tensor, float] | None = None) -> float:
    """What to multiply Δ by so that gᵀΔ stays below ``bound`` (Ba, Grosse and Martens 2017, section 5).

    Args:
        natural: Δ, by parameter.
        bound: On Σ rate² gᵀΔ.
        rates: Of each parameter, if it is not 1.
    """
    rates = rates or {}
    products = [torch.sum(d * p.grad) * rates.get(p, 1.0) ** 2 for p, d in natural.items() if p.grad is not None]
    length = float(torch.stack(products).sum()) if products else 0.0
    return min(1.0, (bound / length) ** 0.5) if length > 0 else 1.0
