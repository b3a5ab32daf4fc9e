"""The README's Python snippets run as they stand."""

import pathlib
import re
from typing import Any

import pytest
import torch

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert all(parameter.isfinite().all() for parameter in names["model"].parameters())
