"""``report.html``: a run as one page that a browser shows from disk, without network.

From the run folder come curves and tables (those of `table.md`), reconstructions, and what K-FAC told of itself. The
page is a template with its style and script inside it, in `html/`; the lines are drawn here (`charts`), and the
script only shows their values under the pointer.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import jinja2
from rich.console import Console

from natgrad.experiments import spectra
from natgrad.experiments.charts import Chart, Drawing, Series, draw
from natgrad.experiments.colours import COLOURS, GREY, INK, Colour
from natgrad.experiments.compare import read_runs
from natgrad.experiments.contestants import LABELS, Record
from natgrad.experiments.curves import Run, recorded
from natgrad.experiments.internals import internals
from natgrad.experiments.runfolder import (
    DIGITS,
    ENVIRONMENT,
    ORIGINALS,
    PAGE,
    read_reconstructions,
    read_records,
    write_atomically,
)
from natgrad.experiments.table import sheets
from natgrad.experiments.thresholds import cost

# Of all the pictures that a contestant left, so many are shown.
MOST_PICTURES = 8
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_TEMPLATE = Path(__file__).parent / "html"


@dataclass(frozen=True)
class Picture:
    """What a contestant made of the ten digits after so many steps; of the losses, what was measured there."""

    step: int
    seconds: float | None
    test_loss: float | None
    data: str


@dataclass(frozen=True)
class Card:
    """A contestant in three numbers."""

    label: str
    colour: Colour
    best: float | None
    at: str
    against_adam: str


def write_page(folder: Path, against: Sequence[Path], out: Path | None, console: Console) -> None:
    """Write the page of a run.

    Args:
        folder: The run folder.
        against: Other runs, drawn and tabulated beside it.
        out: The file; by default `report.html` in the run folder.
        console: Told where it is.

    Raises:
        SettingsError: A folder holds no run.
    """
    runs = read_runs([folder, *against], console)
    html = _render(folder, runs, [read_records(path) for path in (folder, *against)])
    out = out or folder / PAGE
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: path.write_text(html, encoding="utf-8"))
    console.print(f"Written: {out}", highlight=False, soft_wrap=True)


def _render(folder: Path, runs: Sequence[Run], records: Sequence[list[Record]]) -> str:
    loader = jinja2.FileSystemLoader(_TEMPLATE)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    run, own = runs[0], records[0]
    return environment.get_template("report.html.j2").render(
        title=run.settings.describe(),
        name=folder.resolve().name,
        against=[curve.label.partition(":")[0] for other in runs[1:] for curve in list(other.curves.values())[:1]],
        cards=[_card(run, name) for name in run.curves],
        losses=_drawn(_losses(runs, records)),
        originals=_data(folder / DIGITS / ORIGINALS),
        pictures={LABELS.get(name, name): found for name in run.curves if (found := _pictures(folder, name, own))},
        internals={LABELS.get(n, n): drawn for n in run.curves if (drawn := _drawn(internals(n, own)))},
        spectra={LABELS.get(n, n): drawn for n in run.curves if (drawn := _drawn(_spectra(n, own)))},
        sheets=sheets(runs),
        environment=json.loads((folder / ENVIRONMENT).read_text()),
        settings=run.settings.to_json(),
    )


def _drawn(charts: Sequence[Chart]) -> list[Drawing]:
    return [drawing for chart in charts if (drawing := draw(chart)) is not None]


def _spectra(optimizer: str, records: Sequence[Record]) -> list[Chart]:
    return spectra.charts([(float(r.step), r.diagnostics) for r in records if r.optimizer == optimizer])


def _losses(runs: Sequence[Run], records: Sequence[list[Record]]) -> list[Chart]:
    """Test and training loss, over steps and over seconds; runs differ by their dashes."""
    by_steps: list[Series] = []
    charts = []
    for nonlinearity in dict.fromkeys(run.settings.nonlinearity for run in runs if run.settings.is_full_size):
        for curve in recorded(nonlinearity).values():
            points = [(float(p.step), p.test_loss) for p in curve.points]
            by_steps.append(Series(f"{curve.label}, 2017", points, GREY, "1 3"))
    for kind in ("test_loss", "train_loss"):
        for axis, label in (("step", "steps"), ("seconds", "training seconds")):
            series = list(by_steps) if (kind, axis) == ("test_loss", "step") else []
            for run, own, dash in zip(runs, records, cycle(_DASHES), strict=False):
                for curve in run.curves.values():
                    points = [
                        (float(getattr(r, axis)), getattr(r, kind))
                        for r in own
                        if r.optimizer == curve.optimizer and getattr(r, kind) is not None
                    ]
                    series.append(Series(curve.label, points, COLOURS.get(curve.optimizer, INK), dash))
            title = "Test loss" if kind == "test_loss" else "Training loss"
            charts.append(Chart(title, label, "half squared error per image", series, x_unit=_unit(series)))
    return charts


def _unit(series: Sequence[Series]) -> float:
    """The smallest positive x: a first step, in steps or in seconds."""
    return min((x for one in series for x, _ in one.points if x > 0), default=1.0)


def _card(run: Run, name: str) -> Card:
    curve, adam = run.curves[name], run.curves.get("adam")
    best, against = curve.best, ""
    if adam is not None and adam.best is not None and name != "adam":
        took, theirs = cost(curve, adam.best.test_loss), adam.best
        if took is not None and not took.is_bound and took.steps and took.seconds and theirs.seconds:
            against = (
                f"reached Adam’s best, {theirs.test_loss:.4g}, in {theirs.step / took.steps:.2g}× fewer steps and "
                f"{theirs.seconds / took.seconds:.2g}× less time"
            )
    at = "" if best is None else f"best test loss, after {best.step:,} steps and {best.seconds or 0:,.3g} s"
    return Card(curve.label, COLOURS.get(name, INK), None if best is None else best.test_loss, at, against)


def _pictures(folder: Path, optimizer: str, records: Sequence[Record]) -> list[Picture]:
    files = list(read_reconstructions(folder, optimizer).items())
    # Evenly over those there are, the first and the last among them.
    chosen = {round(i * (len(files) - 1) / (MOST_PICTURES - 1)) for i in range(MOST_PICTURES)} if files else set()
    at = {record.step: record for record in records if record.optimizer == optimizer}
    pictures = []
    for step, file in (files[i] for i in sorted(chosen)):
        record = at.get(step)  # none at the end of the run: a record is written before its step
        seconds, loss = (None, None) if record is None else (record.seconds, record.test_loss)
        pictures.append(Picture(step, seconds, loss, _data(file)))
    return pictures


def _data(file: Path) -> str:
    """A PNG as a URL that holds it; empty where there is none, as in older runs."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" if file.exists() else ""
