"""Networks of Linear layers."""

import itertools
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS = [nn.Tanh, nn.Sigmoid, nn.GELU, nn.LeakyReLU, nn.ReLU, nn.Identity]


def stack(widths: Sequence[int], activation: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    """Linear layers with an activation between each two of them."""
    modules: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        modules += [nn.Linear(i, o, bias=bias), activation()]
    return nn.Sequential(*modules[:-1])


class Pooled(nn.Module):
    """A stack at every position, then the mean or the sum over positions."""

    def __init__(self, layers: nn.Module, pool: str) -> None:
        super().__init__()
        self.layers, self.pool = layers, pool

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.layers(x), self.pool)(1)


class Mixed(nn.Module):
    """Positions that look at each other, logits for each of them with the classes in dimension 1: (N, C, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        h = torch.softmax(h @ h.transpose(1, 2), -1) @ h
        return self.leave(h).transpose(1, 2)


class Recurrent(nn.Module):
    """One layer called three times in a row, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = self.alias = nn.Linear(3, 3)
        self.leave = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.alias(torch.tanh(self.cell(torch.tanh(self.cell(x)))))))


class Halves(nn.Module):
    """One layer called on each half of the input, the results side by side: calls that do not interact."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.halves(x[:, :3]), self.halves(x[:, 3:])], 1)


@st.composite
def networks(draw: st.DrawFn, activations: Sequence[type[nn.Module]] = ACTIVATIONS) -> nn.Sequential:
    """Stacks of one to three layers; at least two outputs, so that they can be logits."""
    widths = [*draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)), draw(st.integers(2, 4))]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return stack(widths, draw(st.sampled_from(activations)), draw(st.booleans()))


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def inputs(model: nn.Sequential, *leading: int) -> Tensor:
    return torch.randn(*leading, model[0].in_features)
