"""What the README and the documentation tell to write runs: snippets, lines to replace, settings in tables."""

import ast
import pathlib
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import natgrad

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
SNIPPETS = {
    f"{name} {number}": snippet
    for name, text in sorted(PAGES.items())
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}
REPLACEMENTS = re.findall(r"```diff\n(.*?)```", PAGES["migration.md"], re.DOTALL)


def keywords(span: str) -> dict[str, Any] | None:
    """Those that a piece of code consists of, with their values; None if it is something else, or leaves values out."""
    try:
        call = ast.parse(f"f({span})", mode="eval").body
        if call.args:
            return None
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        return None


def settings() -> set[str]:
    """What tables tell to write: beyond the first cell of a row, where migration has the other library's."""
    pages = (PAGES[name] for name in ("README.md", "settings.md", "troubleshooting.md", "migration.md"))
    cells = [cell for page in pages for row in re.findall(r"^\|[^|]*\|(.*)", page, re.M) for cell in row.split("|")]
    return {span for cell in cells for span in re.findall(r"`(\w+=[^`]+)`", cell) if keywords(span)}


def train(model: nn.Module, *steppers: Any) -> None:
    """Three steps on random data."""
    for _ in range(3):
        model.zero_grad()
        cross_entropy(model(torch.randn(16, 5)), torch.randint(3, (16,))).backward()
        for stepper in steppers:
            stepper.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(SNIPPETS[name], names)
    assert all(parameter.isfinite().all() for parameter in names["model"].parameters())


def test_there_are_replacements_and_settings() -> None:
    assert len(REPLACEMENTS) >= 5
    assert {"lr=0.1, momentum=0.9, kl_clip=1e-3", 'damping=1e-6, inverse="eigen"'} <= settings()
    assert len(settings()) >= 20


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_what_replaces_another_optimizer_trains(replacement: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    names: dict[str, Any] = {"natgrad": natgrad, "model": model}
    exec("\n".join(re.findall(r"^\+ (.*)", replacement, re.MULTILINE)), names)
    if "preconditioner" in names:
        train(model, names["preconditioner"], torch.optim.SGD(model.parameters(), lr=0.1))
    else:
        train(model, names["optimizer"])


@pytest.mark.parametrize("setting", sorted(settings()))
def test_settings_of_the_tables_are_understood(setting: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    given = {"loss": "cross_entropy", **keywords(setting)}
    if given.keys() & {"lr", "momentum", "weight_decay"}:
        train(model, natgrad.KFAC(model, **given))
    else:
        train(model, natgrad.Preconditioner(model, **given), torch.optim.SGD(model.parameters(), lr=0.1))
