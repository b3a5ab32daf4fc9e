"""``nn.Linear`` and Hugging Face's ``Conv1D``: every dimension between the first and the last is a shared position."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from natgrad.layers.base import WeightLayer, register


@register(nn.Linear)
class LinearLayer(WeightLayer):
    """z = W x + b with x of shape (N, …, in)."""

    is_linear = True

    def remember(self, x: Tensor, z: Tensor) -> Tensor:
        """A single vector, (in,), as one row that all data share."""
        return x if x.ndim > 1 else x.unsqueeze(0)

    def inputs(self, x: Tensor) -> Tensor:
        """(N, …, in) → (N, S, in)."""
        return x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, x.shape[-1])

    def gradients(self, g: Tensor, x: Tensor) -> Tensor:
        """(N, …, out) → (N, S, out)."""
        return self.inputs(g)

    def to_matrix(self, gradients: Sequence[Tensor]) -> Tensor:
        """[W b]."""
        return torch.cat([gradients[0], gradients[1].unsqueeze(1)], dim=1) if self.has_bias else gradients[0]

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """W and, if there is one, b."""
        return [matrix[:, :-1], matrix[:, -1]] if self.has_bias else [matrix]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in [+ 1])."""
        out, width = self.parameters[0].shape
        return out, width + int(self.has_bias)


@register("Conv1D")
class TransposedLinearLayer(LinearLayer):
    """z = x W + b with W of shape (in, out): ``transformers.pytorch_utils.Conv1D``, recognized by its name."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Another class of this name."""
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and getattr(module, "nf", None) == weight.shape[1]:
            return None
        return "it is called Conv1D and is not the one of Hugging Face's transformers"

    def to_matrix(self, gradients: Sequence[Tensor]) -> Tensor:
        """[Wᵀ b]."""
        return super().to_matrix([gradients[0].mT, *gradients[1:]])

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """W and, if there is one, b."""
        weight, *bias = super().from_matrix(matrix)
        return [weight.mT, *bias]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in [+ 1])."""
        width, out = self.parameters[0].shape
        return out, width + int(self.has_bias)
