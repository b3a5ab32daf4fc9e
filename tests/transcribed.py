"""Attention and recurrence written out with ``nn.Linear``, so that the oracle, which knows only that, sees inside.

The equations are those of torch's documentation; that outputs agree with torch's own is a test.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

State = tuple[Tensor, ...]


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with copies of these, trained where they are."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    for parameter, given in zip(layer.parameters(), [weight] if bias is None else [weight, bias], strict=True):
        parameter.data = given.detach().clone()
        parameter.requires_grad_(given.requires_grad)
    return layer


class WrittenAttention(nn.Module):
    """softmax(Q Kᵀ / √d) V for each head, between four linear maps."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        weights: Sequence[Tensor]
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        packed = attention.in_proj_bias
        biases = [None] * 3 if packed is None else packed.chunk(3)
        self.q, self.k, self.v = map(linear, weights, biases)
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias)
        self.heads, self.batch_first = attention.num_heads, attention.batch_first

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> tuple[Tensor]:
        inputs = [query, key, value] if self.batch_first else [t.transpose(0, 1) for t in (query, key, value)]
        # (N, L, heads · d) → (N, heads, L, d)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in zip((self.q, self.k, self.v), inputs, strict=True)
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if attn_mask is not None:
            scores = scores.masked_fill(attn_mask, -torch.inf)
        out = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        return (out if self.batch_first else out.transpose(0, 1),)


def advance(kind: str, z_x: Tensor, z_h: Tensor, state: State) -> State:
    """One step of an LSTM, GRU or RNN, from W_x x + b_x and W_h h + b_h."""
    if kind.startswith("LSTM"):
        i, f, g, o = (z_x + z_h).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if kind.startswith("GRU"):
        (r, z, n), (r_h, z_h, n_h) = z_x.chunk(3, -1), z_h.chunk(3, -1)
        r, z = torch.sigmoid(r + r_h), torch.sigmoid(z + z_h)
        return ((1 - z) * torch.tanh(n + r * n_h) + z * state[0],)
    return (torch.tanh(z_x + z_h),)


def start(kind: str, x: Tensor, hidden: int) -> State:
    return tuple(x.new_zeros(x.shape[0], hidden) for _ in range(2 if kind.startswith("LSTM") else 1))


class WrittenCell(nn.Module):
    """A cell of two linear maps."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.ih, self.hh = linear(cell.weight_ih, cell.bias_ih), linear(cell.weight_hh, cell.bias_hh)
        self.kind, self.hidden = type(cell).__name__, cell.hidden_size

    def forward(self, x: Tensor, state: Any = None) -> Any:
        state = (state,) if isinstance(state, Tensor) else state or start(self.kind, x, self.hidden)
        after = advance(self.kind, self.ih(x), self.hh(state[0]), state)
        return after if len(after) == 2 else after[0]


class WrittenRecurrence(nn.Module):
    """Layers and directions of a recurrent module, each of two linear maps named as natgrad names them."""

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.kind, self.hidden, self.depth = type(module).__name__, module.hidden_size, module.num_layers
        self.ways, self.batch_first = ["", "_reverse"][: 1 + module.bidirectional], module.batch_first
        for part in self.parts():
            bias = getattr(module, f"bias_{part}") if module.bias else None
            self.add_module(part, linear(getattr(module, f"weight_{part}"), bias))

    def parts(self) -> list[str]:
        return [f"{p}_l{i}{way}" for i in range(self.depth) for way in self.ways for p in ("ih", "hh")]

    def forward(self, x: Tensor, given: None = None) -> tuple[Tensor, Any]:
        x = x if self.batch_first else x.transpose(0, 1)
        finals: list[State] = []
        for i in range(self.depth):
            outputs = []
            for way in self.ways:
                inward, hidden = (self.get_submodule(f"{p}_l{i}{way}") for p in ("ih", "hh"))
                state, h = start(self.kind, x, self.hidden), {}
                for t in reversed(range(x.shape[1])) if way else range(x.shape[1]):
                    state = advance(self.kind, inward(x[:, t]), hidden(state[0]), state)
                    h[t] = state[0]
                outputs.append(torch.stack([h[t] for t in sorted(h)], 1))
                finals.append(state)
            x = torch.cat(outputs, -1)
        final = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        return x if self.batch_first else x.transpose(0, 1), final if len(final) == 2 else final[0]


def write_out(model: nn.Module) -> nn.Module:
    """A copy with every attention and recurrence written out, and without parametrizations."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        written: nn.Module
        if isinstance(module, nn.MultiheadAttention):
            written = WrittenAttention(module)
        elif isinstance(module, nn.RNNBase):
            written = WrittenRecurrence(module)
        elif isinstance(module, nn.RNNCellBase):
            written = WrittenCell(module)
        else:
            if parametrize.is_parametrized(module):
                kind = type(module)  # which a copy shares, and which torch changes
                module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
                parametrize.remove_parametrizations(module, "weight")
                module._parameters["bias"] = module._parameters.pop("bias")  # behind the weight again
            continue
        model.set_submodule(name, written)
    return model


def counterparts(written: nn.Module) -> dict[str, list[str]]:
    """By natgrad's name of a layer, the oracle's names of its blocks side by side."""
    found: dict[str, list[str]] = {}
    for name, module in written.named_modules():
        if isinstance(module, WrittenAttention):
            packed = module.q.in_features == module.k.in_features == module.v.in_features
            inward = {"in_proj": ["q", "k", "v"]} if packed else {f"{p}_proj": [p] for p in "qkv"}
            parts = inward | {"out_proj": ["out"]}
            found |= {f"{name}.{ours}": [f"{name}.{theirs}" for theirs in names] for ours, names in parts.items()}
        elif list(module.parameters(recurse=False)) and not isinstance(
            written.get_submodule(name.rpartition(".")[0]), WrittenAttention
        ):
            found[name] = [name]
    return found
