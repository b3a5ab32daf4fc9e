"""Second moments of rows, under both ways of sharing weights.

With n the number of rows of x, N data and S positions:

    expand   every position is a datum of its own          A = Σ x xᵀ / n
    reduce   rows are summed over the positions first      A = Σ x̂ x̂ᵀ / (N S²),   x̂ = Σ_s x_s, the appended 1 becoming S

G is the plain sum in both cases. A factor kept as a diagonal is a column, (d, 1), beside the dense (d, d); all
functions tell them apart by the last dimension, and for d = 1 they are the same.

Source: Eschenhagen et al. (2023), arXiv:2311.00636.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Sharing = Literal["expand", "reduce"]
# Products of rows up to this wide are computed in one piece.
SMALL = 256


class Moment(NamedTuple):
    """A sum of outer products.

    Attributes:
        total: ([B,] d, d), or ([B,] d, 1) where only the diagonal is kept.
        weight: What ``total`` is divided by to make A.
        rows: Number of rows summed.
    """

    total: Tensor
    weight: float
    rows: int


def at_least_float32(rows: Tensor) -> Tensor:
    """Statistics never have less precision than float32."""
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


def without_denormal_products(rows: Tensor) -> Tensor:
    """Rows whose tiniest entries are zero, as products of these are: processors take twenty times as long for them.

    Where gradients vanish on the way through many layers, all are.
    """
    return torch.nn.functional.hardshrink(rows, torch.finfo(rows.dtype).tiny ** 0.5)


def moment(rows: Tensor, bias: bool, sharing: Sharing, diagonal: bool) -> Moment:
    """Sum of x xᵀ over the rows.

    Args:
        rows: ([B,] N, S, d).
        bias: Whether a 1 is appended to each row; the extended rows are not built.
        sharing: ``"expand"`` or ``"reduce"``.
        diagonal: Whether only the diagonal is kept.
    """
    rows = without_denormal_products(at_least_float32(rows))
    n, positions = rows.shape[-3], rows.shape[-2]
    if sharing == "expand" or positions == 1:
        flat, one, count = rows.flatten(-3, -2), 1.0, n * positions
        weight = float(count)
    else:
        flat, one, count = rows.sum(-2), float(positions), n
        weight = float(n * positions**2)
    if diagonal:
        total = flat.square().sum(-2)
        total = torch.cat([total, total.new_full((*total.shape[:-1], 1), count * one**2)], -1) if bias else total
        return Moment(total.unsqueeze(-1), weight, count)
    d = flat.shape[-1]
    gram = flat.new_empty(*flat.shape[:-2], d + bias, d + bias)
    _fill(gram[..., :d, :d], flat)
    if bias:
        gram[..., :d, d] = gram[..., d, :d] = flat.sum(-2) * one
        gram[..., d, d] = count * one**2
    return Moment(gram, weight, count)


def _fill(gram: Tensor, rows: Tensor) -> None:
    """rowsᵀ rows, of whose blocks those beside the diagonal are computed once and mirrored: a quarter less work."""
    d = rows.shape[-1]
    if d <= SMALL:
        gram.copy_(rows.mT @ rows)
        return
    first, second = slice(0, d // 2), slice(d // 2, d)
    for half in (first, second):
        _fill(gram[..., half, half], rows[..., half])
    gram[..., first, second] = beside = rows[..., first].mT @ rows[..., second]
    gram[..., second, first] = beside.mT
