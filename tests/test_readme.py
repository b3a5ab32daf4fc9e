"""The Python snippets of the README and of the documentation run as they stand."""

import pathlib
import re
from typing import Any

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
SNIPPETS = {
    f"{path.name} {number}": snippet
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
}


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(SNIPPETS[name], names)
    assert all(parameter.isfinite().all() for parameter in names["model"].parameters())
