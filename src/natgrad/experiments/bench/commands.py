"""``natgrad bench …``: each command turns its options into one function call."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from natgrad.experiments.bench import models, protocol
from natgrad.experiments.bench import report as results
from natgrad.experiments.bench.contestants import CONTESTANTS
from natgrad.experiments.bench.records import Folder
from natgrad.experiments.bench.workloads import DEFAULT, WORKLOADS
from natgrad.experiments.download import DownloadError
from natgrad.experiments.experiment import INTERRUPTED
from natgrad.experiments.options import refusal, split
from natgrad.experiments.settings import SettingsError

app = typer.Typer(no_args_is_help=True, help="The benchmark suite: natgrad and its rivals on every workload.")


Workloads = Annotated[
    str | None,
    typer.Option(callback=split, help=f"Comma-separated, of: {', '.join(WORKLOADS)}. (default: {', '.join(DEFAULT)})"),
]
Contestants = Annotated[
    str | None, typer.Option(callback=split, help=f"Comma-separated, of: {', '.join(CONTESTANTS)}. (default: all)")
]
Scale = Annotated[float, typer.Option(min=1e-4, help="Multiplies the training time of every workload's runs.")]
Steps = Annotated[int, typer.Option(min=1, help="To measure of each, after the first few.")]
Threads = Annotated[int, typer.Option(min=1, help="Of torch, for all.")]
Out = Annotated[Path, typer.Option(help="Folder for the records.")]
OUT, COST_OUT = Path("runs/bench"), Path("runs/cost")


@app.command()
def tune(
    workloads: Workloads = None,
    contestants: Contestants = None,
    trials: Annotated[int, typer.Option(min=1, help="For each contestant on each workload.")] = 10,
    scale: Scale = 1.0,
    threads: Threads = 1,
    out: Out = OUT,
) -> None:
    """Try settings of every contestant, a third of a run's time for each trial."""

    def tune_all() -> None:
        plan = protocol.Plan(workloads or DEFAULT, contestants or tuple(CONTESTANTS), scale)
        protocol.tune(plan, Folder(out), trials, Console())

    _attempt(threads, tune_all)


@app.command()
def run(
    workloads: Workloads = None,
    contestants: Contestants = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of them.")] = 3,
    scale: Scale = 1.0,
    threads: Threads = 1,
    track: Annotated[str | None, typer.Option(help="defaults or tuned. (default: both where there was tuning)")] = None,
    out: Out = OUT,
) -> None:
    """Run every contestant on every workload, with its defaults and with its best settings."""

    def run_and_report() -> None:
        plan = protocol.Plan(workloads or DEFAULT, contestants or tuple(CONTESTANTS), scale)
        folder, console = Folder(out), Console()
        was_tuned = any(key.stage == "tune" for key in folder.records)
        tracks = (track,) if track else protocol.TRACKS if was_tuned else ("defaults",)
        protocol.run(plan, folder, seeds, tracks, console)
        protocol.measure_memory(plan, out, threads, console)
        results.report(folder, console)

    _attempt(threads, run_and_report)


@app.command()
def report(out: Out = OUT) -> None:
    """Draw the tables and plots of a folder again."""
    _attempt(1, lambda: results.report(Folder(out), Console()))


@app.command()
def overhead(
    contestants: Contestants = None,
    axes: Annotated[
        str | None, typer.Option(callback=split, help=f"What to vary, of: {', '.join(models.AXES)}. (default: all)")
    ] = None,
    steps: Steps = 30,
    threads: Threads = 1,
    out: Annotated[Path, typer.Option(help="Folder for the records.")] = COST_OUT,
) -> None:
    """How much longer a step takes than forward, backward and SGD: by batch, width, depth and period."""
    names = contestants or ("kfac",)
    _attempt(threads, lambda: models.overhead(out, axes or models.AXES, names, steps, Console()))


@app.command()
def scaling(
    contestants: Contestants = None,
    steps: Steps = 30,
    threads: Threads = 1,
    out: Annotated[Path, typer.Option(help="Folder for the records.")] = COST_OUT,
) -> None:
    """How cost and memory grow with batch, width and depth; uses what `overhead` measured in the same folder."""
    _attempt(threads, lambda: models.scaling(out, contestants or ("kfac",), steps, Console()))


def _attempt(threads: int, call: Callable[[], None]) -> None:
    torch.set_num_threads(threads)
    try:
        call()
    except (SettingsError, DownloadError) as error:
        raise refusal(error) from error
    except KeyboardInterrupt as error:
        typer.echo("Stopped. The same command goes on from here.", err=True)
        raise typer.Exit(INTERRUPTED) from error
