"""Stage 7, first half: how much is added to the factors before they are inverted.

What enters are the factors A and G of one layer and the scale of the loss; what leaves is a :class:`Damping`, the
numbers λ_A, λ_G and δ in

    (G + λ_G I) ⊗ (A + λ_A I) + δ I.

A rule is a function from the factors to these. Three are enough:

- ``per_factor``: λ_A and λ_G as given.
- ``pi_split``: factored Tikhonov damping, λ_A = π √δ and λ_G = √δ / π with π² = mean diag A / mean diag G (Martens and
  Grosse 2015, arXiv:1503.05671, section 6.3).
- ``automatic``: λ_A relative to A, λ_G absolute in units of the loss's Hessian at the output, the same for every layer.
  Where G is tiny, as on a plateau, the π split gives A so much damping that the small directions of A, which carry the
  information, are masked; an absolute λ_G leaves A alone. Measured in ``docs/decisions.md``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of `automatic`: λ_A in units of the mean diagonal of A, λ_G in units of the loss's Hessian at the output.
RELATIVE_A, ABSOLUTE_G = 0.1, 3e-3


@dataclass(frozen=True)
class Damping:
    """What is added: to A, to G, and to their Kronecker product (in the eigenbasis only). Scalar tensors or numbers."""

    a: Tensor | float
    g: Tensor | float
    product: float = 0.0


DampingRule = Callable[[Tensor, Tensor, Tensor], Damping]
"""From A, G and the unit of output curvature in the loss (R times the number of data, a scalar) to the damping."""


def per_factor(a: float, g: float) -> DampingRule:
    """The same λ_A and λ_G for every layer."""
    return lambda A, G, unit: Damping(a, g)


def exact(delta: float) -> DampingRule:
    """δ added to the whole block, which only an eigendecomposition can invert."""
    return lambda A, G, unit: Damping(0.0, 0.0, delta)


def pi_split(delta: float) -> DampingRule:
    """δ split between the factors in proportion to their mean eigenvalues; equally where one of them is zero."""

    def rule(A: Tensor, G: Tensor, unit: Tensor) -> Damping:
        squared = mean_diagonal(A) / mean_diagonal(G)
        pi = torch.where((squared > 0) & squared.isfinite(), squared, 1.0).sqrt()
        return Damping(pi * delta**0.5, delta**0.5 / pi)

    return rule


def automatic(A: Tensor, G: Tensor, unit: Tensor) -> Damping:
    """λ_A relative to A, λ_G in units of the loss's Hessian at the output."""
    return Damping(RELATIVE_A * mean_diagonal(A), ABSOLUTE_G * unit)


def resolve(damping: float | tuple[float, float] | str, inverse: str) -> DampingRule:
    """The rule that a user's ``damping`` argument means for a way of inverting.

    Raises:
        ValueError: for a negative number or another word than ``"auto"``.
    """
    if damping == "auto":
        return automatic
    numbers = damping if isinstance(damping, tuple) else (damping,)
    if len(numbers) not in (1, 2) or not all(isinstance(number, float | int) and number >= 0 for number in numbers):
        raise ValueError(
            f'`damping` must be a number, a pair of numbers (for A, for G), none negative, or "auto"; not {damping!r}.'
        )
    if len(numbers) == 2:
        return per_factor(*map(float, numbers))
    return exact(float(numbers[0])) if inverse == "eigen" else pi_split(float(numbers[0]))


def mean_diagonal(factor: Tensor) -> Tensor:
    """tr F / dim F, averaged over blocks; of a dense factor, (…, d, d), or a diagonal one, (…, d, 1)."""
    return (factor if factor.shape[-1] == 1 else factor.diagonal(dim1=-2, dim2=-1)).mean()


def mean(dampings: Sequence[Damping]) -> dict[str, float]:
    """Means over the layers, for display."""
    n = len(dampings)
    return {
        "damping_a": float(sum(d.a for d in dampings)) / n,
        "damping_g": float(sum(d.g for d in dampings)) / n,
        "damping": sum(d.product for d in dampings) / n,
    }
