"""Stage 7, first half: how much is added to the factors before they are inverted.

What enters are the factors A and G of one layer and an :class:`Evidence`; what leaves is a :class:`Damping`, the
numbers λ_A, λ_G and δ in

    (G + λ_G I) ⊗ (A + λ_A I) + δ I.

A rule is a function from the one to the other. There are four:

- ``per_factor``: λ_A and λ_G as given.
- ``exact``: δ as given, and neither of the two, for inverses that know the eigenvalues of the product.
- ``pi_split``: factored Tikhonov damping, λ_A = π √δ and λ_G = √δ / π with π² = mean diag A / mean diag G (Martens and
  Grosse 2015, arXiv:1503.05671, section 6.3).
- ``automatic``: λ_A from what the data say of noise, λ_G from the curvature of the whole network.

A step (·) A⁻¹ is a linear regression of what the layer's outputs should become on its inputs. If the N data are noisy,
it has a best ridge. With inputs of covariance A of d dimensions, weights that should change by independent amounts of
variance τ², and noise of variance σ², it is λ = σ² / (N τ²). Measured in the metric of the step itself the gradient ḡ
has

    signal   E ḡᵀ A⁻¹ ḡ − noise = τ² tr A        noise   d σ² / N

so λ_A = (tr A / d) · noise / signal: nothing but the data sets it. A plateau, where gradients are tiny and yet agree,
gets almost none; a minibatch whose gradients are mostly noise gets several times the mean of A. Inputs often have one
direction far larger than all others, their mean. The regression is about the others, and as long as nobody has moved
there, their scale is not known: it is taken between the mean eigenvalue with the largest and that without.

But data whose gradients differ may still ask for the same step. Whether they do is seen when the next batch has come
(:mod:`natgrad.trust`): as far as it does not confirm half of what a step promised, the noise counts, by the square.
Gradients that are averaged over batches have lost most of their noise, so that it counts even less than where all is
confirmed.
Where rates are given nothing is promised and noise is not measured, and no direction of little curvature is trusted:
λ_A is at its upper bound.

λ_G bounds how far the outputs of a layer move, where the loss is not quadratic in them. It is the same for every layer,
as the small G of a layer on a plateau says nothing about how far it may go. Whether the first steps want more of it is
found by trying (:mod:`natgrad.stiffness`). Steps along averaged gradients are short, and there every layer goes by its
own. Measured in ``docs/decisions.md``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

# Of `automatic`: the ridge in units of the one derived above, λ_G in units of the network's mean curvature of an
# output.
RIDGE, STIFFNESS = 30.0, 0.3
# λ_G for averaged gradients, in units of the layer's own mean curvature, which counts for no less than so much of the
# network's.
AVERAGED_STIFFNESS, LEAST_OWN = 0.1, 0.01
# So much of the noise counts, squared, even where all is confirmed: what overfits is confirmed by the same batch again.
# Of averaged gradients less, as they have less of it.
LEAST_DOUBT, AVERAGED_DOUBT = 0.2, 0.1
# λ_A stays between these, in units of the mean eigenvalue of A: below, float32 inverts badly; above, A makes no
# difference any more, and layers with little evidence would only stand still beside the others.
LEAST, MOST = 1e-3, 5.0
# For averaged gradients, whose batches are others than those of the factors, no less than this.
AVERAGED_LEAST = 0.3
POWER_ITERATIONS = 8


@dataclass(frozen=True)
class Evidence:
    """What the batch says about one layer.

    Attributes:
        noise_to_signal: Of the gradient, in the metric of the step.
        curvature: Mean diagonal of G over all layers.
        confirmed: Of the fall of the loss that steps promised, the share that the batches after them confirmed.
        ease: What both dampings are multiplied by.
        averaged: Whether gradients are averaged over batches.
        stiffening: What λ_G is multiplied by besides, unless they are.
    """

    noise_to_signal: float
    curvature: float
    confirmed: float = 0.0
    ease: float = 1.0
    averaged: bool = False
    stiffening: float = 1.0


@dataclass(frozen=True)
class Damping:
    """What is added: to A, to G, and to their Kronecker product (in the eigenbasis only). Scalar tensors or numbers."""

    a: Tensor | float
    g: Tensor | float
    product: float = 0.0


class DampingRule(Protocol):
    """From the factors of a layer to their damping; one that can be pickled."""

    def __call__(self, A: Tensor, G: Tensor, evidence: Evidence) -> Damping:
        """The damping.

        Args:
            A: ([B,] in [+ 1], in [+ 1]), or a column if kept as a diagonal.
            G: ([B,] out, out), or a column.
            evidence: What the batch says about the layer.
        """


def per_factor(a: float, g: float) -> DampingRule:
    """The same λ_A and λ_G for every layer."""
    return partial(_given, Damping(a, g))


def exact(delta: float) -> DampingRule:
    """δ added to the whole block, which only an eigendecomposition can invert."""
    return partial(_given, Damping(0.0, 0.0, delta))


def _given(damping: Damping, A: Tensor, G: Tensor, evidence: Evidence) -> Damping:
    return damping


def pi_split(delta: float) -> DampingRule:
    """δ split between the factors in proportion to their mean eigenvalues; equally where one of them is zero."""
    return partial(_split, delta)


def _split(delta: float, A: Tensor, G: Tensor, evidence: Evidence) -> Damping:
    squared = mean_diagonal(A) / mean_diagonal(G)
    pi = torch.where((squared > 0) & squared.isfinite(), squared, 1.0).sqrt()
    return Damping(pi * delta**0.5, delta**0.5 / pi)


def automatic(A: Tensor, G: Tensor, evidence: Evidence) -> Damping:
    """λ_A from noise and signal, λ_G from the curvature of the whole network; a single input needs no λ_A."""
    averaged, ease = evidence.averaged, evidence.ease
    stiffness: Tensor | float = STIFFNESS * evidence.curvature * ease * evidence.stiffening
    if averaged:
        stiffness = AVERAGED_STIFFNESS * ease * mean_diagonal(G).clamp(min=LEAST_OWN * evidence.curvature)
    if A.shape[-2] == 1:
        return Damping(0.0, stiffness)
    mean = mean_diagonal(A)
    doubt = AVERAGED_DOUBT if averaged else max(1 - 2 * evidence.confirmed, LEAST_DOUBT)
    ridge = RIDGE * ease * evidence.noise_to_signal * doubt**2 * (mean * mean_without_largest(A)).sqrt()
    least = max(AVERAGED_LEAST * ease, LEAST) if averaged else LEAST
    return Damping(ridge.clamp(least * mean, MOST * mean), stiffness)


def resolve(damping: float | tuple[float, float] | str, inverse: str) -> DampingRule:
    """The rule that a user's ``damping`` argument means for a way of inverting.

    Raises:
        ValueError: for a negative number or another word than ``"auto"``.
    """
    if damping == "auto":
        return automatic
    numbers = damping if isinstance(damping, tuple) else (damping,)
    are_numbers = all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers)
    if len(numbers) not in (1, 2) or not are_numbers or not all(float(number) >= 0 for number in numbers):
        raise ValueError(
            f'`damping` must be a number, a pair of numbers (for A, for G), none negative, or "auto"; not {damping!r}.'
        )
    if len(numbers) == 2:
        return per_factor(*map(float, numbers))
    return pi_split(float(numbers[0])) if inverse == "cholesky" else exact(float(numbers[0]))


def mean_diagonal(factor: Tensor) -> Tensor:
    """tr F / dim F, averaged over blocks; of a dense factor, (…, d, d), or a diagonal one, (…, d, 1)."""
    return (factor if factor.shape[-1] == 1 else factor.diagonal(dim1=-2, dim2=-1)).mean()


def mean_curvature(factors: Sequence[Tensor]) -> float:
    """Mean diagonal entry of the G of several layers, all of their outputs counting alike."""
    if not factors:
        return 0.0
    here = factors[0].device  # which is waited for once, not for every layer
    traces = [mean_diagonal(G).double().to(here) * G.shape[-2] for G in factors]
    return float(torch.stack(traces).sum()) / sum(G.shape[-2] for G in factors)


def mean_without_largest(factor: Tensor) -> Tensor:
    """The mean eigenvalue of all but the largest, averaged over blocks; the eigenvalue itself if there is only one."""
    size = factor.shape[-2]
    if size == 1:
        return factor.mean()
    diagonal = factor.squeeze(-1) if factor.shape[-1] == 1 else factor.diagonal(dim1=-2, dim2=-1)
    # In the sum of the rows, an eigenvector of the mean is well represented.
    start = factor.sum(-1, keepdim=True)
    largest = diagonal.amax(-1) if factor.shape[-1] == 1 else power_iteration(factor, start, POWER_ITERATIONS)
    return ((diagonal.sum(-1) - largest) / (size - 1)).clamp(min=0).mean()


def power_iteration(factor: Tensor, v: Tensor, rounds: int) -> Tensor:
    """The largest eigenvalue of a positive semi-definite factor, ([B,] d, d), from below; ([B])."""
    for _ in range(rounds):
        v = factor @ (v / v.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny))
    largest: Tensor = v.norm(dim=-2).squeeze(-1)
    return largest


def mean(dampings: Sequence[Damping]) -> dict[str, float]:
    """Means over the layers, for display."""
    n = len(dampings)
    return {
        "damping_a": float(sum(d.a for d in dampings)) / n,
        "damping_g": float(sum(d.g for d in dampings)) / n,
        "damping": sum(d.product for d in dampings) / n,
    }
