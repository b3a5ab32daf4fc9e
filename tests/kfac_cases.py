"""Models, batches and training steps that the tests of KFAC share."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import natgrad

NUMERIC: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
AUTO: dict[str, Any] = {"lr": "auto", "momentum": "auto"}
every_mode = pytest.mark.parametrize(
    "mode",
    [NUMERIC, AUTO, {**AUTO, "inverse": "ekfac"}, {"lr": 0.1, "momentum": "auto"}, {"lr": "auto", "momentum": 0.5}],
    ids=str,
)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """With a parameter that has no layer kind, for the fallback."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator).to(dtype), torch.randn(6, 2, generator=generator).to(dtype)


def backward(model: nn.Module, seed: int) -> Tensor:
    x, y = batch(seed, next(model.parameters()).dtype)
    model.zero_grad()
    loss = mse_loss(model(x), y)
    loss.backward()
    return loss.detach()


def train(optimizer: natgrad.KFAC, *seeds: int) -> None:
    for seed in seeds:
        backward(optimizer.preconditioner.model, seed)
        optimizer.step()


def values(optimizer: natgrad.KFAC) -> dict[str, Tensor]:
    """Parameters and state, copied."""
    named = dict(optimizer.preconditioner.model.named_parameters())
    state = {f"{n}.{k}": t for n, p in named.items() for k, t in optimizer.state[p].items()}
    return {n: t.detach().clone() for n, t in {**named, **state}.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    differing = [n for n, t in expected.items() if not torch.equal(actual[n], t) or actual[n].dtype != t.dtype]
    assert differing == [], differing
