"""A network and directions in its parameters, for the tests of the quadratic model."""

import torch
from torch import Tensor, nn

Direction = dict[str, Tensor]


def network() -> nn.Sequential:
    """With buffers that a forward pass in train mode changes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def directions_of(model: nn.Module, k: int = 2) -> list[Direction]:
    generator = torch.Generator().manual_seed(1)
    moving = {n: p for n, p in model.named_parameters() if not n.startswith("1.")}
    return [{n: torch.randn(p.shape, generator=generator) for n, p in moving.items()} for _ in range(k)]
