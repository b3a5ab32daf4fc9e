"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pathlib
import pkgutil

import pytest

import natgrad

MODULES = ["natgrad", *(info.name for info in pkgutil.walk_packages(natgrad.__path__, "natgrad."))]


def examples_in(name: str) -> int:
    """Counted in the source, so that an example that doctest does not find is missed."""
    source = pathlib.Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
    return sum(line.lstrip().startswith(">>> ") for line in source.splitlines())


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted == examples_in(name)


def test_the_public_classes_and_functions_have_examples() -> None:
    for public in (getattr(natgrad, name) for name in natgrad.__all__):
        if callable(public):
            assert ">>> " in public.__doc__, public.__name__


def test_there_are_examples() -> None:
    assert sum(map(examples_in, MODULES)) > 10
