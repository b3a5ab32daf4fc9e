"""What a run writes, so that nothing measured is lost and everything can be redrawn.

| file | content | written |
|---|---|---|
| `config.json` | the settings | at the start |
| `environment.json` | versions, threads, processor, command line; one more entry a resumption | at the start |
| `metrics.jsonl` | one record a line | appended and flushed after every step |
| `checkpoint.pt` | state of every contestant | every minute, at the end, when interrupted |
| `digits/originals.png` | ten test images side by side | at the start |
| `digits/<optimizer>-<step>.png` | what a contestant made of them | at log-spaced steps, and at the end |
| `curves.png`, `table.md` | the results | at the end, and by ``natgrad compare`` |
| `report.html` | all of it, to look at | by ``natgrad report`` |

All but the metrics are replaced atomically (written beside, then renamed): a file is either the old one or the new one.
"""

import errno
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import natgrad
from natgrad import checkpoint
from natgrad.experiments.contestants import Contestant, Record
from natgrad.experiments.samples import png
from natgrad.experiments.settings import LIMITS, Settings, SettingsError

CONFIG, ENVIRONMENT, METRICS, CHECKPOINT = "config.json", "environment.json", "metrics.jsonl", "checkpoint.pt"
CURVES, TABLE, PAGE = "curves.png", "table.md", "report.html"
DIGITS, ORIGINALS = "digits", "originals.png"


class RunFolder:
    """The files of one run. Make one with `create` or `reopen`.

    Attributes:
        path: The folder.
        settings: What its `config.json` says.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings

    @classmethod
    def create(cls, path: Path, settings: Settings, *, overwrite: bool = False) -> "RunFolder":
        """Start a new run.

        Raises:
            SettingsError: The folder already holds a run and ``overwrite`` is off.
        """
        if (path / METRICS).exists() or (path / CONFIG).exists():
            if not overwrite:
                raise SettingsError(
                    f"{path} already holds a run: go on with `--resume {path}`, give another `--out`, "
                    "or add `--overwrite`"
                )
            for file in (path / DIGITS).glob("*.png"):
                file.unlink()
            for name in (CHECKPOINT, METRICS, CURVES, TABLE, PAGE, ENVIRONMENT, CONFIG):
                (path / name).unlink(missing_ok=True)
        (path / DIGITS).mkdir(parents=True, exist_ok=True)
        write_json(path / CONFIG, settings.to_json())
        write_json(path / ENVIRONMENT, environment(settings.threads))
        (path / METRICS).touch()
        return cls(path, settings)

    @classmethod
    def reopen(cls, path: Path, given: dict[str, Any]) -> "RunFolder":
        """Go on with a run, with its own settings; of the ``given`` ones only the limits may differ.

        If a limit is given, the run's former limits no longer count.

        Raises:
            SettingsError: There is no run to go on with, or it was made with other settings.
        """
        settings = read_settings(path)
        if not (path / CHECKPOINT).exists():
            raise SettingsError(
                f"{path} has no {CHECKPOINT} (one is saved every minute and at the end): start it again with "
                f"`--out {path} --overwrite`"
            )
        if differences := settings.differences(given):
            listed = "; ".join(f"{name} was {ours}, not {theirs}" for name, (ours, theirs) in differences.items())
            raise SettingsError(
                f"{path} was made with other settings ({listed}): leave those options out, or start a new run with "
                f"`--out`; only {' and '.join(LIMITS)} may change on the way"
            )
        if any(name in given for name in LIMITS):
            settings = Settings.from_json({**settings.to_json(), **{name: given.get(name) for name in LIMITS}})
        write_json(path / CONFIG, settings.to_json())
        earlier = json.loads((path / ENVIRONMENT).read_text())
        write_json(
            path / ENVIRONMENT, {**earlier, "resumed": [*earlier.get("resumed", []), environment(settings.threads)]}
        )
        return cls(path, settings)

    def append(self, record: Record) -> None:
        """Add one record to the metrics; it is on its way to the disk when this returns."""
        line = (json.dumps(asdict(record), allow_nan=False) + "\n").encode()
        with (self.path / METRICS).open("ab", buffering=0) as file:
            length = file.tell()
            if file.write(line) < len(line):  # the disk is full, and after half a line no other could be read
                file.truncate(length)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)

    def save_digits(self, name: str, images: Tensor) -> None:
        """Save images (n, 784), values in [0, 1], as one picture of the folder `digits`."""
        (self.path / DIGITS).mkdir(exist_ok=True)  # the run may be older than its pictures
        write_atomically(self.path / DIGITS / name, lambda path: path.write_bytes(png(images)))

    def save_reconstructions(self, contestant: Contestant) -> None:
        """Save what a contestant makes of the ten digits now."""
        self.save_digits(f"{contestant.name}-{contestant.step:07d}.png", contestant.reconstructions())

    def save_checkpoint(self, contestants: Sequence[Contestant]) -> None:
        """Save what `load_checkpoint` needs. Call it between steps only: half a step is not a state to go on from."""
        state = {contestant.name: contestant.state_dict() for contestant in contestants}
        checkpoint.save(state, self.path / CHECKPOINT)

    def load_checkpoint(self, contestants: Sequence[Contestant]) -> None:
        """Put every contestant back where the checkpoint left it, and drop the records of steps it will take again.

        Raises:
            SettingsError: The file cannot be read as a checkpoint.
        """
        try:
            state = checkpoint.load(self.path / CHECKPOINT)
        except checkpoint.CheckpointError as error:
            raise SettingsError(f"the run cannot go on: {error}") from error
        for contestant in contestants:
            contestant.load_state_dict(state[contestant.name])
        kept = [r for r in read_records(self.path) if r.step < state[r.optimizer]["step"]]
        text = "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in kept)
        write_atomically(self.path / METRICS, lambda path: path.write_text(text))


def read_settings(path: Path) -> Settings:
    """The settings of the run in a folder.

    Raises:
        SettingsError: The folder holds no run.
    """
    try:
        return Settings.from_json(json.loads((path / CONFIG).read_text()))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SettingsError(f"{path} holds no run ({CONFIG} is missing): name a folder that `--out` wrote") from error


def read_records(path: Path) -> list[Record]:
    """The records of the run in a folder, in the order they were measured."""
    lines = (path / METRICS).read_text().splitlines(keepends=True)
    # A process that was killed may have left half a line at the end.
    return [Record(**json.loads(line)) for line in lines if line.endswith("\n")]


def read_reconstructions(path: Path, optimizer: str) -> dict[int, Path]:
    """The pictures that a contestant left in a run folder, by steps taken, in their order."""
    files = sorted((path / DIGITS).glob(f"{optimizer}-[0-9]*.png"))
    return {int(file.stem.removeprefix(f"{optimizer}-")): file for file in files}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: readers never see half a file."""
    with checkpoint.replaced(path) as temporary:
        write(temporary)


def environment(threads: int | None) -> dict[str, Any]:
    """What timings depend on besides the settings; ``threads`` is None where torch chose them."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "natgrad": natgrad.__version__,
        "torch": torch.__version__,
        "threads": threads or torch.get_num_threads(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def processor() -> str:
    """The model of this machine's processor."""
    # On Linux `platform.processor()` is empty or just the architecture; the kernel knows the model.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))
