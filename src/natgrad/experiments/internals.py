"""Charts of what K-FAC told of itself during a run: its step, and damping and conditioning of each layer.

The numbers are those of `natgrad.KFAC.diagnostics`, as the records hold them; runs of older versions may lack some.
"""

from collections.abc import Sequence

from natgrad.experiments.charts import Chart, Points, Series
from natgrad.experiments.colours import COLOURS, INK, ordered
from natgrad.experiments.contestants import Record

# Key, title, label of the vertical axis.
_PER_LAYER = (
    ("damping_a", "Damping of A", "squared units of the layer’s input"),
    ("damping_g", "Damping of G", "loss over squared units of the layer’s output"),
    ("condition_a", "Condition number of A, damped", "largest over smallest eigenvalue"),
    ("condition_g", "Condition number of G, damped", "largest over smallest eigenvalue"),
    ("condition", "Condition number of the damped block", "largest over smallest eigenvalue"),
    ("relative_step", "Length of the step", "over the length of the parameters"),
    ("kl_kfac", "KL divergence of the step, by the blocks", "½ sᵀFs, units of the loss"),
)
_BLUE, _GREEN, _PINK = COLOURS["adam"], COLOURS["kfac-sgd"], COLOURS["kfac-adam"]
# Key, label, sign, colour, dashes.
_STEP = (
    ("predicted_change", "fall predicted by the model", -1.0, _BLUE, "7 4"),
    ("actual_change", "fall measured", -1.0, _BLUE, ""),
    ("kl", "KL, whole network", 1.0, _GREEN, ""),
    ("kl_kfac", "KL, by the blocks", 1.0, _GREEN, "7 4"),
)


def internals(optimizer: str, records: Sequence[Record]) -> list[Chart]:
    """The charts of one contestant; those without a point are left to the drawing to drop."""
    own = [record for record in records if record.optimizer == optimizer and record.diagnostics]
    factors = [
        Series("rate", _points(own, "lr"), COLOURS["kfac"]),
        Series("momentum", _points(own, "momentum"), _PINK, "7 4"),
    ]
    falls = [Series(label, _points(own, key, sign), colour, dash) for key, label, sign, colour, dash in _STEP]
    charts = [
        Chart("Rate and momentum", "steps", "factor of the direction", factors, linear=True),
        Chart("What a step does to the loss", "steps", "units of the loss", falls),
    ]
    factored = any(key.startswith("condition_a/") for record in own for key in record.diagnostics)
    for key, title, label in _PER_LAYER:
        if key != "condition" or not factored:
            charts.append(Chart(title, "steps", label, _layers(own, key)))
    return charts


def _layers(records: Sequence[Record], key: str) -> list[Series]:
    """One line a layer, in the model's order; one for all of them where they agree."""
    prefix = f"{key}/"
    names = list(dict.fromkeys(k for record in records for k in record.diagnostics if k.startswith(prefix)))
    lines = [_points(records, name) for name in names]
    if len(lines) > 1 and all(line == lines[0] for line in lines):
        return [Series("all layers", lines[0], INK)]
    labels = [f"layer {name.removeprefix(prefix)}" for name in names]
    return [Series(*parts) for parts in zip(labels, lines, ordered(len(names)), strict=True)]


def _points(records: Sequence[Record], key: str, sign: float = 1.0) -> Points:
    """(step, value) wherever the key was told."""
    told = ((record.step, record.diagnostics.get(key)) for record in records)
    return [(float(step), sign * value) for step, value in told if value is not None]
