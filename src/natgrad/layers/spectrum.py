"""Squares of the gradients of single data: entry by entry in a basis, or as lengths in a metric.

With V_n = Σ_s g_s x_sᵀ the gradient of datum n, a sum over its positions, and bases Q_A, Q_G of its two sides,

    Σ_n (Q_Gᵀ V_n Q_A)²                 entry by entry; in units of the loss R times this is diag(Qᵀ F Q), Q = Q_G ⊗ Q_A

is the diagonal of the exact block in that basis, which EKFAC takes for eigenvalues. Rows are rotated first. With one
position it is then a single product, (g²)ᵀ (x²); with several the gradients of a few data at a time are built, so that
memory stays bounded. In a metric P_G ⊗ P_A the lengths

    Σ_n tr V_nᵀ P_G V_n P_A = Σ_n Σ_st (x_sᵀ P_A x_t) (g_sᵀ P_G g_t)

need them only where the positions are many.

Source: George et al. (2018), arXiv:1806.03884, section 3.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from natgrad.layers.moments import at_least_float32
from natgrad.products import product

Bases = tuple[Tensor, Tensor]
"""Q_A, ([B,] in [+ 1], in [+ 1]), and Q_G, ([B,] out, out); a column, of any values, stands for the identity."""

# Gradients of single data are built for so many entries at a time.
CHUNK = 2**24


def squared_gradients(x: Tensor, g: Tensor, bases: Bases) -> Tensor:
    """Σ_n (Q_Gᵀ V_n Q_A)², ([B,] out, in [+ 1]).

    Args:
        x: Rows of the input, ([B,] N, S, in); a 1 is appended if the basis has a place for it.
        g: Rows of the gradient, ([B,] N, S, out).
        bases: Of the two sides.
    """
    x, g = rotate_rows(extended(x, bases[0]), bases[0]), rotate_rows(at_least_float32(g), bases[1])
    if x.shape[-2] == 1:
        return g.squeeze(-2).square().mT @ x.squeeze(-2).square()
    total = x.new_zeros(())
    for some_x, some_g in a_few_at_a_time(x, g):
        total = total + (some_g.mT @ some_x).square().sum(-3)
    return total


def squared_length(x: Tensor, g: Tensor, metrics: Bases) -> Tensor:
    """Σ_n tr V_nᵀ P_G V_n P_A, a scalar; arguments as above, with P_A and P_G, where a column is a diagonal."""
    x, g = extended(x, metrics[0]), at_least_float32(g)
    if x.shape[-2] ** 2 <= x.shape[-1] * g.shape[-1]:
        longer_x, longer_g = times(x, metrics[0]), times(g, metrics[1])
        if x.shape[-2] == 1:
            return torch.sum((x * longer_x).sum(-1) * (g * longer_g).sum(-1))
        return torch.sum((x @ longer_x.mT) * (g @ longer_g.mT))
    total = x.new_zeros(())
    for some_x, some_g in a_few_at_a_time(x, g):
        V = some_g.mT @ some_x
        total = total + torch.sum(times(V, metrics[0]) * times(V.mT, metrics[1]).mT)
    return total


def extended(x: Tensor, factor: Tensor) -> Tensor:
    """Rows in the precision of statistics, with a 1 appended where they are shorter than ``factor`` by a bias."""
    x = at_least_float32(x)
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1) if x.shape[-1] < factor.shape[-2] else x


def a_few_at_a_time(x: Tensor, g: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of as many data as gradients may be built of at once."""
    blocks = max(x.shape[:-3].numel(), g.shape[:-3].numel())
    data = max(1, CHUNK // (blocks * x.shape[-1] * g.shape[-1]))
    return zip(*(rows.split(data, dim=-3) for rows in (x, g)), strict=True)


def rotate_rows(rows: Tensor, Q: Tensor) -> Tensor:
    """Rows ([B,] N, S, d) times Q."""
    if Q.shape[-1] == 1:
        return rows
    # As one product for all data: broadcast over them it would be a slow one for each.
    rotated: Tensor = product(rows.flatten(-3, -2), Q).unflatten(-2, rows.shape[-3:-1])
    return rotated


def times(rows: Tensor, P: Tensor) -> Tensor:
    """Rows ([B,] N, S, d) times a symmetric P, whose column is a diagonal."""
    return rows * P.mT.unsqueeze(-3) if P.shape[-1] == 1 else rotate_rows(rows, P)
