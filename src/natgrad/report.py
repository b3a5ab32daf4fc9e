"""Tables for people: what natgrad does with each parameter of a model."""

from dataclasses import dataclass

from torch import nn

from natgrad.layers import partition


@dataclass(frozen=True)
class Row:
    """One layer or parameter.

    Attributes:
        name: Of the layer, or of a parameter without one.
        kind: The module's type, or how the parameter is trained.
        factors: Sizes of G and A.
        parameters: Number of entries.
        reason: Why there is no Kronecker-factored block; empty where there is one.
    """

    name: str
    kind: str
    factors: tuple[int, int] | None
    parameters: int
    reason: str


@dataclass(frozen=True)
class Description:
    """How natgrad handles a model; prints as a table."""

    rows: list[Row]

    def __str__(self) -> str:
        header = ("layer", "handled by", "G", "A", "parameters", "why not K-FAC")
        lines = [
            (
                row.name,
                row.kind,
                str(row.factors[0]) if row.factors else "",
                str(row.factors[1]) if row.factors else "",
                f"{row.parameters:,}",
                row.reason,
            )
            for row in self.rows
        ]
        return format_table([header, *lines], right_aligned={2, 3, 4})


def describe(model: nn.Module) -> Description:
    """Say which parameters of ``model`` get a Kronecker-factored block, and why the others do not.

    Example:
        >>> print(describe(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))))
        layer     handled by    G  A  parameters  why not K-FAC
        0         K-FAC Linear  4  4          16
        1.weight  fallback                     4  no layer kind is registered for LayerNorm
        1.bias    fallback                     4  no layer kind is registered for LayerNorm
    """
    parts = partition(model)
    rows = [
        Row(
            layer.name,
            f"K-FAC {type(layer.module).__name__}",
            layer.shape,
            sum(p.numel() for p in layer.parameters),
            "",
        )
        for layer in parts.layers
    ]
    for name, reason in parts.reasons.items():
        parameter = model.get_parameter(name)
        rows.append(Row(name, "fallback" if parameter.requires_grad else "nothing", None, parameter.numel(), reason))
    return Description(rows)


def format_table(rows: list[tuple[str, ...]], right_aligned: set[int]) -> str:
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
