"""Stage 6, where gradients are averaged: a layer's step goes as far along each of its singular directions.

In the metric of its block, the natural gradient Δ = G⁻¹ V A⁻¹ of a layer is W = G^-½ V A^-½, and the squared singular
values of W are what its directions promise. A few of them are much larger than the others: those along which the loss
is steep from one batch to the next, where the common rate lets it swing, while the others hardly move. So W is replaced
by its damped polar factor, of the same length:

    W ← c (W Wᵀ + τ² I)^-½ W

For τ = 0 that is the longest way downhill among steps that change no output by more than another: steepest descent in
the spectral norm, in the metric of the curvature. Noise has singular values too, and is not to be raised: τ² is a
multiple of the mean square that noise alone would have. Neither square roots of factors nor their inverses are needed,
as W Wᵀ is similar to ΔVᵀ, and WᵀW to VᵀΔ:

    Δ ← c (Δ Vᵀ + τ² I)^-½ Δ        or        Δ ← c Δ (Vᵀ Δ + τ² I)^-½

The inverse root of the smaller of these is found by Newton and Schulz's iteration, in products alone. It takes so many
of them that they pay where the data give many rows for each dimension, as positions do in convolutions and attention.

Sources: Carlson et al. (2015), "Preconditioned spectral descent for deep learning"; Jordan et al. (2024), "Muon";
Higham (2008), "Functions of matrices", chapter 6, for the iteration. Measured in ``docs/decisions.md``.
"""

import torch
from torch import Tensor

from natgrad.products import product

# τ² over the mean square of the singular values that are noise; and over that of all of them, at least.
NOISE, LEAST = 3.0, 1e-4
# Rows of the batch for each dimension of the smaller side that it takes.
ROWS_PER_DIMENSION = 8
# Newton and Schulz's steps converge up to √3 times the root; from far below they get ahead faster by going further.
SCALES = (2.5, 2.5, 2.5, 2.0, 1.5, 1.0)


def pays(rows: float, V: Tensor) -> bool:
    """Whether a batch of so many rows makes up for the time; a single direction has nothing to even out.

    Args:
        rows: Of the layer's input.
        V: Its gradient as a matrix, ([B,] out, in [+ 1]).
    """
    smaller = min(V.shape[-2:])
    return smaller > 1 and rows >= ROWS_PER_DIMENSION * smaller


def orthogonalize(V: Tensor, natural: Tensor, noise: float) -> Tensor:
    """The natural gradient with its singular values, in the metric, evened out down to those of noise.

    Args:
        V: The gradient as a matrix, ([B,] out, in [+ 1]).
        natural: G⁻¹ V A⁻¹, of the same shape, for any symmetric positive definite A and G.
        noise: Share of noise in VᵀΔ.

    Returns:
        Of the same shape, and of the same length in the metric; of zero gradients, zero.
    """
    left = V.shape[-2] <= V.shape[-1]
    gram = product(natural, V.mT) if left else product(V.mT, natural)
    traces = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0)
    total = traces.sum()
    shift = (NOISE * noise + LEAST) * total / (traces.numel() * gram.shape[-1]) + torch.finfo(gram.dtype).tiny
    root = inverse_root(_shift(gram.clone(), shift), traces + shift)
    evened = product(root, natural) if left else product(natural, root)
    length = torch.sum(product(gram, root).mT * root)  # tr of its own square in the metric
    return evened * (total / length.clamp(min=torch.finfo(gram.dtype).tiny)).sqrt()


def inverse_root(matrix: Tensor, bound: Tensor) -> Tensor:
    """M^-½ by Newton and Schulz; where eigenvalues are a thousandth of the bound and less, something smaller.

    Args:
        matrix: M, (…, d, d), similar to a symmetric positive definite matrix.
        bound: Of its eigenvalues, (…).
    """
    bound = bound[..., None, None]
    rest = matrix / bound  # times root², which is to become I
    step = root = _step(rest, SCALES[0])
    for scale in SCALES[1:]:
        rest = product(product(rest, step), step)
        step = _step(rest, scale)
        root = product(root, step)
    return root * bound.rsqrt()


def _step(rest: Tensor, scale: float) -> Tensor:
    """√scale (3/2 I − scale/2 M)."""
    return _shift(rest * (-0.5 * scale**1.5), 1.5 * scale**0.5)


def _shift(matrix: Tensor, by: Tensor | float) -> Tensor:
    """Add a multiple of I in place."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(by)
    return matrix
