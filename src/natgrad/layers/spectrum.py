"""Second moments of the data's gradients in a basis, which EKFAC takes for the eigenvalues of a block.

With V_n = Σ_s g_s x_sᵀ the gradient of datum n, a sum over its positions, and bases Q_A, Q_G of its two sides,

    Σ_n (Q_Gᵀ V_n Q_A)²                 entry by entry; in units of the loss R times this is diag(Qᵀ F Q), Q = Q_G ⊗ Q_A

is the diagonal of the exact block in that basis. Rows are rotated first. With one position it is then a single product,
(g²)ᵀ (x²); with several the gradients of a few data at a time are built, so that memory stays bounded.

Source: George et al. (2018), arXiv:1806.03884, section 3.
"""

import torch
from torch import Tensor

from natgrad.layers.moments import at_least_float32

Bases = tuple[Tensor, Tensor]
"""Q_A, ([B,] in [+ 1], in [+ 1]), and Q_G, ([B,] out, out); a column, of any values, stands for the identity."""

# Gradients of single data are built for so many entries at a time.
CHUNK = 2**24


def squared_gradients(x: Tensor, g: Tensor, bias: bool, bases: Bases) -> Tensor:
    """Σ_n (Q_Gᵀ V_n Q_A)², ([B,] out, in [+ 1]).

    Args:
        x: Rows of the input, ([B,] N, S, in).
        g: Rows of the gradient, ([B,] N, S, out).
        bias: Whether a 1 is appended to each row of x.
        bases: Of the two sides.
    """
    x, g = at_least_float32(x), at_least_float32(g)
    if bias:
        x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
    x, g = rotate_rows(x, bases[0]), rotate_rows(g, bases[1])
    if x.shape[-2] == 1:
        return g.squeeze(-2).square().mT @ x.squeeze(-2).square()
    blocks = max(x.shape[:-3].numel(), g.shape[:-3].numel())
    data = max(1, CHUNK // (blocks * x.shape[-1] * g.shape[-1]))
    total = x.new_zeros(())
    for some_x, some_g in zip(x.split(data, dim=-3), g.split(data, dim=-3), strict=True):
        total = total + (some_g.mT @ some_x).square().sum(-3)
    return total


def rotate_rows(rows: Tensor, Q: Tensor) -> Tensor:
    """Rows ([B,] N, S, d) times Q."""
    return rows if Q.shape[-1] == 1 else rows @ Q.unsqueeze(-3)
