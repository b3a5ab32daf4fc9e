"""Fixtures that several files share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def float64() -> Iterator[None]:
    """Double precision by default; a file asks for it by `pytestmark = pytest.mark.usefixtures("float64")`."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
