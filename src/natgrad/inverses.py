"""Stage 5: factors and damping go in, something that solves comes out.

With V the gradient as a matrix of shape (out, in [+ 1]), the block kron(G, A) acts on it as V ↦ G V A, so

    cholesky   V ↦ (G + λ_G I)⁻¹ V (A + λ_A I)⁻¹
    eigen      V ↦ Q_G [ (Q_Gᵀ V Q_A) / ((λ_G + g)(λ_A + a)ᵀ + δ) ] Q_Aᵀ     with G = Q_G diag(g) Q_Gᵀ, A likewise
    ekfac      the same, with g aᵀ in the expanded product replaced by second moments s of the data's gradients

Factored once, applied at every step until the factors have moved. What is stored are plain, contiguous tensors, so that
any checkpoint can hold them: in another layout products would be rounded differently. Blocks side by side have a
leading dimension, and a diagonal factor is a column, (d, 1), as is its inverse. A factorization that fails is retried
in float64 and then with more damping, and says so once.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

from natgrad.damping import Damping
from natgrad.layers import Bases, Layer
from natgrad.products import product

Known = Mapping[str, Tensor]
NOTHING: Known = MappingProxyType({})
# A failed Cholesky factorization is retried with this much of the mean diagonal added, then ten times as much, ….
FIRST_JITTER, LAST_JITTER = 1e-8, 1e2
# Columns whose distance in memory is a multiple of this fall on the same places of a processor's caches, and are
# factorized up to four times more slowly than with so many rows more.
ALIASED, PADDING = 128, 8


class Inverse(ABC):
    """A way of inverting a damped Kronecker product."""

    names: tuple[str, ...]
    """Of the tensors that ``factorize`` returns."""

    corrects = False
    """Whether eigenvalues are moved on by the squares of the data's gradients in the eigenbasis."""

    @abstractmethod
    def factorize(self, A: Tensor, G: Tensor, damping: Damping, known: Known = NOTHING) -> dict[str, Tensor]:
        """What ``solve`` needs, as named tensors.

        Args:
            A: ([B,] in [+ 1], in [+ 1]), or a column if kept as a diagonal.
            G: ([B,] out, out), or a column.
            damping: What is added.
            known: What this returned for the same factors and another λ_G, if it did.
        """

    @abstractmethod
    def lengths(self, inverse: dict[str, Tensor], layer: Layer, x: Tensor, g: Tensor) -> Tensor:
        """Σ_n tr V_nᵀ(block⁻¹ V_n), with V_n = Σ_s g_ns x_nsᵀ the gradients of single data.

        Args:
            inverse: What ``factorize`` returned.
            layer: Whose they are.
            x: Rows of the input, ([B,] N, S, in).
            g: Rows of the gradient, ([B,] N, S, out).
        """

    @abstractmethod
    def solve(self, inverse: dict[str, Tensor], V: Tensor) -> Tensor:
        """The inverse of the damped block times V, (out, in [+ 1])."""


class CholeskyInverse(Inverse):
    """Explicit inverses of both damped factors. Cannot add δ to their product."""

    names = ("A_inverse", "G_inverse")

    def factorize(self, A: Tensor, G: Tensor, damping: Damping, known: Known = NOTHING) -> dict[str, Tensor]:
        """``A_inverse`` and ``G_inverse``."""
        of_A = known["A_inverse"] if known else invert(A, damping.a, "A")
        return {"A_inverse": of_A, "G_inverse": invert(G, damping.g, "G")}

    def lengths(self, inverse: dict[str, Tensor], layer: Layer, x: Tensor, g: Tensor) -> Tensor:
        """In the metric of both inverses."""
        return layer.squared_length(x, g, (inverse["A_inverse"], inverse["G_inverse"]))

    def solve(self, inverse: dict[str, Tensor], V: Tensor) -> Tensor:
        """G⁻¹ V A⁻¹."""
        A = inverse["A_inverse"]
        # A⁻¹ is symmetric: from the right, the product has the layout of V and is not transposed afterwards.
        half = apply(inverse["G_inverse"], V)
        return half * A.mT if A.shape[-1] == 1 else product(half, A)


