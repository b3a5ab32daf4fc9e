"""The matrix of a layer in derivatives that the network takes of itself.

A network may differentiate as it runs: its output is the residual of a differential equation, or forces, which are the
gradient of an energy. Then W has further uses than z = W x + b. With z̄ and x̄ the gradients that such a pass brings,

    backwards            x̄ = Wᵀ z̄
    backwards again      the gradient at z̄ is W times the gradient at x̄, and so on, with W and Wᵀ by turns

and each use adds rows to the gradient of a datum, one of them known from the pass and the other from the loss:

    V = Σ (∂L/∂z) xᵀ + Σ z̄ (∂L/∂x̄)ᵀ + …

A use of Wᵀ is one in which rows of A and G change places, as in a tied embedding, and none but the first has a bias.

Source of the idea that rows of derivatives are further positions: Dangel, Müller and Zeinhofer (2024),
arXiv:2405.15603, who carry derivatives forwards; here they are what autograd makes them.
"""

import torch
from torch import Tensor

from natgrad.layers.base import Layer
from natgrad.layers.moments import Moment, Sharing
from natgrad.layers.wrapped import WrappedLayer


class DerivativeUse(WrappedLayer):
    """Rows of one further use of a layer's matrix, which count for the layer's owner.

    Args:
        inner: The layer, whose output is its matrix times its input.
        transposed: Whether the use is one of Wᵀ.
    """

    of_derivative = True

    def __init__(self, inner: Layer, transposed: bool) -> None:
        self.name, self.module, self.inner = inner.name, inner.module, inner
        self.parameters, self.has_bias, self.blocks = inner.parameters, False, inner.blocks
        self.wrapper, self.transposed = inner.owner, transposed

    def inputs(self, x: Tensor) -> Tensor:
        """Rows of x̿, or of z̄ for Wᵀ."""
        return self.inner.gradients(x, x) if self.transposed else self.inner.inputs(x)

    def gradients(self, g: Tensor, x: Tensor) -> Tensor:
        """Rows of the gradient at what came of it."""
        return self.inner.inputs(g) if self.transposed else self.inner.gradients(g, x)

    def input_moment(self, rows: Tensor, sharing: Sharing) -> Moment:
        """As large as the inner layer's, with zeros where that has the 1 of its bias."""
        moment = super().input_moment(rows, sharing)
        if self.transposed or not self.inner.has_bias:
            return moment
        margin = (0, 0 if self.diagonal[1] else 1, 0, 1)
        return moment._replace(total=torch.nn.functional.pad(moment.total, margin))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the inner layer, or (in, out)."""
        out, width = self.inner.shape
        width -= int(self.inner.has_bias)
        return (width, out) if self.transposed else (out, width)

    @property
    def diagonal(self) -> tuple[bool, bool]:
        """As in the inner layer's block."""
        of_G, of_A = self.inner.diagonal
        return (of_A, of_G) if self.transposed else (of_G, of_A)
