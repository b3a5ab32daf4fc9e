"""``nn.Linear``: every leading dimension after the first is a shared position."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from natgrad.layers.base import Layer, register


@register(nn.Linear)
class LinearLayer(Layer):
    """z = W x + b with x of shape (N, …, in)."""

    def __init__(self, name: str, module: nn.Module) -> None:
        assert isinstance(module, nn.Linear)
        self.name, self.module = name, module
        self.has_bias = module.bias is not None
        self.parameters = [module.weight, module.bias] if self.has_bias else [module.weight]

    def inputs(self, x: Tensor) -> Tensor:
        """(N, …, in) → (N, S, in)."""
        return x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, x.shape[-1])

    def gradients(self, g: Tensor) -> Tensor:
        """(N, …, out) → (N, S, out)."""
        return self.inputs(g)

    def to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """[W b]."""
        return torch.cat([tensors[0], tensors[1].unsqueeze(1)], dim=1) if self.has_bias else tensors[0]

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """W and, if there is one, b."""
        return [matrix[:, :-1], matrix[:, -1]] if self.has_bias else [matrix]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in [+ 1])."""
        out, width = self.parameters[0].shape
        return out, width + int(self.has_bias)