class BasisInverse(Inverse):
    """A diagonal in the eigenbasis of both factors, ``A_basis`` and ``G_basis``."""

    @abstractmethod
    def scale(self, inverse: dict[str, Tensor]) -> Tensor:
        """The inverse damped eigenvalues, ([B,] out, in [+ 1])."""

    def lengths(self, inverse: dict[str, Tensor], layer: Layer, x: Tensor, g: Tensor) -> Tensor:
        """In the eigenbasis."""
        return torch.sum(self.scale(inverse) * layer.squared_gradients(x, g, _bases(inverse)))

    def solve(self, inverse: dict[str, Tensor], V: Tensor) -> Tensor:
        """To the eigenbasis, divide, and back."""
        return scale_in_basis(_bases(inverse), V, self.scale(inverse))


class EigenInverse(BasisInverse):
    """Eigendecompositions of both factors, which make damping of the product exact."""

    names = ("scale", "A_basis", "G_basis")

    def factorize(self, A: Tensor, G: Tensor, damping: Damping, known: Known = NOTHING) -> dict[str, Tensor]:
        """Bases and damped eigenvalues; the eigenvalues of a factor are cut at zero first."""
        a, Q_A = eigh(A)
        g, Q_G = eigh(G)
        denominator = (g.clamp(min=0) + damping.g).unsqueeze(-1) * (a.clamp(min=0) + damping.a).unsqueeze(-2)
        return {"scale": reciprocal(denominator + damping.product), "A_basis": Q_A, "G_basis": Q_G}

    def scale(self, inverse: dict[str, Tensor]) -> Tensor:
        """As they were when the factors were decomposed."""
        return inverse["scale"]


class EkfacInverse(BasisInverse):
    """The same bases, with eigenvalues s that do not stay what they were when the factors were decomposed.

    They start as those of the Kronecker product, g_i a_j, counted as one batch, and the caller moves ``spectrum`` on,
    with ``spectrum_age`` for its running average. Damping is kept apart from them: λ_G a_j + g_i λ_A + λ_G λ_A + δ,
    which is that of the product where s_ij = g_i a_j, and δ alone where λ_A = λ_G = 0.

    In a new basis the moments start anew. The old matrix's diagonal in the new basis would be an average of the old
    eigenvalues, in which large ones bury small ones; ``docs/decisions.md`` has the figures.
    """

    names = ("spectrum", "spectrum_age", "shift", "A_basis", "G_basis")
    corrects = True

    def factorize(self, A: Tensor, G: Tensor, damping: Damping, known: Known = NOTHING) -> dict[str, Tensor]:
        """Bases, eigenvalues and what is added to them."""
        a, Q_A = eigh(A)
        g, Q_G = eigh(G)
        a, g = a.clamp(min=0).unsqueeze(-2), g.clamp(min=0).unsqueeze(-1)
        shift = damping.g * a + g * damping.a + damping.g * damping.a + damping.product
        age = torch.ones((), dtype=torch.float64)
        return {"spectrum": g * a, "spectrum_age": age, "shift": shift, "A_basis": Q_A, "G_basis": Q_G}

    def scale(self, inverse: dict[str, Tensor]) -> Tensor:
        """As they are now."""
        return reciprocal(inverse["spectrum"] + inverse["shift"])


INVERSES: dict[str, Inverse] = {"cholesky": CholeskyInverse(), "eigen": EigenInverse(), "ekfac": EkfacInverse()}


def reciprocal(denominator: Tensor) -> Tensor:
    """1 / denominator, ([B,] out, in [+ 1]).

    A direction that neither curvature nor damping holds, to rounding, is left out, as a pseudo-inverse does.
    """
    floor = torch.finfo(denominator.dtype).eps * denominator.amax((-2, -1), keepdim=True)
    return torch.where(denominator > floor, denominator, torch.inf).reciprocal()


