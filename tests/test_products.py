"""When products are rounded: only large ones of float32 matrices, where it does no harm, and as torch was told."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import natgrad
from natgrad import products
from natgrad.layers.moments import moment
from natgrad.products import LEAST_SIDE, product, rounding
from natgrad.trust import Trust

pytestmark = pytest.mark.usefixtures("any_precision")
SIDE = 4 * LEAST_SIDE


class Precisions(TorchDispatchMode):
    """Notes how torch was told to multiply during each product, and the least side of each."""

    def __init__(self, backend: Any = torch.backends.mkldnn) -> None:
        super().__init__()
        self.backend, self.seen = backend, list[tuple[str, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            sides = (*args[0].shape[-2:], args[1].shape[-1])
            self.seen.append((self.backend.matmul.fp32_precision, min(sides)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor with units for tiles; the tests compare no digits, so that any will do."""
    monkeypatch.setattr(products, "_has_tiles", lambda: True)
    yield
    assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee", "bf16")


def told_during(a: Tensor, b: Tensor, allowed: bool = True, backend: Any = torch.backends.mkldnn) -> str:
    with Precisions(backend) as precisions, rounding(allowed):
        product(a, b)
    return precisions.seen[0][0]


def test_large_products_are_rounded_where_that_is_allowed() -> None:
    a = torch.randn(SIDE, SIDE)
    assert told_during(a, a) == "bf16"
    assert told_during(a, a, allowed=False) == "none"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_small_narrow_and_precise_products_are_not_rounded() -> None:
    small, row, a = torch.randn(LEAST_SIDE, LEAST_SIDE), torch.randn(1, 10_000), torch.randn(SIDE, SIDE)
    assert told_during(small, small) == told_during(row.mT, row) == told_during(a.double(), a.double()) == "none"


def test_on_a_gpu_products_are_those_of_tensor_cores() -> None:
    with FakeTensorMode():
        a = torch.empty(SIDE, SIDE, device="cuda")
        assert told_during(a, a, backend=torch.backends.cuda) == "tf32"
        assert told_during(a, a) == "none"
    assert torch.backends.cuda.matmul.fp32_precision == "none"


def test_other_processors_round_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_tiles", lambda: False)
    a = torch.randn(SIDE, SIDE)
    assert told_during(a, a) == "none"


def test_what_torch_was_told_stays_so() -> None:
    a = torch.randn(SIDE, SIDE)
    torch.set_float32_matmul_precision("highest")
    assert told_during(a, a) == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    assert told_during(a, a) == torch.backends.mkldnn.matmul.fp32_precision == "tf32"


def test_an_error_leaves_nothing_behind() -> None:
    with rounding(True), pytest.raises(RuntimeError):
        product(torch.randn(SIDE, SIDE), torch.randn(SIDE + 1, SIDE))
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    assert told_during(torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), allowed=False) == "none"


def test_moments_of_wide_rows_are_products() -> None:
    with Precisions() as precisions, rounding(True):
        moment(torch.randn(SIDE, 1, 2 * SIDE), bias=True, sharing="expand", diagonal=False)
    assert {told for told, _ in precisions.seen} == {"bf16"}


def rounded_in_steps(averages: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> set[str]:
    """How torch was told to multiply large matrices in natgrad's part of the second of two steps of a wide network."""
    monkeypatch.setattr(Trust, "averages", averages)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, SIDE), nn.Tanh(), nn.Linear(SIDE, SIDE), nn.Tanh(), nn.Linear(SIDE, 10))
    optimizer = natgrad.KFAC(model, loss="cross_entropy", **options)
    x, y = torch.randn(2 * SIDE, 20), torch.randint(10, (2 * SIDE,))
    for _ in range(2):
        optimizer.zero_grad()
        with Precisions() as forward:
            loss = cross_entropy(model(x), y)
        loss.backward()
        with Precisions() as step:
            optimizer.step()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    return {told for told, side in [*forward.seen, *step.seen] if side >= SIDE}


def test_steps_round_where_gradients_are_averaged_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Light damping bears no rounding: the quarter-width autoencoder was at 32.7 after 25 steps in place of 4.4."""
    assert rounded_in_steps(False, monkeypatch) == {"none"}
    assert rounded_in_steps(True, monkeypatch) >= {"bf16"}
    assert rounded_in_steps(True, monkeypatch, damping=1e-3) == {"none"}
