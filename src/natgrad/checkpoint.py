"""Beside everything: checkpoints that a killed process, a full disk or a bad sector cannot make wrong.

A file is what ``torch.save`` writes, followed by a mark and a SHA-256 of all before it; ``torch.load`` reads it. It
is written beside its place, brought to the disk and renamed: what stands there is the old file or the new one, whole.
Save between two steps; model, optimizer, scheduler and the position in the data belong together in one file.
"""

import hashlib
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

MARK = b"natgrad checkpoint, SHA-256:"
SIZE = len(MARK) + hashlib.sha256().digest_size
CHUNK = 2**20


class CheckpointError(ValueError):
    """A file is no whole checkpoint, or a folder holds none."""


def save(state: Any, path: str | os.PathLike[str]) -> None:
    """Replace the file at ``path`` atomically.

    Args:
        state: What ``torch.load`` may read with ``weights_only=True``: tensors, numbers, strings, dictionaries, lists.
        path: Of the file; its folder must be there.

    Raises:
        OSError: for instance for a full disk; the old file is untouched then.
    """
    path = Path(path)
    with replaced(path) as temporary, temporary.open("w+b") as file:
        _write(state, file)
        length = file.seek(0, os.SEEK_END)
        file.write(MARK + _digest(file, length))
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(path.parent)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, to be written; then it takes that place, or after an error is gone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], map_location: Any = None) -> Any:
    """What was saved there.

    Args:
        path: Of the file.
        map_location: As for ``torch.load``.

    Raises:
        CheckpointError: when the file is truncated, corrupted, or was not written by :func:`save`.
        FileNotFoundError: when there is none.
    """
    with Path(path).open("rb") as file:
        length = file.seek(0, os.SEEK_END) - SIZE
        if length < 0:
            raise CheckpointError(f"{path} is truncated, or no checkpoint of natgrad: use an older one.")
        file.seek(length)
        end = file.read(SIZE)
        if not end.startswith(MARK):
            raise CheckpointError(f"{path} is truncated, or no checkpoint of natgrad: use an older one.")
        if end[len(MARK) :] != _digest(file, length):
            raise CheckpointError(f"{path} is corrupted, its checksum is another: use an older one.")
        file.seek(0)
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds what cannot be read with `weights_only=True`: {error}") from error


def load_newest(folder: str | os.PathLike[str], pattern: str = "*.pt", map_location: Any = None) -> Any:
    """What the newest whole checkpoint of a folder holds; broken ones are passed over with a warning.

    Args:
        folder: Where they are, named so that names sort by age: ``f"{step:09d}.pt"``.
        pattern: Of their names.
        map_location: As for ``torch.load``.

    Raises:
        CheckpointError: when there is none.
    """
    for path in sorted(Path(folder).glob(pattern), reverse=True):
        try:
            return load(path, map_location)
        except CheckpointError as error:
            warnings.warn(f"natgrad: {error}", stacklevel=2)
    raise CheckpointError(f"{folder} holds no whole checkpoint called {pattern}.")


def _write(state: Any, file: BinaryIO) -> None:
    try:
        torch.save(state, file)
        file.flush()
    except RuntimeError as error:
        # Torch tells only that its writer failed, and not that for instance the disk is full.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _digest(file: BinaryIO, length: int) -> bytes:
    """Of the first ``length`` bytes; the file is then there."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (part := file.read(min(CHUNK, length))):
        digest.update(part)
        length -= len(part)
    return digest.digest()


def _flush_folder(folder: Path) -> None:
    """The new name, too, survives a power cut; not every system lets a folder be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
