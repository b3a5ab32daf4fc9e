"""Tables for people: what natgrad does with each parameter of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from natgrad.distributed import Distributed, World, holders
from natgrad.layers import Layer, partition, unwrap
from natgrad.options import module_of


@dataclass(frozen=True)
class Row:
    """One layer, or one parameter without.

    Attributes:
        name: Of the layer, or of the parameter.
        kind: The module's type, or how the parameter is trained.
        factors: Sizes of G and A, of each block if there are several; empty without a layer.
        parameters: Number of entries.
        memory: Bytes that :class:`~natgrad.KFAC` keeps for it between two steps, see :func:`describe`.
        cost: Share of the time that all layers' inversions take, by the cubes of the sizes.
        traffic: Bytes of the messages about the layer in a step in which its factors and inverse are refreshed, each
            message counted once, in float32, of :class:`~natgrad.KFAC` with its defaults; 0 in one process.
        reason: Why there is no Kronecker-factored block; empty where there is one.
    """

    name: str
    kind: str
    factors: tuple[str, ...]
    parameters: int
    memory: int
    cost: float
    reason: str
    traffic: int = 0


@dataclass(frozen=True)
class Description:
    """How natgrad handles a model; prints as a table."""

    rows: list[Row]

    @property
    def memory(self) -> int:
        """Bytes that :class:`~natgrad.KFAC` keeps between two steps."""
        return sum(row.memory for row in self.rows)

    def __str__(self) -> str:
        header = ["layer", "handled by", "G", "A", "parameters", "memory", "cost", "traffic", "why not K-FAC"]
        lines = [
            [
                row.name,
                row.kind,
                *(row.factors or ("", "")),
                f"{row.parameters:,}",
                _bytes(row.memory) if row.memory else "",
                f"{row.cost:.0%}" if row.factors else "",
                _bytes(row.traffic) if row.factors else "",
                row.reason,
            ]
            for row in self.rows
        ]
        if len(lines) > 1:
            parameters = sum(row.parameters for row in self.rows)
            lines.append(["all", "", "", "", f"{parameters:,}", _bytes(self.memory), "", _bytes(self._traffic), ""])
        if not self._traffic:
            for cells in (header, *lines):
                del cells[7]
        return format_table([header, *lines], right_aligned={2, 3, 4, 5, 6, *([7] if len(header) > 8 else [])})

    @property
    def _traffic(self) -> int:
        return sum(row.traffic for row in self.rows)


def describe(model: nn.Module | Distributed, *, strict: bool = False, ranks: int | None = None) -> Description:
    """Say which parameters of ``model`` get a Kronecker-factored block, why the others do not, and what it takes.

    Memory is that of all tensors that :class:`~natgrad.KFAC` keeps between two steps besides the model, up to a few
    numbers a layer: two factors, their inverses (with ``inverse="cholesky"``), the previous step and the average
    gradient of every layer, and AdamW's two averages of the other parameters. A :class:`~natgrad.Preconditioner` keeps
    no previous step and no averages, and with a number as rate or momentum there is no average gradient. Of several
    ranks, it is what one keeps that holds all inverses. During a step come, as with any optimizer, activations and
    gradients, and besides up to four times the parameters for the step and its trial; where curvature is due, the sums
    that become the next factors, as large as these, and the rows of the data that enter them.

    Args:
        model: The model; wrapped, or in a :class:`~natgrad.Distributed`, for what several processes would send.
        strict: Refuse a model in which a trainable parameter has no block.
        ranks: Number of processes, to plan for; by default those that train the model now.

    Raises:
        ValueError: with ``strict``, listing those parameters and the reasons.

    Example:
        >>> print(describe(nn.Sequential(nn.Linear(3, 4), nn.PReLU(4))))
        layer     handled by    G  A  parameters  memory  cost  why not K-FAC
        0         K-FAC Linear  4  4          16   384 B  100%
        1.weight  fallback                     4    32 B        no layer kind is registered for PReLU
        all                                   20   416 B
    """
    inner = unwrap(module_of(model))
    parts = partition(inner)
    size = ranks or World.of(model).size
    holding = holders(model.inverses if isinstance(model, Distributed) else "comm", size)
    if strict:
        parts.refuse_fallbacks()
    total = sum(layer.inversion_cost for layer in parts.layers) or 1
    rows = [
        Row(
            layer.name,
            f"K-FAC {type(layer.module).__name__}",
            tuple(_size(layer, side) for side in (0, 1)),
            sum(p.numel() for p in layer.parameters),
            _kept(layer),
            layer.inversion_cost / total,
            "",
            4 * _sent(layer, size, holding),
        )
        for layer in parts.layers
    ]
    for name, reason in parts.reasons.items():
        parameter = inner.get_parameter(name)
        kind = "fallback" if parameter.requires_grad else "nothing"
        averages = 2 * parameter.nbytes if parameter.requires_grad else 0
        rows.append(Row(name, kind, (), parameter.numel(), averages, 0.0, reason))
    return Description(rows)


def _size(layer: Layer, side: int) -> str:
    """Of G (side 0) or A: "B x d" for several blocks, "d diag" where only the diagonal is kept."""
    blocks = f"{layer.blocks} x " if layer.blocks else ""
    return f"{blocks}{layer.shape[side]}{' diag' if layer.diagonal[side] else ''}"


def _kept(layer: Layer) -> int:
    """Bytes of factors, inverses, previous step and average gradient, none of less precision than float32."""
    sides = zip(layer.shape, layer.diagonal, strict=True)
    factors = (layer.blocks or 1) * sum(d if diagonal else d * d for d, diagonal in sides)
    step = sum(p.numel() for p in layer.parameters)
    return (2 * factors + 2 * step) * torch.promote_types(layer.parameters[0].dtype, torch.float32).itemsize


def _sent(layer: Layer, ranks: int, holding: int) -> int:
    """Entries of the messages about a layer, of which so many ranks hold the inverse."""
    if ranks == 1:
        return 0
    blocks, (out, width) = layer.blocks or 1, layer.shape
    triangles = sum(
        blocks * (d if alone else d * (d + 1) // 2) for d, alone in zip(layer.shape, layer.diagonal, strict=True)
    )
    factors = triangles + blocks  # and the numbers of rows
    inverses = triangles if holding > 1 else 0
    lent_and_solved = triangles + blocks * out * width if holding < ranks else 0
    return factors + inverses + lent_and_solved


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def format_table(rows: Sequence[Sequence[str]], right_aligned: set[int]) -> str:
    """Columns padded to their widest cell, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right_aligned else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
