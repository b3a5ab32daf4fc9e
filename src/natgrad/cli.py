"""``natgrad`` on the command line: the named experiments, and `verify` for a network of your own.

Each command turns its options into one function call of `natgrad.experiments`. To add one, write a function under
``@app.command()`` that calls it. Errors that the user can mend (`SettingsError`) are one line and exit code 2; anything
else is a bug and shows its traceback.
"""

import dataclasses
import datetime
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

# First, because it says which extra to install if typer or another package is missing.
import natgrad.experiments  # isort: skip
import typer
from rich.console import Console

import natgrad
from natgrad.experiments import compare as comparison
from natgrad.experiments import demo as preset
from natgrad.experiments import doctor as diagnosis
from natgrad.experiments import experiment
from natgrad.experiments import newton as derivation
from natgrad.experiments.bench.commands import app as bench
from natgrad.experiments.contestants import CONTESTANTS
from natgrad.experiments.options import refusal, split
from natgrad.experiments.settings import DEFAULT_STEPS, NONLINEARITIES, Settings, SettingsError
from natgrad.layers import Sharing
from natgrad.verification import MAX_PARAMETERS

# Typer's own tracebacks print every local variable, tensors included.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")

# The options' own default is None, so that a resumed run knows which ones were given.
_STEPS_DEFAULT = f"(default: {DEFAULT_STEPS}, or none with --seconds)"
_EVAL_DEFAULT = "(default: 1, on minibatches a quarter epoch)"
_SETTINGS = {field.name for field in dataclasses.fields(Settings)}


def _version(show: bool) -> None:
    if show:
        typer.echo(f"natgrad {natgrad.__version__}")
        raise typer.Exit


@app.callback()
def _natgrad(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """K-FAC for PyTorch: the experiments."""


@app.command()
def autoencoder(
    context: typer.Context,
    optimizers: Annotated[
        str | None,
        typer.Option(callback=split, help=f"Comma-separated, of: {', '.join(CONTESTANTS)}. (default: adam,kfac)"),
    ] = None,
    nonlinearity: Annotated[str | None, typer.Option(help=f"{' or '.join(NONLINEARITIES)}. (default: sigmoid)")] = None,
    weight_norm: Annotated[bool | None, typer.Option("--weight-norm", help="Weight-normalize every layer.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step. (default: all of them)")] = None,
    width_divisor: Annotated[int | None, typer.Option(help="Divide all inner widths by this. (default: 1)")] = None,
    images: Annotated[int | None, typer.Option(help="Training images, and test images. (default: 10000)")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Stop each after so many steps. {_STEPS_DEFAULT}")] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop each after so many seconds of training.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and minibatches. (default: 1)")] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch. (default: torch's choice)")] = None,
    eval_every: Annotated[int | None, typer.Option(help=f"Steps between test losses. {_EVAL_DEFAULT}")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: runs/autoencoder-<time>)")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --out holds.")] = False,
) -> None:
    """The article's deep MNIST autoencoder, trained by several optimizers taking turns."""
    given = {name: value for name, value in context.params.items() if name in _SETTINGS and value is not None}
    try:
        if resume is not None:
            if out is not None or overwrite:
                raise SettingsError("--resume writes into the folder it goes on with: leave out --out and --overwrite")
            code = experiment.resume(resume, given, Console())
        else:
            code = experiment.start(Settings(**given), out or _new_folder(), Console(), overwrite=overwrite)
    except SettingsError as error:
        raise refusal(error) from error
    raise typer.Exit(code)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the plot and table. (default: the run's own; for several, the current)"),
    ] = None,
) -> None:
    """Redraw the plot and tables of one run, or of several on top of each other."""
    try:
        comparison.compare(runs, out, Console())
    except SettingsError as error:
        raise refusal(error) from error


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    against: Annotated[list[Path] | None, typer.Option(help="Another run folder, drawn beside it; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file. (default: report.html in the run folder)")] = None,
) -> None:
    """A run as one page for the browser: curves, reconstructions, what K-FAC told of itself, tables."""
    # Imported here, as the plots are: matplotlib takes half a second, which `natgrad --help` need not wait for.
    from natgrad.experiments.page import write_page

    try:
        write_page(run, against or [], out, Console())
    except SettingsError as error:
        raise refusal(error) from error


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Run folder, replaced.")] = preset.OUT) -> None:
    """Adam and K-FAC side by side in a few minutes."""
    raise typer.Exit(preset.demo(out, Console()))


@app.command()
def doctor() -> None:
    """What this machine is, how fast K-FAC's parts are on it, and what to change."""
    diagnosis.doctor(Console())


@app.command()
def newton(
    depth: Annotated[int, typer.Option(min=1, max=16, help="Number of layers.")] = 4,
    width: Annotated[int, typer.Option(min=1, max=32, help="Of every layer, the input and the output.")] = 8,
    seed: Annotated[int, typer.Option(help="Of weights, data and output errors.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/newton"),
) -> None:
    """The article's derivation in numbers: for a deep linear network, K-FAC's step is Newton's."""
    raise typer.Exit(derivation.newton(depth, width, seed, out, Console()))


@app.command()
def verify(
    target: Annotated[str, typer.Argument(help="module:function, which returns model, inputs, targets and loss.")],
    reduce: Annotated[bool, typer.Option("--reduce", help='Share weights by "reduce" instead of "expand".')] = False,
    max_parameters: Annotated[int, typer.Option(help="Larger layers are sampled.")] = MAX_PARAMETERS,
) -> None:
    """Compare the curvature of your own network with the exact one, layer by layer."""
    try:
        model, x, y, loss = _load(target)()
    except SettingsError as error:
        raise refusal(error) from error
    sharing: Sharing = "reduce" if reduce else "expand"
    typer.echo(str(natgrad.verify(model, x, y, loss, sharing=sharing, max_parameters=max_parameters)))


def _load(target: str) -> Callable[[], tuple[Any, ...]]:
    """The function that ``module:function`` names, with the current folder among those searched."""
    module, _, function = target.partition(":")
    sys.path.insert(0, "")
    try:
        loaded: Callable[[], tuple[Any, ...]] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"{target!r} cannot be loaded ({error}): give module:function, where the function returns model, inputs, "
            "targets and loss, and the module can be imported from the current folder"
        ) from error
    return loaded


def _new_folder() -> Path:
    return Path("runs") / f"autoencoder-{datetime.datetime.now():%Y%m%d-%H%M%S}"
