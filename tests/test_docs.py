"""The documentation tells of the code as it is: its reference is complete, its links and its architecture are true."""

import importlib.util
import inspect
import pathlib
import re

import pytest
import tomllib
from torch import Tensor

import natgrad
import natgrad.layers

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
DOCUMENTED = re.findall(r"^\.\. auto(?:class|function):: natgrad\.([\w.]+)", API, re.MULTILINE)
# Where else than in the docstring itself a source may stand: at the top of its module.
SOURCE = re.compile(r"Sources?: ")


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolve(name: str):
    """Of what is not in the package itself the module stands before it."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"natgrad.{module}") if module else natgrad, attribute)


def public_names() -> set[str]:
    names = {name for name in natgrad.__all__ if callable(getattr(natgrad, name))}
    for name, one in vars(natgrad.likelihoods).items():
        if inspect.isclass(one) and issubclass(one, natgrad.likelihoods.Likelihood) and not name.startswith("_"):
            names.add(f"likelihoods.{name}")
    return names | {"layers.Layer", "layers.register", "blocks.Block"}


def test_the_reference_has_every_public_name() -> None:
    assert public_names() <= set(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_documented_name_exists_and_every_argument_is_explained(name: str) -> None:
    public = resolve(name)
    text = inspect.getdoc(public) or ""
    assert text
    if inspect.isfunction(public) or name in ("KFAC", "Preconditioner"):
        for argument in inspect.signature(public).parameters:
            assert re.search(rf"^    \**{argument}: ", text, re.MULTILINE), f"{name} does not explain {argument}"


def raises(function) -> bool:
    return "raise " in inspect.getsource(function)


@pytest.mark.parametrize("name", sorted({*natgrad.__all__} - {"describe"}))  # a table, which nobody published
def test_errors_and_sources_are_told(name: str) -> None:
    public = getattr(natgrad, name)
    text = inspect.getdoc(public) or ""
    if callable(public):
        assert "Raises:" in text
    assert SOURCE.search(text + (inspect.getdoc(inspect.getmodule(public)) or "")), f"{name} names no source"


@pytest.mark.parametrize("name", ["KFAC", "Preconditioner"])
def test_methods_tell_their_errors(name: str) -> None:
    for method, function in vars(getattr(natgrad, name)).items():
        if not method.startswith("_") and inspect.isfunction(function) and raises(function):
            assert re.search(r"Raises:|^Raise a ", inspect.getdoc(function)), f"{name}.{method}"


def test_tensors_have_shapes() -> None:
    """Of what a block stores, and of what its methods take and return where that is a tensor with a shape."""
    block = resolve("blocks.Block")
    told = inspect.getdoc(block)
    for field, kind in block.__annotations__.items():
        if kind is Tensor:
            assert re.search(rf"^    {field}: [^\n]*\(", told, re.MULTILINE), field
    for method in ("matvec", "solve"):
        assert re.search(r"\([\[B\], ]*out|times V", inspect.getdoc(getattr(block, method))), method


def anchors(path: pathlib.Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target) or target.startswith("gallery/"):
            continue  # the gallery's pages are made by the build, which checks these links
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or page.name == "benchmarks.md" or anchor in anchors(path), f"{page.name}: {target}"


def test_the_contents_list_every_page() -> None:
    listed = set(re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} == listed - {"gallery/index"}


def test_the_architecture_is_that_of_the_code() -> None:
    """Run `python docs/architecture.py` if this fails."""
    architecture = load(DOCS / "architecture.py")
    graph = architecture.imports()
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert text == architecture.page(text, graph)
    assert (DOCS / "architecture.svg").read_text(encoding="utf-8") == architecture.picture(architecture.layers(), graph)


def test_every_arrow_of_the_architecture_points_down() -> None:
    architecture = load(DOCS / "architecture.py")
    height = {name: i for i, row in enumerate(architecture.layers()) for name in row}
    arrows = list(architecture.arrows(architecture.imports()))
    assert ("rates", "multiplier") in arrows
    assert all(height[importer] < height[imported] for importer, imported in arrows)


@pytest.mark.parametrize("script", sorted((ROOT / "examples/gallery").glob("*.py")), ids=lambda script: script.stem)
def test_gallery_scripts_check_their_claim_after_a_picture(script: pathlib.Path) -> None:
    before, _, after = script.read_text(encoding="utf-8").partition("plt.show()")
    assert "plt.subplots(" in before or "subplots()" in before
    assert re.search(r"^assert ", after, re.MULTILINE)


def test_what_builds_the_site_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    needed = {re.match(r"[\w-]+", line)[0].lower() for extra in ("docs", "dev") for line in extras[extra]}
    assert needed - {"natgrad"} <= pinned
