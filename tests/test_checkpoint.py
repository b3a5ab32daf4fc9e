"""Checkpoints: whole or refused, whatever happens to the process, the disk and the file."""

import pathlib
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from killed import Training
from natgrad import checkpoint


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    training = Training()
    for _ in range(3):
        training.step()
    return training.state_dict()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(nan=7.5), other.nan_to_num(nan=7.5))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_what_is_saved_is_read_and_torch_reads_it_too(trained: dict[str, Any], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "one.pt"
    checkpoint.save({"step": 0}, path)
    checkpoint.save(trained, path)
    assert equal(checkpoint.load(path), trained)
    assert equal(torch.load(path, weights_only=True), trained)
    assert [file.name for file in tmp_path.iterdir()] == ["one.pt"]


# Of the file's bytes, something wrong.
Fault = Callable[[bytearray, random.Random], bytes]
FAULTS: dict[str, Fault] = {
    "truncated": lambda data, draw: data[: draw.randrange(len(data))],
    "bit": lambda data, draw: flip(data, draw, 1),
    "bits": lambda data, draw: flip(data, draw, 20),
    "sector of zeros": lambda data, draw: overwrite(data, draw, bytes(512)),
    "sector of noise": lambda data, draw: overwrite(data, draw, draw.randbytes(512)),
    "appended": lambda data, draw: bytes(data) + draw.randbytes(draw.randrange(1, 100)),
    "lost in the middle": lambda data, draw: cut(data, draw),
    "end of another": lambda data, draw: data[: len(data) // 2] + data[: len(data) // 2],
}


def flip(data: bytearray, draw: random.Random, bits: int) -> bytes:
    for _ in range(bits):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def overwrite(data: bytearray, draw: random.Random, sector: bytes) -> bytes:
    start = draw.randrange(len(data) - len(sector))
    data[start : start + len(sector)] = sector
    return data


def cut(data: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(data) - 64)
    del data[start : start + draw.randrange(1, 64)]
    return data


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_broken_file_is_refused(fault: Fault, trained: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """25 of each kind, 200 in all: an error that names the file, or nothing was broken."""
    path = tmp_path / "one.pt"
    checkpoint.save(trained, path)
    whole, untouched = path.read_bytes(), 0
    for seed in range(25):
        broken = bytes(fault(bytearray(whole), random.Random(seed)))
        path.write_bytes(broken)
        if broken == whole:
            untouched += 1
            assert equal(checkpoint.load(path), trained)
        else:
            with pytest.raises(checkpoint.CheckpointError, match=re.escape(str(path))):
                checkpoint.load(path)
    assert untouched <= 5


def test_a_file_of_another_kind_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save({"step": 1}, path)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of natgrad"):
        checkpoint.load(path)
    checkpoint.save({"code": pathlib.PurePath("anything")}, path)
    with pytest.raises(checkpoint.CheckpointError, match="weights_only"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.pt")


def test_the_newest_whole_one_counts(tmp_path: pathlib.Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="holds no whole checkpoint"):
        checkpoint.load_newest(tmp_path)
    for step in (9, 10, 11):
        checkpoint.save({"step": step}, tmp_path / f"{step:09d}.pt")
    assert checkpoint.load_newest(tmp_path) == {"step": 11}
    file = tmp_path / "000000011.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"000000011\.pt is truncated"):
        assert checkpoint.load_newest(tmp_path) == {"step": 10}


@contextmanager
def no_more_than(size: int) -> Iterator[None]:
    """Files cannot grow beyond ``size`` bytes: a real failure of writing, for which no disk needs to be full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 2000, 20_000])
def test_a_failing_write_leaves_the_old_file(size: int, trained: dict[str, Any], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "one.pt"
    checkpoint.save({"step": 1}, path)
    with no_more_than(size), pytest.raises(OSError, match="File too large"):
        checkpoint.save({**trained, "much": torch.ones(10_000)}, path)
    assert checkpoint.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["one.pt"]


@pytest.mark.slow
def test_fifty_kills_are_fifty_resumptions(tmp_path: pathlib.Path) -> None:
    """What fifty killed processes reached together is bitwise what one reaches alone."""
    script = pathlib.Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(tmp_path), "50", "0"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    signals = [line.split()[1] for line in told.stdout.splitlines()]
    assert signals == ["9"] * 50
    reached = checkpoint.load_newest(tmp_path)
    alone = Training()
    while alone.step_number < reached["step"]:
        alone.step()
    assert reached["step"] >= 50
    assert equal(alone.state_dict(), reached)
