"""Modules around the layer kinds that a test can call with tensors and that return one tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Attention(nn.Module):
    """``nn.MultiheadAttention`` over one input, or over query and key-value, or over all three."""

    def __init__(self, embed: int = 8, heads: int = 2, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(embed, heads, **options)
        self.call = call or {}
        if self.attention.in_proj_bias is not None:  # torch starts them at zero, which would hide mistakes
            nn.init.normal_(self.attention.in_proj_bias)
            nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        key = query if key is None else key
        value = key if value is None else value
        out: Tensor = self.attention(query, key, value, **self.call)[0]
        return out


class Sequence(nn.Module):
    """A recurrent module, and its output; ``states`` are multiplied with a number so that they take part."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor, *states: Tensor) -> Tensor:
        given = states if len(states) > 1 else states[0] if states else None
        output, final = self.recurrent(x, given)
        finals = final if isinstance(final, tuple) else (final,)
        return torch.cat([output.flatten(), *(f.flatten() for f in finals)])


class Loop(nn.Module):
    """A cell from step to step; the last hidden state."""

    def __init__(self, cell: nn.RNNCellBase, steps: int = 4) -> None:
        super().__init__()
        self.cell, self.steps = cell, steps

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        for t in range(self.steps):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class Conv1D(nn.Module):
    """As in Hugging Face's ``transformers.pytorch_utils``: a linear layer with the weight transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Language(nn.Module):
    """Token embedding, a layer, and a head that shares the embedding's weight."""

    def __init__(self, bias: bool = False, tokens: int = 7, dim: int = 4, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(tokens, dim, padding_idx), nn.Linear(dim, dim)
        self.head = nn.Linear(dim, tokens, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(self.embedding(tokens))))
        return logits


class Twins(nn.Module):
    """Two modules with the same parameters."""

    def __init__(self, make: Callable[[], nn.Module], between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = make(), make()
        self.between = between or nn.Tanh()
        for name, parameter in list(self.first.named_parameters()):
            setattr(self.second, name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.between(self.first(x)))
        return out


class Repeated(nn.Module):
    """One module several times in a row."""

    def __init__(self, module: nn.Module, times: int = 3) -> None:
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.module(x))
        return x


def normalized(module: nn.Module) -> nn.Module:
    """``module`` with weight normalization, at lengths other than those of its weight."""
    parametrized: nn.Module = weight_norm(module)
    with torch.no_grad():
        parametrized.parametrizations.weight.original0.mul_(1.7)  # type: ignore[union-attr,operator]
    return parametrized


def frozen(module: nn.Module, name: str) -> nn.Module:
    """``module`` with one parameter that is not trained."""
    module.get_parameter(name).requires_grad_(False)
    return module


def randomized(module: nn.Module) -> nn.Module:
    """A normalization with scale and shift unlike 1 and 0, and running statistics unlike those of any batch."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for name, buffer in module.named_buffers():
        if name.startswith("running"):
            nn.init.uniform_(buffer, 0.5, 2.0)
    return module