def scale_in_basis(bases: Bases, V: Tensor, scale: Tensor) -> Tensor:
    """Q_G [(Q_Gᵀ V Q_A) · scale] Q_Aᵀ."""
    Q_A, Q_G = bases
    return apply(Q_A, apply(Q_G, to_basis(bases, V) * scale).mT).mT


def to_basis(bases: Bases, V: Tensor) -> Tensor:
    """Q_Gᵀ V Q_A."""
    Q_A, Q_G = bases
    return apply(_transposed(Q_A), apply(_transposed(Q_G), V).mT).mT


def _bases(inverse: dict[str, Tensor]) -> Bases:
    return inverse["A_basis"], inverse["G_basis"]


def _transposed(Q: Tensor) -> Tensor:
    return Q if Q.shape[-1] == 1 else Q.mT


def apply(F: Tensor, V: Tensor) -> Tensor:
    """F V, for F dense, (…, d, d), or diagonal, (…, d, 1)."""
    return F * V if F.shape[-1] == 1 else product(F, V)


def invert(factor: Tensor, damping: Tensor | float, name: str) -> Tensor:
    """Inverse of a symmetric positive semi-definite ``factor + damping I``."""
    if factor.shape[-1] == 1:
        damped = factor + damping
        return torch.where(damped > 0, damped, torch.inf).reciprocal()
    d = factor.shape[-1]
    beside = PADDING if d % ALIASED == 0 else 0
    padded = torch.nn.functional.pad(factor, (0, beside, 0, beside))
    diagonal = padded.diagonal(dim1=-2, dim2=-1)
    diagonal[..., :d].add_(damping)
    diagonal[..., d:].fill_(1.0)
    L, info = torch.linalg.cholesky_ex(padded)
    if not info.any():
        # Symmetric, with its columns in the order of memory.
        return torch.cholesky_inverse(L).mT[..., :d, :d].contiguous()
    return _invert_carefully(padded[..., :d, :d].double(), name).to(factor.dtype).contiguous()


def _invert_carefully(damped: Tensor, name: str) -> Tensor:
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    # A factor that is zero, as behind dead units or a saturated softmax, has no inverse that float32 can hold. Its
    # directions are left out, as a pseudo-inverse does.
    least = torch.finfo(torch.float32).tiny / FIRST_JITTER
    held = diagonal.amax(-1) > least
    mean = diagonal.mean().clamp(min=least)
    jitter = 0.0
    while True:
        L, info = torch.linalg.cholesky_ex(damped)
        if not info.any():
            break
        more = max(FIRST_JITTER, 10 * jitter)
        if more > LAST_JITTER:
            raise ArithmeticError(
                f"factor {name} cannot be inverted even with {jitter:g} times its mean diagonal added."
            )
        diagonal.add_(mean * (more - jitter))
        jitter = more
    if jitter:
        _tell_of_singular(name)
    return torch.where(held[..., None, None], torch.cholesky_inverse(L), 0.0)


@cache
def _tell_of_singular(name: str) -> None:  # and not at every refresh, of every layer
    warnings.warn(
        f"natgrad: a factor {name} is singular at its damping, and some of its mean diagonal was added, as will be "
        "wherever that is so. Raise `damping` to silence this.",
        RuntimeWarning,
        stacklevel=3,
    )


def eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors, of a diagonal factor as a column of ones.

    Where float32 fails to converge, float64 is used.
    """
    if factor.shape[-1] == 1:
        return factor.squeeze(-1), torch.ones_like(factor)
    try:
        values, basis = torch.linalg.eigh(factor)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, and missing in the stubs
        values, basis = torch.linalg.eigh(factor.double())
    return values.to(factor.dtype), basis.to(factor.dtype).contiguous()
