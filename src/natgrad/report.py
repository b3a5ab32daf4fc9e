"""Tables for people: what natgrad does with each parameter of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from natgrad.layers import Layer, partition


@dataclass(frozen=True)
class Row:
    """One layer, or one parameter without.

    Attributes:
        name: Of the layer, or of the parameter.
        kind: The module's type, or how the parameter is trained.
        factors: Sizes of G and A, of each block if there are several; empty without a layer.
        parameters: Number of entries.
        memory: Bytes of the factors and of their inverses, in float32.
        cost: Share of the time that all layers' inversions take, by the cubes of the sizes.
        reason: Why there is no Kronecker-factored block; empty where there is one.
    """

    name: str
    kind: str
    factors: tuple[str, ...]
    parameters: int
    memory: int
    cost: float
    reason: str


@dataclass(frozen=True)
class Description:
    """How natgrad handles a model; prints as a table."""

    rows: list[Row]

    def __str__(self) -> str:
        header = ("layer", "handled by", "G", "A", "parameters", "memory", "cost", "why not K-FAC")
        lines = [
            (
                row.name,
                row.kind,
                *(row.factors or ("", "")),
                f"{row.parameters:,}",
                _bytes(row.memory) if row.factors else "",
                f"{row.cost:.0%}" if row.factors else "",
                row.reason,
            )
            for row in self.rows
        ]
        return format_table([header, *lines], right_aligned={2, 3, 4, 5, 6})


def describe(model: nn.Module, *, strict: bool = False) -> Description:
    """Say which parameters of ``model`` get a Kronecker-factored block, and why the others do not.

    Args:
        model: The model.
        strict: Refuse a model in which a trainable parameter has no block.

    Raises:
        ValueError: with ``strict``, listing those parameters and the reasons.

    Example:
        >>> print(describe(nn.Sequential(nn.Linear(3, 4), nn.PReLU(4))))
        layer     handled by    G  A  parameters  memory  cost  why not K-FAC
        0         K-FAC Linear  4  4          16   256 B  100%
        1.weight  fallback                     4                no layer kind is registered for PReLU
    """
    parts = partition(model)
    if strict:
        parts.refuse_fallbacks()
    total = sum(layer.inversion_cost for layer in parts.layers) or 1
    rows = [
        Row(
            layer.name,
            f"K-FAC {type(layer.module).__name__}",
            tuple(_size(layer, side) for side in (0, 1)),
            sum(p.numel() for p in layer.parameters),
            2 * 4 * sum(_entries(layer, side) for side in (0, 1)),
            layer.inversion_cost / total,
            "",
        )
        for layer in parts.layers
    ]
    for name, reason in parts.reasons.items():
        parameter = model.get_parameter(name)
        kind = "fallback" if parameter.requires_grad else "nothing"
        rows.append(Row(name, kind, (), parameter.numel(), 0, 0.0, reason))
    return Description(rows)


def _size(layer: Layer, side: int) -> str:
    """Of G (side 0) or A: "B x d" for several blocks, "d diag" where only the diagonal is kept."""
    blocks = f"{layer.blocks} x " if layer.blocks else ""
    return f"{blocks}{layer.shape[side]}{' diag' if layer.diagonal[side] else ''}"


def _entries(layer: Layer, side: int) -> int:
    d = layer.shape[side]
    return (layer.blocks or 1) * (d if layer.diagonal[side] else d * d)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def format_table(rows: Sequence[tuple[str, ...]], right_aligned: set[int]) -> str:
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
