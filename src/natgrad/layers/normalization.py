"""Normalization layers: their scale γ and shift β have an exact block, from the gradient of each datum.

With x̂ the normalized input, a datum's gradient is (Σ g x̂, Σ g), summed over its positions for each channel. These
gradients are the rows of G, and A is the 1×1 identity, so that kron(G, A) is the exact block over (γ, β). Where the
block would be large, G keeps one 2×2 block a channel, (γ_c, β_c), as B = channels independent blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.layers.base import Layer, register
from natgrad.layers.moments import at_least_float32
from natgrad.torch_internals import BatchNorm, KeepsStatistics

# Above this many parameters the channels are taken to be independent.
MAX_EXACT = 1024


@register(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class ScaleShiftLayer(Layer):
    """z = γ x̂ + β, for channels in the last dimensions (LayerNorm, RMSNorm) or the second (the others)."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Modules without a scale or shift to train."""
        trainable = _trainable(getattr(module, "weight", None)) + _trainable(getattr(module, "bias", None))
        return None if trainable else "neither its scale nor its shift is a trainable parameter"

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module, self.has_bias = name, module, False
        scale, shift = [_trainable(getattr(module, key, None)) for key in ("weight", "bias")]
        self.has_scale, self.has_shift = bool(scale), bool(shift)
        self.parameters = scale + shift
        size = self.parameters[0].numel()
        self.blocks = size if size * len(self.parameters) > MAX_EXACT else None

    def remember(self, x: Tensor, z: Tensor) -> Tensor:
        """x̂, as the module computed it from all data."""
        return normalize(self.module, x)

    def inputs(self, x: Tensor) -> Tensor:
        """([B,] N, 1, 1), all ones: A is the identity."""
        shape = (x.shape[0], 1, 1) if self.blocks is None else (self.blocks, x.shape[0], 1, 1)
        return x.new_ones(()).expand(shape)

    def gradients(self, g: Tensor, x: Tensor) -> Tensor:
        """Gradients of γ and β for each datum: (N, 1, γ then β), or (channels, N, 1, γ and β)."""
        g = at_least_float32(g)
        parts = [self._per_datum(g * x)] * self.has_scale + [self._per_datum(g)] * self.has_shift  # (N, channels)
        if self.blocks is None:
            return torch.cat(parts, dim=1).unsqueeze(1)
        return torch.stack(parts, dim=2).movedim(1, 0).unsqueeze(2)

    def _per_datum(self, values: Tensor) -> Tensor:
        """Sum over the positions: (N, …) → (N, channels)."""
        if isinstance(self.module, nn.LayerNorm | nn.RMSNorm):
            positions = values.ndim - 1 - len(self.module.normalized_shape)
            return values.flatten(1, positions).sum(1).flatten(1) if positions else values.flatten(1)
        return values.flatten(2).sum(2) if values.ndim > 2 else values

    def to_matrix(self, gradients: Sequence[Tensor]) -> Tensor:
        """(γ then β, 1), or (channels, γ and β, 1)."""
        flat = [gradient.flatten() for gradient in gradients]
        return (torch.cat(flat) if self.blocks is None else torch.stack(flat, 1)).unsqueeze(-1)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """γ and β."""
        parts = matrix.squeeze(-1).chunk(len(self.parameters), dim=-1)
        return [part.reshape(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    @property
    def shape(self) -> tuple[int, int]:
        """(number of parameters a block, 1)."""
        return len(self.parameters) * (self.parameters[0].numel() if self.blocks is None else 1), 1

    @property
    def channels(self) -> int:
        """Each has its γ and β."""
        return self.parameters[0].numel()


def _trainable(parameter: object) -> list[nn.Parameter]:
    return [parameter] if isinstance(parameter, nn.Parameter) and parameter.requires_grad else []


def normalize(module: nn.Module, x: Tensor) -> Tensor:
    """The input of scale and shift, without touching running statistics."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    assert isinstance(module, BatchNorm)
    if uses_batch_statistics(module):
        return functional.batch_norm(x, None, None, training=True, eps=module.eps)
    return functional.batch_norm(x, module.running_mean, module.running_var, training=False, eps=module.eps)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether the output for a datum depends on the others in the batch, by their mean and variance."""
    return isinstance(module, BatchNorm) and (module.training or module.running_mean is None)


class RunningStatistics:
    """Those that a model keeps of its batches, as they are now.

    Args:
        model: The module.
    """

    def __init__(self, model: nn.Module) -> None:
        kept = [module for module in model.modules() if isinstance(module, KeepsStatistics) and module.training]
        self._buffers = [buffer for module in kept for buffer in module.buffers(recurse=False)]
        self._values = [buffer.clone() for buffer in self._buffers]

    def __bool__(self) -> bool:
        """Whether there are any that a pass would change."""
        return bool(self._buffers)

    def restore(self) -> None:
        """Put them back; between a forward and a backward pass, too, which must not take that for a change."""
        for buffer, value in zip(self._buffers, self._values, strict=True):
            buffer.data.copy_(value)


@contextmanager
def statistics_left_alone(model: nn.Module) -> Iterator[None]:
    """Passes of the model in here do not count in what it keeps of its batches."""
    before = RunningStatistics(model)
    try:
        yield
    finally:
        before.restore()
