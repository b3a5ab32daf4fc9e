"""Fixtures that several files share."""

from collections.abc import Iterator

import pytest
import torch

# Threads that wait for each other make steps of milliseconds take seconds when the machine is busy. Once and for all:
# after their number was raised again, MKL solves systems side by side (`torch.linalg.inv`) wrongly, or waits for ever.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def float64() -> Iterator[None]:
    """Double precision by default; a file asks for it by `pytestmark = pytest.mark.usefixtures("float64")`."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def any_precision() -> Iterator[None]:
    """Whatever a test says about how torch multiplies float32 matrices, it has not been said afterwards."""
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.mkldnn, torch.backends.cuda):
        backend.matmul.fp32_precision = "none"
