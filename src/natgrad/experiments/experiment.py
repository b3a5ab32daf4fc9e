"""One run from start to end: race, record, checkpoint, draw.

Ctrl-C lets the step in progress finish, saves a checkpoint, draws and prints what there is; a second Ctrl-C does not
wait for the step, and leaves the last checkpoint as it was. Either way nothing measured is lost.
"""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from rich.console import Console

from natgrad.experiments.autoencoder import Problem
from natgrad.experiments.compare import report
from natgrad.experiments.contestants import Contestant
from natgrad.experiments.curves import read_run
from natgrad.experiments.progress import Progress
from natgrad.experiments.race import race
from natgrad.experiments.runfolder import ORIGINALS, RunFolder
from natgrad.experiments.samples import PICTURES_PER_DOUBLING, is_sampled
from natgrad.experiments.settings import Settings

CHECKPOINT_SECONDS = 60.0
INTERRUPTED = 130  # What shells report for a program ended by Ctrl-C.


class InterruptFlag:
    """While used as a context manager: the first Ctrl-C is only noted, the next one raises KeyboardInterrupt.

    Args:
        notify: Called when the first one arrives.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self.is_set = False
        self._notify = notify
        # Python delivers signals to the main thread only, and lets only that thread ask for them.
        self._applies = threading.current_thread() is threading.main_thread()
        self._previous: Any = None

    def __enter__(self) -> "InterruptFlag":
        if self._applies:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._applies:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        self._notify()


def start(settings: Settings, path: Path, console: Console, *, overwrite: bool = False) -> int:
    """Run the experiment in a new folder.

    Args:
        settings: What to run.
        path: The run folder, made if need be.
        console: Where progress and tables go.
        overwrite: Replace a run that is already there.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        SettingsError: The folder holds a run already, or an optimizer is unknown.
    """
    _set_threads(settings)
    problem = Problem(settings)
    contestants = _contestants(problem)
    folder = RunFolder.create(path, settings, overwrite=overwrite)
    folder.save_digits(ORIGINALS, problem.digits)
    for contestant in contestants:
        folder.save_reconstructions(contestant)
    return _run(folder, contestants, console)


def resume(path: Path, given: dict[str, Any], console: Console) -> int:
    """Go on with the run in a folder.

    Args:
        path: The run folder.
        given: Settings that the user named; the limits may be new, the others must be the run's.
        console: Where progress and tables go.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        SettingsError: There is no run to go on with, or it was made with other settings.
    """
    folder = RunFolder.reopen(path, given)
    _set_threads(folder.settings)
    contestants = _contestants(Problem(folder.settings))
    folder.load_checkpoint(contestants)
    return _run(folder, contestants, console)


def _run(folder: RunFolder, contestants: Sequence[Contestant], console: Console) -> int:
    # Soft wrap, here and below, so that a path can be copied in one piece.
    names = ", ".join(folder.settings.optimizers)
    console.print(f"{folder.settings.describe()}: {names} -> {folder.path}", highlight=False, soft_wrap=True)
    interrupted = _race(folder, contestants, console)
    report([read_run(folder.path)], folder.path, console)
    if interrupted:
        command = f"natgrad autoencoder --resume {folder.path}"
        console.print(f"Interrupted. Go on with: {command}", highlight=False, soft_wrap=True)
    return INTERRUPTED if interrupted else 0


def _race(folder: RunFolder, contestants: Sequence[Contestant], console: Console) -> bool:
    """Let them run, writing down every record; returns whether Ctrl-C ended it."""
    settings = folder.settings
    by_name = {contestant.name: contestant for contestant in contestants}
    flag = InterruptFlag(lambda: console.print("Finishing the step in progress (Ctrl-C again to stop at once) ..."))
    saved = time.monotonic()
    try:
        with flag, Progress(console, settings.optimizers, settings) as progress:
            for record in race(contestants, settings):
                folder.append(record)
                progress.show(record)
                if is_sampled(record.step + 1, PICTURES_PER_DOUBLING):
                    folder.save_reconstructions(by_name[record.optimizer])
                if flag.is_set:
                    break
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    folder.save_checkpoint(contestants)
                    saved = time.monotonic()
            for contestant in contestants:
                folder.save_reconstructions(contestant)
            folder.save_checkpoint(contestants)
    # Raised in the middle of a step, so the contestants are not in a state to save.
    except KeyboardInterrupt:
        return True
    return flag.is_set


def _contestants(problem: Problem) -> list[Contestant]:
    return [Contestant(name, problem) for name in problem.settings.optimizers]


def _set_threads(settings: Settings) -> None:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
