"""Gradients that the loop clips, told from those of a gradient scaler."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import natgrad
from natgrad import scaler as scalers
from natgrad.clipping import LARGE, dot

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("scaler", "clipped"), [(1.0, True), (1.0, False), (2.0**6, False), (2.0**16, False)])
def test_clipped_gradients_are_not_taken_for_those_of_a_scaler(scaler: float, clipped: bool) -> None:
    """Of a squared error the gradients alone tell; a scaler is a power of two. Clipping shortens the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(300, 4), 50 * torch.randn(300, 2)
    optimizer = natgrad.KFAC(model, "mse")
    (scaler * mse_loss(model(x), y)).backward()
    for p in model.parameters():
        p.grad /= scaler
    scalers._tell_of_clipping.cache_clear()
    if clipped:
        length = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        nn.utils.clip_grad_norm_(model.parameters(), 0.05 * length)
        with pytest.warns(RuntimeWarning, match="less than a quarter as long as the one at the output says"):
            optimizer.step()
    else:
        optimizer.step()
    known = optimizer.state[model[0].weight]["multiplier"].tolist()
    assert known == [1.0, 1.0 if clipped else scaler]


def test_a_clipped_step_is_as_much_shorter() -> None:
    lengths = []
    for share in (1.0, 0.1):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        x, y = torch.randn(300, 4), 50 * torch.randn(300, 2)
        optimizer = natgrad.KFAC(model, "mse", batch_fraction=1.0, damping=1e-3)
        mse_loss(model(x), y).backward()
        for p in model.parameters():
            p.grad *= share
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        lengths.append(optimizer.diagnostics()["step_norm"])
    assert lengths[1] == pytest.approx(0.1 * lengths[0], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_large_and_small_tensors_add_up(dtype: torch.dtype) -> None:
    """Entries meet those at the same place, in whatever order they lie in memory, and of whatever precision."""
    torch.manual_seed(0)
    sizes = [(2, LARGE // 2), (3, 5), (LARGE // 8, 8)]
    direction = {nn.Parameter(torch.randn(size)): torch.randn(size) for size in sizes}
    gradients = {p: torch.randn(p.shape[::-1], dtype=dtype).mT for p in direction}
    expected = sum(torch.sum(d * gradients[p].double()) for p, d in direction.items())
    torch.testing.assert_close(dot(direction, gradients.get), expected, rtol=1e-12, atol=0.0)
    assert dot(direction, {}.get) == 0
