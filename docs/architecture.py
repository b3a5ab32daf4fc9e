"""Keep `architecture.md` true: its tables and its picture are made of the code. Run `python docs/architecture.py`.

Jobs are the first sentences of the modules' docstrings, layers those of the import contract in pyproject.toml, arrows
the imports that there are. A test compares the files with what this would write.
"""

import ast
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grimp
import tomllib

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "src" / "natgrad"
PAGE, PICTURE = DOCS / "architecture.md", DOCS / "architecture.svg"
MARKERS = ("<!-- made by architecture.py -->", "<!-- end -->")
WIDTH, ROW, BOX, GAP, CHARACTER = 860, 62, 30, 26, 8.4

Graph = Mapping[str, frozenset[str]]


def layers() -> list[list[str]]:
    """Modules of the package from top to bottom, those beside each other in one list."""
    contracts = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one["type"] == "layers")
    return [row.split(" | ") for row in contract["layers"]]


def imports() -> Graph:
    """By module or subpackage right below the package, the others that it imports; of the package, what that offers."""
    graph = grimp.build_graph("natgrad")
    offered = {name.split(".")[1] for name in graph.find_modules_directly_imported_by("natgrad")}
    found: dict[str, set[str]] = {name: set() for row in layers() for name in row}
    for module in graph.modules - {"natgrad"}:
        importer = module.split(".")[1]
        for imported in graph.find_modules_directly_imported_by(module):
            found[importer] |= offered if imported == "natgrad" else {imported.split(".")[1]}
    return {name: frozenset(names - {name}) for name, names in found.items()}


def arrows(graph: Graph) -> Iterator[tuple[str, str]]:
    """The imports that do not follow from two or more others."""

    def reach(start: str) -> set[str]:
        return {start}.union(*(reach(name) for name in graph[start]))

    for importer, names in graph.items():
        for name in names:
            if not any(name in reach(other) for other in names - {name}):
                yield importer, name


def job(path: Path) -> str:
    """First sentence of a module's docstring, as Markdown."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = re.split(r"(?<=[.?!])\s|\n\n", docstring, maxsplit=1)[0]
    first = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", " ".join(first.split()))
    return first.replace("``", "`").replace("|", "\\|").rstrip(":")


def tables(graph: Graph) -> str:
    """One table for the package, one for each subpackage."""
    lines = ["| module | its job | imports |", "|---|---|---|"]
    for name in (name for row in layers() for name in row):
        path = PACKAGE / name / "__init__.py" if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
        lines.append(f"| `{name}` | {job(path)} | {', '.join(f'`{one}`' for one in sorted(graph[name])) or '–'} |")
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}):
        lines += [
            "",
            f"## natgrad.{'.'.join(folder.relative_to(PACKAGE).parts)}",
            "",
            "| module | its job |",
            "|---|---|",
        ]
        modules = sorted(path for path in folder.glob("*.py") if path.stem != "__init__")
        lines += [f"| `{path.stem}` | {job(path)} |" for path in modules]
    return "\n".join(lines)


def picture(rows: Sequence[Sequence[str]], graph: Graph) -> str:
    """The layers as an SVG, an arrow from each module to what it imports."""
    boxes: dict[str, tuple[float, float, float]] = {}  # left, top, width
    for i, row in enumerate(rows):
        widths = [len(name) * CHARACTER + 24 for name in row]
        left = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2 + (-1) ** i * 90
        for name, width in zip(row, widths, strict=True):
            boxes[name] = (left, 12 + i * ROW, width)
            left += width + GAP
    height = len(rows) * ROW - ROW + BOX + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="monospace" font-size="14" fill="#333333">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for importer, imported in sorted(arrows(graph)):
        parts.append(_arrow(boxes[importer], boxes[imported]))
    for name, (left, top, width) in boxes.items():
        parts.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BOX}" rx="6" '
            'fill="#fff4ec" stroke="#d55e00"/>'
            f'<text x="{left + width / 2:.1f}" y="{top + 20}" text-anchor="middle">{html.escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _arrow(start: tuple[float, float, float], end: tuple[float, float, float]) -> str:
    x1, y1 = start[0] + start[2] / 2, start[1] + BOX
    x2, y2 = end[0] + end[2] / 2, end[1]
    # Long ones bow outwards, past the boxes between.
    bow = 0.0 if y2 - y1 < ROW else (1 if x2 + x1 > WIDTH else -1) * (40 + (y2 - y1) / 4)
    return (
        f'<path d="M{x1:.1f} {y1} C{x1 + bow:.1f} {y1 + 40} {x2 + bow:.1f} {y2 - 40} {x2:.1f} {y2}" fill="none" '
        f'stroke="#8c8c8c" stroke-opacity="0.7"/><circle cx="{x2:.1f}" cy="{y2}" r="3" fill="#d55e00"/>'
    )


def page(text: str, graph: Graph) -> str:
    """The page with the part between the markers made anew."""
    before, rest = text.split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    return f"{before}{MARKERS[0]}\n{tables(graph)}\n{MARKERS[1]}{after}"


if __name__ == "__main__":
    found = imports()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    PICTURE.write_text(picture(layers(), found), encoding="utf-8")
