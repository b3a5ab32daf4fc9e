"""What is remembered of the calls of layers, of which data, and how calls become rows.

A :class:`Call` is one use of a layer's matrix during one forward pass. Those that a datum's gradient is the sum of make
up a *use*: their rows are positions of the same datum. :mod:`natgrad.capture` fills them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from natgrad.factors import share_needed, share_of_inputs
from natgrad.layers import Layer

# So many data tell the noise of the gradients to a few percent.
SAMPLE = 512


@dataclass
class Call:
    """One call of a layer during one forward of the model.

    Attributes:
        layer: Whose methods make the rows.
        owner: The layer that they count for.
        x: What the layer remembered of the input, restricted to the data that enter both factors.
        edge: Where the gradient of the output arrives; None once natgrad's own backward passes are over.
        data: Which data enter both factors.
        upscale: All data over those that do.
        blocks: Which blocks of the layer took part.
        g: The gradient of the output that the user's backward pass brought, if it is wanted.
        more: The input, restricted to the data that enter A, of which those of ``x`` are the first, if there are more.
    """

    layer: Layer
    owner: Layer
    x: Tensor
    edge: GradientEdge | None
    data: slice | Tensor
    upscale: float
    blocks: slice
    g: Tensor | None = None
    more: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, float]:
        """What enters A, and all data over those that do."""
        if self.more is None:
            return self.x, self.upscale
        return self.more, self.upscale * len(self.x) / len(self.more)

    @property
    def rows(self) -> int:
        """Length of what the layer remembered before it was restricted."""
        return round(len(self.x) * self.upscale)

    @property
    def key(self) -> tuple[str, bool]:
        """Of the sums that its rows enter: whose they are, and whether rows of A and G change places."""
        return self.owner.name, self.owner.swaps(self.layer)

    def chosen(self, g: Tensor) -> Tensor:
        """Of a gradient at the output, the part that belongs to the data that enter the factors."""
        return g[(slice(None),) * self.layer.data_dim + (self.data,)]


def group(calls: Iterable[Call], together: Callable[[Layer], bool]) -> list[list[Call]]:
    """Calls by use: those of an owner for which they are to stay ``together``, and else each by itself."""
    uses: dict[Any, list[Call]] = {}
    for number, call in enumerate(calls):
        same = (call.owner.name, str(call.blocks), len(call.x))
        uses.setdefault(same if together(call.owner) else number, []).append(call)
    return list(uses.values())


def alike(pairs: Iterable[tuple[Call, Tensor]]) -> list[list[tuple[Call, Tensor]]]:
    """Calls of one use, each with a tensor, by the sums that their rows enter; those of derivatives by themselves."""
    kinds: dict[Any, list[tuple[Call, Tensor]]] = {}
    for call, tensor in pairs:
        kinds.setdefault((call.key, call.layer.of_derivative), []).append((call, tensor))
    return list(kinds.values())


def positions(owner: Layer, parts: Sequence[tuple[Layer, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows of x, ([B,] N, S, in [+ 1]), and of the gradient, ([B,] N, S, out), of the calls of one use.

    Rows of x have their 1 already, or a 0 in its place, where some of them are of derivatives.

    Args:
        owner: Whose matrix it is.
        parts: Of each call the layer, and what it made of the input and of the gradient of its output.
    """
    rows = [(x, g) for _, x, g in parts]
    if any(layer.of_derivative for layer, _, _ in parts):
        rows = [_in_place(owner, *part) for part in parts]
    return torch.cat([x for x, _ in rows], dim=-2), torch.cat([g for _, g in rows], dim=-2)


