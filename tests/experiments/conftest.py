"""A problem so small that a step takes milliseconds, and a console that keeps what is printed."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from natgrad.experiments.settings import Settings

TINY = {"optimizers": ("sgd", "adam"), "width_divisor": 32, "images": 48, "steps": 6}


@pytest.fixture
def tiny() -> Callable[..., Settings]:
    """Makes settings of a tiny run; keywords override."""
    return lambda **changes: Settings(**{**TINY, **changes})


@pytest.fixture
def console() -> Console:
    """Not a terminal; read it with ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), width=120)
