"""Convolutions: a position of the output is a shared position, and its patch of the input a row.

A kernel of shape (out, in / groups, k₁, k₂, …) is the matrix (out, in / groups · k₁k₂…); with groups there are B =
groups such matrices side by side. Padding, in any of torch's modes, is done before the patches are cut, so that it is
exact; patches are views until one layer's rows are needed. A transposed convolution is the ordinary one of its input
with zeros inserted between the entries and the kernel flipped; seen from an output position it has patches like any
other.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from natgrad.layers.base import WeightLayer, register


class _ConvolutionLayer(WeightLayer):
    module: _ConvNd
    is_linear = True

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.groups = self.module.groups
        self.blocks = self.groups if self.groups > 1 else None

    def remember(self, x: Tensor, z: Tensor) -> Tensor:
        """Refuse inputs without a batch dimension, whose first dimension is the channels."""
        if x.ndim != len(self.module.kernel_size) + 2:
            raise ValueError(
                f"layer {self.name!r} got an input of shape {tuple(x.shape)} without a batch dimension: natgrad takes "
                "the first dimension for the data; use `x.unsqueeze(0)`."
            )
        return x

    def gradients(self, g: Tensor, x: Tensor) -> Tensor:
        """(N, out, *spatial) → ([B,] N, S, out / B)."""
        return self._by_group(g.flatten(2).mT)

    def _by_group(self, rows: Tensor) -> Tensor:
        """(N, S, B · d) → ([B,] N, S, d)."""
        if self.blocks is None:
            return rows
        n, positions, width = rows.shape
        return rows.reshape(n, positions, self.blocks, width // self.blocks).movedim(2, 0)

    def _with_bias(self, weight: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        """Append the bias to the matrix of the weight, ([B,] out / B, in)."""
        return torch.cat([weight, gradients[1].reshape(*weight.shape[:-1], 1)], dim=-1) if self.has_bias else weight

    def _without_bias(self, matrix: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The matrix of the weight, and the bias if there is one."""
        return (matrix[..., :-1], [matrix[..., -1].flatten()]) if self.has_bias else (matrix, [])

    @property
    def shape(self) -> tuple[int, int]:
        """(out / B, in / B · k₁k₂… [+ 1])."""
        taps = int(torch.Size(self.module.kernel_size).numel())
        width = self.module.in_channels // self.groups * taps
        return self.module.out_channels // self.groups, width + int(self.has_bias)


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvolutionLayer(_ConvolutionLayer):
    """Convolution with any stride, padding, dilation and groups."""

    def inputs(self, x: Tensor) -> Tensor:
        """(N, in, *spatial) → ([B,] N, S, in / B · k₁k₂…)."""
        patches = cut(self._pad(x), self.module.kernel_size, self.module.stride, self.module.dilation)
        return self._by_group(patches)

    def _pad(self, x: Tensor) -> Tensor:
        module = self.module
        if module.padding == "valid":
            return x
        if module.padding == "same":
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            margins = [(t // 2, t - t // 2) for t in total]
        else:
            margins = [(p, p) for p in cast(tuple[int, ...], module.padding)]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        flat = [m for pair in reversed(margins) for m in pair]  # torch lists the last dimension first
        return nn.functional.pad(x, flat, mode=mode) if any(flat) else x

    def to_matrix(self, gradients: Sequence[Tensor]) -> Tensor:
        """([B,] out / B, in / B · k₁k₂… [+ 1])."""
        weight = gradients[0].flatten(1)
        return self._with_bias(weight if self.blocks is None else weight.unflatten(0, (self.blocks, -1)), gradients)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Kernel and bias."""
        weight, bias = self._without_bias(matrix)
        return [weight.reshape(self.module.weight.shape), *bias]


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvolutionLayer(_ConvolutionLayer):
    """Transposed convolution; its kernel has shape (in, out / groups, k₁, k₂, …)."""

    def remember(self, x: Tensor, z: Tensor) -> Tensor:
        """Refuse an ``output_size`` given at the call, since the rows follow the module's own ``output_padding``."""
        expected = [
            (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for size, s, p, d, k, extra in zip(x.shape[2:], *self._geometry, strict=False)
        ]
        if list(z.shape[2:]) != expected and x.ndim == z.ndim == len(expected) + 2:
            raise ValueError(
                f"layer {self.name!r} was called with an `output_size` that differs from its own: got "
                f"{list(z.shape[2:])}, expected {expected}. Set `output_padding` in the constructor instead."
            )
        return super().remember(x, z)

    @property
    def _geometry(self) -> tuple[tuple[int, ...], ...]:
        m = self.module
        return m.stride, cast(tuple[int, ...], m.padding), m.dilation, m.kernel_size, m.output_padding

    def inputs(self, x: Tensor) -> Tensor:
        """(N, in, *spatial) → ([B,] N, S, in / B · k₁k₂…)."""
        margins, stuffed = [], x
        for axis, (s, p, d, k, extra) in enumerate(zip(*self._geometry, strict=True), start=2):
            stuffed = _insert_zeros(stuffed, axis, s)
            margins.append((d * (k - 1) - p, d * (k - 1) - p + extra))
        padded = nn.functional.pad(stuffed, [m for pair in reversed(margins) for m in pair])  # a negative margin cuts
        once = (1,) * len(margins)
        return self._by_group(cut(padded, self.module.kernel_size, once, self.module.dilation, flip=True))

    def to_matrix(self, gradients: Sequence[Tensor]) -> Tensor:
        """([B,] out / B, in / B · k₁k₂… [+ 1])."""
        weight = gradients[0].flatten(2).unflatten(0, (self.groups, -1))  # (groups, in / B, out / B, taps)
        matrix = weight.transpose(1, 2).flatten(2)
        return self._with_bias(matrix if self.blocks else matrix.squeeze(0), gradients)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Kernel and bias."""
        weight, bias = self._without_bias(matrix)
        width, out, *taps = self.module.weight.shape
        by_tap = weight.reshape(self.groups, out, width // self.groups, -1).transpose(1, 2)
        return [by_tap.reshape(width, out, *taps), *bias]


def cut(x: Tensor, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], flip: bool = False) -> Tensor:
    """Patches of a padded input as rows.

    Args:
        x: (N, C, *spatial).
        size: Of a patch.
        stride: From one patch to the next.
        dilation: From one entry of a patch to the next.
        flip: Reverse the entries of each patch.

    Returns:
        (N, S, C · k₁k₂…), positions and entries in row-major order.
    """
    axes = len(size)
    for axis, (k, s, d) in enumerate(zip(size, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    if flip:
        x = x.flip(tuple(range(-axes, 0)))
    # (N, C, *positions, *taps) → (N, *positions, C, *taps)
    return x.movedim(1, 1 + axes).flatten(1 + axes).flatten(1, axes)


def _insert_zeros(x: Tensor, axis: int, stride: int) -> Tensor:
    """``stride`` − 1 zeros between neighbours along ``axis``."""
    if stride == 1:
        return x
    shape = list(x.shape)
    shape[axis] = (shape[axis] - 1) * stride + 1
    stuffed = x.new_zeros(shape)
    stuffed[(slice(None),) * axis + (slice(None, None, stride),)] = x
    return stuffed
