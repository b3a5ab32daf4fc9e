"""Eigenvalues of each layer's factors over a run: some of their quantiles in the records, and a chart of each factor.

A factor's spectrum is what its damping is to be compared with: eigenvalues far above the damping make Newton's steps,
those far below make gradient steps. So the damping is drawn into the same chart.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from natgrad.diagnostics import shown
from natgrad.experiments.charts import Chart, Series
from natgrad.experiments.colours import INK, ordered

# Label by quantile; of an order that the page keeps.
QUANTILES = {1.0: "largest", 0.9: "top tenth from", 0.5: "median", 0.1: "bottom tenth up to"}
_UNITS = {"a": "squared units of the layer’s input", "g": "loss over squared units of the layer’s output"}


def told(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Quantiles of the eigenvalues, by keys ``eigenvalue_a@0.5/<layer>``.

    Args:
        factors: A and G by layer name, ([B,] d, d), or a column ([B,] d, 1) if kept as a diagonal.
    """
    at = torch.tensor(list(QUANTILES))
    values = {}
    for name, pair in factors.items():
        for side, factor in zip("ag", pair, strict=True):
            spectrum = _spectrum(factor).cpu().clamp(min=0)
            for quantile, value in zip(QUANTILES, torch.quantile(spectrum, at.to(spectrum)), strict=True):
                values[f"eigenvalue_{side}@{quantile}/{shown(name)}"] = value.item()
    return values


def charts(told: Sequence[tuple[float, Mapping[str, float | None]]]) -> list[Chart]:
    """One chart for each factor, A and G of a layer side by side.

    Args:
        told: Steps, and what was told after them.
    """
    layers = dict.fromkeys(
        key.partition("/")[2] for _, values in told for key in values if key.startswith("eigenvalue_")
    )
    return [_chart(told, layer, side) for layer in layers for side in "ag"]


def _chart(told: Sequence[tuple[float, Mapping[str, float | None]]], layer: str, side: str) -> Chart:
    colours = ordered(len(QUANTILES))
    series = [
        Series(label, _points(told, f"eigenvalue_{side}@{quantile}/{layer}"), colour)
        for (quantile, label), colour in zip(QUANTILES.items(), colours, strict=True)
    ]
    series.append(Series("damping", _points(told, f"damping_{side}/{layer}"), INK, "7 4"))
    title = f"Eigenvalues of {side.upper()}, layer {layer}"
    return Chart(title, "steps", _UNITS[side], series)


def _points(told: Sequence[tuple[float, Mapping[str, float | None]]], key: str) -> list[tuple[float, float]]:
    return [(step, value) for step, values in told if (value := values.get(key)) is not None]


def _spectrum(factor: Tensor) -> Tensor:
    if factor.shape[-1] == 1:
        return factor.flatten()
    spectrum: Tensor = torch.linalg.eigvalsh(factor.double()).flatten()
    return spectrum
