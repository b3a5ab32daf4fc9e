"""Weight normalization: the layer's block is that of the weight W it computes, and the step is carried over to (g, v).

W = g v / ‖v‖, with a norm for each output (``torch.nn.utils.parametrizations.weight_norm``, ``dim=0``). With u = v /
‖v‖, row by row, the gradient with respect to W and a step dW correspond to

    ∂W = u ∂g + (‖v‖ / g) ∂v              dg = u · dW,    dv = (‖v‖ / g) (dW − u (u · dW))

The second pair is the step of (g, v) that moves W by dW without changing the length of v to first order. Natural
gradients do not depend on the parametrization, so training goes as it would without the normalization.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from natgrad.distributed import whole
from natgrad.layers.base import Layer
from natgrad.layers.wrapped import WrappedLayer


class WeightNormLayer(WrappedLayer):
    """A layer seen through the normalization of its weight."""

    def __init__(self, inner: Layer) -> None:
        super().__init__(inner)
        originals: Any = inner.module.parametrizations["weight"]  # type: ignore[index]
        self.g: nn.Parameter = originals.original0
        self.v: nn.Parameter = originals.original1
        inner.parameters[0] = self.v  # it is shaped like W, which is computed, and must not be kept
        self.parameters = [self.g, self.v, *inner.parameters[1:]]

    def to_matrix(self, gradients: Sequence[Tensor]) -> Tensor:
        """∂W from ∂g and ∂v, as the inner layer's matrix."""
        u, ratio = self._direction()
        return self.inner.to_matrix([u * gradients[0] + ratio * gradients[1], *gradients[2:]])

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """The step of g and v that moves W by dW."""
        step, *bias = self.inner.from_matrix(matrix)
        u, ratio = self._direction()
        dg = _per_output((u * step).flatten(1).sum(1), step)
        return [dg, ratio * (step - u * dg), *bias]

    def step_to_matrix(self, steps: Sequence[Tensor]) -> Tensor:
        """dW = u dg + (g / ‖v‖) (dv − u (u · dv)), as the inner layer's matrix."""
        u, ratio = self._direction()
        dg, dv, *bias = steps
        across = dv - u * _per_output((u * dv).flatten(1).sum(1), dv)
        dW = u * dg + torch.where(ratio == 0, 0.0, across / ratio)
        return self.inner.step_to_matrix([dW, *bias])

    def _direction(self) -> tuple[Tensor, Tensor]:
        """The direction u, shaped like v, and ‖v‖ / g; an output with g = 0 moves by its g alone."""
        g, v = whole(self.g.detach()), whole(self.v.detach())
        norm = _per_output(v.flatten(1).norm(dim=1), v)
        return v / norm, torch.where(g == 0, 0.0, norm / g)


def refusal(module: nn.Module) -> str | None:
    """Why the parametrizations of ``module`` are not a weight normalization that a layer can be seen through."""
    chains: Any = module.parametrizations
    names = [f"{type(p).__name__} of {key}" for key, chain in chains.items() for p in chain]
    if list(chains) == ["weight"] and len(names) == 1:
        only = chains["weight"][0]
        if isinstance(only, parametrizations._WeightNorm) and only.dim == 0:
            return None
    return f"of its parametrizations ({', '.join(names)}) natgrad knows only weight_norm of the weight with dim=0"


def _per_output(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
