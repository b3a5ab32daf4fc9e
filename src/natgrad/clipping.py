"""Stage 6, where a bound is given: how far a natural gradient may go."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Gradient = Callable[[nn.Parameter], Tensor | None]
# From so many entries on, writing down their products takes longer than all else.
LARGE = 2**16


def clip_scale(
    natural: Mapping[nn.Parameter, Tensor],
    gradient: Gradient,
    bound: float,
    rates: Mapping[nn.Parameter, float] | None = None,
) -> float:
    """What to multiply Δ by so that gᵀΔ stays below ``bound`` (Ba, Grosse and Martens 2017, section 5).

    Args:
        natural: Δ, by parameter.
        gradient: g.
        bound: On Σ rate² gᵀΔ.
        rates: Of each parameter, if they are not 1.
    """
    faster = natural if rates is None else {p: direction * rates[p] ** 2 for p, direction in natural.items()}
    length = float(dot(faster, gradient)) if natural else 0.0
    return min(1.0, (bound / length) ** 0.5) if length > 0 else 1.0


def dot(direction: Mapping[nn.Parameter, Tensor], gradient: Gradient) -> Tensor:
    """Product of the loss's gradient with a direction."""
    products = [_inner(d, g) for p, d in direction.items() if (g := gradient(p)) is not None]
    return torch.stack(products).sum() if products else torch.zeros(())


def _inner(one: Tensor, other: Tensor) -> Tensor:
    if one.numel() < LARGE or one.dtype != other.dtype:
        return torch.sum(one * other)
    return torch.dot(one.flatten(), other.flatten())
