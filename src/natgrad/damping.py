"""Stage 7, first half: how much is added to the factors before they are inverted.

What enters are the factors A and G of one layer, the number of rows that a batch gives them and the scale of the loss;
what leaves is a :class:`Damping`, the numbers λ_A, λ_G and δ in

    (G + λ_G I) ⊗ (A + λ_A I) + δ I.

A rule is a function from the factors to these. Three are enough:

- ``per_factor``: λ_A and λ_G as given.
- ``pi_split``: factored Tikhonov damping, λ_A = π √δ and λ_G = √δ / π with π² = mean diag A / mean diag G (Martens and
  Grosse 2015, arXiv:1503.05671, section 6.3).
- ``automatic``: λ_A relative to A, λ_G absolute in units of the loss's Hessian at the output, the same for every layer.
  Where G is tiny, as on a plateau, the π split gives A so much damping that the small directions of A, which carry the
  information, are masked; an absolute λ_G leaves A alone. A batch that determines a factor well is trusted in its small
  directions. One that does not sees mostly noise there: then A is damped to a multiple of the identity, and G, which
  says how outputs interact, is trusted the more. Measured in ``docs/decisions.md``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Of `automatic`: λ_A in units of the mean diagonal of A, λ_G in units of the loss's Hessian at the output; for layers
# whose factors a batch determines, and for the others.
DETERMINED, NOISY = (0.1, 3e-3), (30.0, 3e-4)


@dataclass(frozen=True)
class Damping:
    """What is added: to A, to G, and to their Kronecker product (in the eigenbasis only). Scalar tensors or numbers."""

    a: Tensor | float
    g: Tensor | float
    product: float = 0.0


class DampingRule(Protocol):
    """From the factors of a layer to their damping."""

    def __call__(self, A: Tensor, G: Tensor, unit: Tensor, determined: bool) -> Damping:
        """The damping.

        Args:
            A: ([B,] in [+ 1], in [+ 1]), or a column if kept as a diagonal.
            G: ([B,] out, out), or a column.
            unit: What a unit of curvature at one entry of every output is in units of the loss; a scalar.
            determined: Whether one batch has enough rows to determine the factors by itself.
        """


def per_factor(a: float, g: float) -> DampingRule:
    """The same λ_A and λ_G for every layer."""
    return lambda A, G, unit, determined: Damping(a, g)


def exact(delta: float) -> DampingRule:
    """δ added to the whole block, which only an eigendecomposition can invert."""
    return lambda A, G, unit, determined: Damping(0.0, 0.0, delta)


def pi_split(delta: float) -> DampingRule:
    """δ split between the factors in proportion to their mean eigenvalues; equally where one of them is zero."""

    def rule(A: Tensor, G: Tensor, unit: Tensor, determined: bool) -> Damping:
        squared = mean_diagonal(A) / mean_diagonal(G)
        pi = torch.where((squared > 0) & squared.isfinite(), squared, 1.0).sqrt()
        return Damping(pi * delta**0.5, delta**0.5 / pi)

    return rule


def automatic(A: Tensor, G: Tensor, unit: Tensor, determined: bool) -> Damping:
    """λ_A relative to A, λ_G in units of the loss's Hessian at the output."""
    relative_a, absolute_g = DETERMINED if determined else NOISY
    return Damping(relative_a * mean_diagonal(A), absolute_g * unit)


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
    return pi_split(float(numbers[0])) if inverse == "cholesky" else exact(float(numbers[0]))


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