def _in_place(owner: Layer, layer: Layer, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    x, g = (g, x) if owner.swaps(layer) else (x, g)
    if owner.has_bias:
        x = torch.cat([x, x.new_full((*x.shape[:-1], 1), float(layer.has_bias))], dim=-1)
    return x, g


@dataclass
class Sample:
    """Some data of one use of a layer, with the gradients of the user's own loss.

    Attributes:
        owner: Whose matrix it is.
        layers: Of each call, whose methods make the rows.
        xs: What they remembered of the inputs.
        gs: The gradients of the outputs, as far as they have come.
        data: Number of data of the use, of which these are some.
    """

    owner: Layer
    layers: list[Layer]
    xs: list[Tensor]
    gs: list[Tensor | None]
    data: int

    @classmethod
    def of(cls, use: Sequence[Call], ranks: int) -> "Sample | None":
        """Wait for the gradients that the user's backward pass brings to some of the data; None where rows do not tell.

        Args:
            use: The calls; our own backward passes must be over.
            ranks: Number of those that sample their data.
        """
        first = use[0]
        if not first.owner.per_datum or first.blocks != slice(None):
            return None
        every = max(1, round(len(first.x) * ranks / SAMPLE))
        xs = [call.x[::every].clone() for call in use]
        sample = cls(first.owner, [call.layer for call in use], xs, [None] * len(use), first.rows)
        for number, call in enumerate(use):
            assert call.edge is not None
            # Nothing that leads to the graph may be kept by a hook on the graph: neither would ever be freed.
            keep = partial(_keep, sample, number, call.edge.output_nr, call.layer.data_dim, call.data, every)
            call.edge.node.register_prehook(keep)
        return sample

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """As of :func:`positions`; None if no gradient came."""
        calls = zip(self.layers, self.xs, self.gs, strict=True)
        parts = [(layer, layer.inputs(x), layer.gradients(g, x)) for layer, x, g in calls if g is not None]
        return positions(self.owner, parts) if parts else None


def _keep(
    sample: Sample,
    number: int,
    output: int,
    dim: int,
    data: slice | Tensor,
    every: int,
    gradients: tuple[Tensor | None, ...],
) -> None:
    g = gradients[output]
    if g is not None:
        leading, earlier = (slice(None),) * dim, sample.gs[number]
        some = g.detach()[(*leading, data)][(*leading, slice(None, None, every))]
        # Several backward passes through one graph add up.
        sample.gs[number] = some.clone() if earlier is None else earlier + some


def choose(
    layer: Layer, z: Tensor, blocks: slice, fraction: float | Literal["auto"], ranks: int, seed: int
) -> tuple[slice | Tensor, float, Tensor | None]:
    """Some data of a call: those that enter both factors, all over these, and those that enter A, if they are more.

    Args:
        layer: Which was called.
        z: Its output.
        blocks: Which blocks of the layer took part.
        fraction: Share of the data, or ``"auto"``.
        ranks: Number of those that share the data.
        seed: Of the order, see :func:`shuffled`.
    """
    n, wide = z.shape[layer.data_dim], 0
    if z.ndim < 2 or n == 0:
        return slice(None), 1.0, None
    if fraction == "auto":
        all_blocks = range(layer.blocks or 1)
        channels = layer.channels * len(all_blocks[blocks]) // len(all_blocks)
        rows, data = z.numel() // channels * ranks, n * ranks
        share, wide = share_needed(rows, data, max(layer.shape)), int(share_of_inputs(rows, data) * n)
        kept = math.ceil(share * n - 1e-6)  # one row too few would be averaged over steps
    else:
        kept = max(1, round(fraction * n))
    if kept >= n:
        return slice(None), 1.0, None
    order = shuffled(n, seed, z.device)
    return order[:kept], n / kept, order[:wide] if wide > kept else None


def kept(x: Tensor, data: slice | Tensor) -> Tensor:
    """Some of a layer's input, to be read once the model has returned.

    Autograd sees to it that nobody writes to the input until then; but under autocast it keeps a cast of it.
    """
    is_shared, device = isinstance(data, slice), x.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x[data].clone() if is_shared and is_cast else x[data]


def shuffled(data: int, seed: int, device: torch.device) -> Tensor:
    """The order in which data are chosen: from its start for the factors, from its end for the quadratic model."""
    return torch.randperm(data, generator=torch.Generator().manual_seed(seed)).to(device)
