"""``natgrad demo``: the article's experiment, shortened until it fits a coffee break on a slow machine.

Adam and K-FAC side by side, each with the same training time. The constants are the demo's size: two contestants use at
most `2 * SECONDS` of training, and the evaluations between them about half as much again.
"""

from pathlib import Path

from rich.console import Console

from natgrad.experiments.experiment import start
from natgrad.experiments.settings import Settings

OPTIMIZERS = ("adam", "kfac")
WIDTH_DIVISOR = 2
IMAGES = 5_000
SECONDS = 70.0
EVAL_EVERY = 1
OUT = Path("runs/demo")


def demo(out: Path, console: Console) -> int:
    """Run the demo into a folder, in place of an earlier one.

    Args:
        out: The run folder.
        console: Where progress and tables go.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.
    """
    settings = Settings(
        optimizers=OPTIMIZERS, width_divisor=WIDTH_DIVISOR, images=IMAGES, seconds=SECONDS, eval_every=EVAL_EVERY
    )
    return start(settings, out, console, overwrite=True)
