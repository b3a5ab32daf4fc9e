"""The results as tables: the same cells for the terminal (rich) and for `table.md`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from natgrad.experiments.curves import Curve, Run
from natgrad.experiments.thresholds import ADAM_BEST_2017, BEST_2017, Cost, Row, rows

RECORDED_NOTE = (
    "* Adam did not get there in this run: its steps are those of the curve recorded in 2017 (thinned: up to 3% late), "
    "its seconds an estimate, those steps times the median step of Adam in this run."
)
BEST_NOTE = (
    f"{ADAM_BEST_2017:.4g} is the best that Adam reached in 2017 (sigmoid, full size, after 4,917 steps), "
    f"{BEST_2017:.4g} the best of all (K-FAC + Adam, after 1,054)."
)
BOUND_NOTE = "> not reached: the contestant stopped after so much; a ratio is then a lower bound."


@dataclass(frozen=True)
class Sheet:
    """A table before it is drawn.

    Attributes:
        title: What it shows.
        header: The columns' names.
        lines: The cells, and None where a rule separates two groups.
        notes: What the marks in the cells mean.
        text_columns: How many columns, from the left, are text; the others are numbers.
    """

    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...] | None]
    notes: list[str] = field(default_factory=list)
    text_columns: int = 1

    def markdown(self) -> str:
        """The table for `table.md`."""
        rule = "|" + "---|" * self.text_columns + "---:|" * (len(self.header) - self.text_columns)
        cells = ["| " + " | ".join(line) + " |" for line in (self.header, *(x for x in self.lines if x is not None))]
        notes = [note.replace("*", r"\*", 1).replace(">", r"\>", 1) for note in self.notes]
        return "\n\n".join([f"### {self.title}", "\n".join([cells[0], rule, *cells[1:]]), *notes]) + "\n"

    def show(self, console: Console) -> None:
        """Print the table."""
        table = Table(
            title=self.title,
            title_justify="left",
            title_style="bold",
            header_style="bold",
            box=SIMPLE_HEAD,
            show_edge=False,
        )
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if i < self.text_columns else "right", no_wrap=i >= self.text_columns)
        for line in self.lines:
            if line is None:
                table.add_section()
            else:
                table.add_row(*line)
        console.print()
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", highlight=False)


def sheets(runs: Sequence[Run]) -> list[Sheet]:
    """The tables of one or several runs: the way to each test loss if any was reached, and a summary."""
    reached = rows(runs)
    return [*([threshold_sheet(reached)] if reached else []), summary_sheet(runs)]


def threshold_sheet(table: Iterable[Row]) -> Sheet:
    """Steps and seconds to each test loss, with ratios to Adam's."""
    lines: list[tuple[str, ...] | None] = []
    shown: list[Row] = []
    for row in table:
        is_first = not shown or shown[-1].threshold != row.threshold
        if is_first and lines:
            lines.append(None)
        shown.append(row)
        lines.append((f"{row.threshold:.4g}" if is_first else "", row.label, *_numbers(row)))
    costs = [cost for row in shown for cost in (row.cost, row.adam) if cost is not None]
    notes = [BEST_NOTE] if any(row.threshold in (ADAM_BEST_2017, BEST_2017) for row in shown) else []
    notes += [RECORDED_NOTE] if any(cost.is_recorded for cost in costs) else []
    notes += [BOUND_NOTE] if any(cost.is_bound for cost in costs) else []
    header = ("test ≤", "optimizer", "steps", "seconds", "fewer steps", "less time")
    return Sheet(
        "Steps and training seconds to each test loss; ratios are to Adam",
        header,
        lines,
        notes,
        text_columns=2,
    )


def summary_sheet(runs: Sequence[Run]) -> Sheet:
    """What each contestant did in all: steps, time, cost of a step, best test loss."""
    header = ("optimizer", "best test loss", "at step", "steps", "seconds/step", "× Adam's")
    lines: list[tuple[str, ...] | None] = []
    for run in runs:
        adam = run.curves.get("adam")
        lines += [_summary(curve, None if adam is None else adam.step_seconds) for curve in run.curves.values()]
    return Sheet("Summary", header, lines)


def _summary(curve: Curve, adam_seconds: float | None) -> tuple[str, ...]:
    best, step = curve.best, curve.step_seconds
    return (
        curve.label,
        "–" if best is None else f"{best.test_loss:.3f}",
        "–" if best is None else f"{best.step:,}",
        f"{curve.last_step + 1:,}",
        "–" if step is None else f"{step:.3g}",
        "–" if step is None or not adam_seconds else f"{step / adam_seconds:.2f}",
    )


def _numbers(row: Row) -> tuple[str, str, str, str]:
    mark = "*" if row.cost.is_recorded else ""
    steps = f"{'> ' if row.cost.is_bound else ''}{row.cost.steps:,}{mark}"
    return steps, _seconds(row.cost) + mark, _ratio(row.steps_ratio, row.adam), _ratio(row.seconds_ratio, row.adam)


def _seconds(cost: Cost) -> str:
    if cost.seconds is None:
        return "–"
    sign = "> " if cost.is_bound else "≈ " if cost.is_recorded else ""
    # Three digits: neither a clock nor an estimate is worth more.
    return sign + (f"{float(f'{cost.seconds:.3g}'):,.0f}" if cost.seconds >= 100 else f"{cost.seconds:.3g}")


def _ratio(ratio: float | None, adam: Cost | None) -> str:
    if ratio is None or adam is None:
        return "–"
    number = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
    return ("> " if adam.is_bound else "") + number + "×" + ("*" if adam.is_recorded else "")
