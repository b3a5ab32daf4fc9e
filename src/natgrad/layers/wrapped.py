"""Layers seen through something that lies between their matrix and their parameters.

``WrappedLayer`` hands everything on to another layer, whose calls count for it; what differs stands in the
subclasses, in :mod:`natgrad.layers.weight_norm`, :mod:`natgrad.layers.tied` and :mod:`natgrad.layers.derivative`.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from natgrad.layers.base import Layer, Recorder


class WrappedLayer(Layer):
    """Another layer under the same name.

    Args:
        inner: The other layer.
    """

    def __init__(self, inner: Layer) -> None:
        self.name, self.module, self.inner = inner.name, inner.module, inner
        inner.wrapper = self
        self.parameters, self.has_bias, self.blocks = inner.parameters, inner.has_bias, inner.blocks

    def watch(self, recorder: Recorder) -> list[RemovableHandle]:
        """Watch the inner layer."""
        return self.inner.watch(recorder)

    def inputs(self, x: Tensor) -> Tensor:
        """Of the inner layer."""
        return self.inner.inputs(x)

    def gradients(self, g: Tensor, x: Tensor) -> Tensor:
        """Of the inner layer."""
        return self.inner.gradients(g, x)

    def to_matrix(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of the inner layer."""
        return self.inner.to_matrix(gradients)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Of the inner layer."""
        return self.inner.from_matrix(matrix)

    def step_to_matrix(self, steps: Sequence[Tensor]) -> Tensor:
        """Of the inner layer."""
        return self.inner.step_to_matrix(steps)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the inner layer."""
        return self.inner.shape

    @property
    def diagonal(self) -> tuple[bool, bool]:
        """Of the inner layer."""
        return self.inner.diagonal
