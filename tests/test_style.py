"""The house rules that a machine can check. A rule that is in the way is discussed, and not loosened."""

import ast
import inspect
import pathlib
import re
from collections.abc import Iterator

import pytest

import natgrad

PACKAGE = pathlib.Path(natgrad.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: pathlib.Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def lines_of_code(function: Function) -> int:
    """From the first statement after the docstring; a signature has a line for each keyword."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: pathlib.Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert {f.name: lines_of_code(f) for f in functions(path) if lines_of_code(f) > 40} == {}


@pytest.mark.parametrize("name", natgrad.__all__)
def test_public_names_are_documented(name: str) -> None:
    public = getattr(natgrad, name)
    assert inspect.getdoc(public)
    for attribute, value in vars(public).items() if inspect.isclass(public) else ():
        if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{attribute}"


@pytest.mark.parametrize("name", [n for n in natgrad.__all__ if inspect.isclass(getattr(natgrad, n))])
def test_constructors_have_at_most_twelve_keywords(name: str) -> None:
    parameters = inspect.signature(getattr(natgrad, name)).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert len(keywords) <= 12, keywords


@pytest.mark.parametrize("name", [n for n in natgrad.__all__ if inspect.isclass(getattr(natgrad, n))])
def test_every_argument_is_documented(name: str) -> None:
    """On a line of its own, in the order of the signature; and none is documented that is not taken."""
    public = getattr(natgrad, name)
    arguments = inspect.getdoc(public).split("Args:\n")[1].split("\n\n")[0]
    documented = re.findall(r"^    \**(\w+): ", arguments, re.MULTILINE)
    assert documented == list(inspect.signature(public).parameters)


def test_kfac_hands_on_what_the_preconditioner_takes() -> None:
    """`CurvatureOptions` is written by hand: it must not miss a keyword."""
    from natgrad.options import CurvatureOptions

    theirs = set(inspect.signature(natgrad.Preconditioner).parameters)
    ours = set(inspect.signature(natgrad.KFAC).parameters) - {"lr", "momentum", "weight_decay", "curvature"}
    assert theirs - ours == set(CurvatureOptions.__annotations__)


def test_nothing_is_public_by_accident() -> None:
    modules = {path.stem for path in FILES} | {path.name for path in PACKAGE.iterdir()}
    names = {name for name in vars(natgrad) if not name.startswith("_")} - modules
    assert names <= set(natgrad.__all__)
