"""A problem so small that a step takes milliseconds, and a console that keeps what is printed."""

import io
from collections.abc import Callable, Iterator

import pytest
import torch
from rich.console import Console

from natgrad.experiments.settings import Settings

TINY = {"optimizers": ("sgd", "adam"), "width_divisor": 32, "images": 48, "steps": 6}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make steps of milliseconds take seconds when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny() -> Callable[..., Settings]:
    """Makes settings of a tiny run; keywords override."""
    return lambda **changes: Settings(**{**TINY, **changes})


@pytest.fixture
def console() -> Console:
    """Not a terminal; read it with ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), width=120)
