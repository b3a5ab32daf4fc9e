"""The live view of a run: one line per contestant, or plain lines where there is no terminal."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from natgrad.experiments.contestants import LABELS, Record
from natgrad.experiments.settings import Settings

# A redraw takes time that no contestant's clock sees but the user's does; nobody reads faster than this.
_REDRAW_SECONDS = 0.2
_LINE_SECONDS = 5.0


class Progress:
    """Shows how many steps every contestant has taken, and its last losses, while used as a context manager.

    Args:
        console: Where to. If it is no terminal, a line is printed per contestant every few seconds instead.
        optimizers: The contestants' names, in the order to show them.
        settings: For the limits.
    """

    def __init__(self, console: Console, optimizers: Sequence[str], settings: Settings) -> None:
        self._console = console
        self._settings = settings
        self._last: dict[str, Record | None] = dict.fromkeys(optimizers)
        self._test: dict[str, float] = {}
        self._drawn: dict[str, float] = {}
        self._printed: dict[str, Record] = {}
        # No thread of its own: it would take turns with the contestants on the same cores.
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
        else:
            for record in self._last.values():
                if record is not None and record is not self._printed.get(record.optimizer):
                    self._console.print(self._line(record), highlight=False, soft_wrap=True)

    def show(self, record: Record) -> None:
        """Take in a record, and redraw if the last time is long enough ago."""
        self._last[record.optimizer] = record
        if record.test_loss is not None:
            self._test[record.optimizer] = record.test_loss
        key = "" if self._live is not None else record.optimizer
        interval = _REDRAW_SECONDS if self._live is not None else _LINE_SECONDS
        now = time.monotonic()
        if now - self._drawn.get(key, -interval) < interval:
            return
        self._drawn[key] = now
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            self._printed[record.optimizer] = record
            self._console.print(self._line(record), highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD)
        table.add_column("optimizer")
        for name in ("steps", "train loss", "test loss", "seconds", "damping A, G"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, record in self._last.items():
            table.add_row(LABELS[name], *(self._cells(record) if record is not None else ["waiting"]))
        return table

    def _cells(self, record: Record) -> list[str]:
        steps, seconds = self._settings.steps, self._settings.seconds
        return [
            f"{record.step + 1}" + (f" / {steps}" if steps is not None else ""),
            "diverged" if record.train_loss is None else f"{record.train_loss:.3f}",
            _number(self._test.get(record.optimizer), ".3f"),
            f"{record.seconds:.1f}" + (f" / {seconds:g}" if seconds is not None else ""),
            damping(record),
        ]

    def _line(self, record: Record) -> str:
        step, train, test, seconds, damped = self._cells(record)
        tail = f"  damping A, G: {damped}" if damped else ""
        return (
            f"{LABELS[record.optimizer]:<18} steps {step:>9}  train {train:>8}  test {test:>8}  {seconds:>12} s{tail}"
        )


def damping(record: Record) -> str:
    """The dampings of the two factors, A's and G's, if the optimizer reported them."""
    reported = [record.diagnostics.get(name) for name in ("damping_a", "damping_g")]
    return " ".join(f"{value:.2g}" for value in reported if value is not None)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
