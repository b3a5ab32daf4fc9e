"""Tables and plots of finished runs, one or several."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from natgrad.experiments.curves import Run, read_run
from natgrad.experiments.runfolder import CURVES, TABLE, write_atomically
from natgrad.experiments.table import sheets


def compare(folders: Sequence[Path], out: Path | None, console: Console) -> None:
    """Redraw runs from their folders, overlaid and labelled by folder if there are several, and print the tables.

    Args:
        folders: Run folders.
        out: Where the plot and the table go; by default the run's own folder, or the current one for several runs.
        console: Where the tables are printed.

    Raises:
        SettingsError: A folder holds no run.
    """
    report(read_runs(folders, console), out or (folders[0] if len(folders) == 1 else Path()), console)


def read_runs(folders: Sequence[Path], console: Console) -> list[Run]:
    """Read runs, labelled by folder if there are several; says so if they are of different problems.

    Raises:
        SettingsError: A folder holds no run.
    """
    if len(folders) == 1:
        return [read_run(folders[0])]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(folder, f"{name}: ") for folder, name in zip(folders, names, strict=True)]
    if len({run.settings.problem for run in runs}) > 1:
        console.print("These runs are of different problems, so their losses and steps do not compare directly:")
        for name, run in zip(names, runs, strict=True):
            console.print(f"  {name}: {run.settings.describe()}", highlight=False)
    return runs


def report(runs: Sequence[Run], out: Path, console: Console) -> None:
    """Write `curves.png` and `table.md` into a folder and print the tables."""
    # Imported here: matplotlib takes half a second, which `natgrad --help` need not wait for.
    from natgrad.experiments.plot import draw

    out.mkdir(parents=True, exist_ok=True)
    tables = sheets(runs)
    title = "; ".join(dict.fromkeys(run.settings.describe() for run in runs))
    text = "\n".join([f"## MNIST autoencoder: {title}\n", *(sheet.markdown() for sheet in tables)])
    write_atomically(out / TABLE, lambda path: path.write_text(text))
    write_atomically(out / CURVES, lambda path: draw(runs, title, path))
    for sheet in tables:
        sheet.show(console)
    console.print(f"\nWritten: {out / TABLE}, {out / CURVES}", highlight=False, soft_wrap=True)
