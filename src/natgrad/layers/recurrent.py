"""LSTM, GRU and RNN, as modules and as cells: weight sharing over time.

Torch runs them as one operation that shows neither the gates nor their gradients. When statistics are due, a forward
hook therefore runs the same recurrence step by step, with the pre-activations in the autograd graph, and returns its
outputs in place of the module's own: equal up to rounding. Each direction of each layer is two layers here, one for the
inputs and one for the hidden state, whose rows are the time steps; sources of the equations: the documentation of the
modules.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from natgrad.chance import Chance
from natgrad.layers.base import Layer, Recorder, register
from natgrad.layers.linear import LinearLayer

State = tuple[Tensor, ...]
"""(h,) or, for an LSTM, (h, c); each (N, hidden)."""


class GateLayer(LinearLayer):
    """One weight of a recurrent module with its bias; rows are data and time steps.

    Attributes:
        everything: All layers of the module, at the one that watches for them.
    """

    everything: "Sequence[GateLayer]" = ()

    def __init__(self, name: str, module: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        self.name, self.module, self.bias = name, module, bias
        self.sees_states = name.rpartition(".")[2].startswith("hh")
        self.has_bias = bias is not None and bias.requires_grad
        self.parameters = [weight, bias] if bias is not None and self.has_bias else [weight]

    def apply(self, x: Tensor, recorder: Recorder) -> Tensor:
        """W x + b, reported."""
        z = functional.linear(x, self.parameters[0], self.bias)
        if self.trained:
            recorder.record(self, x.detach(), z)
        return z


def step(module: nn.Module, z_input: Tensor, z_hidden: Tensor, state: State) -> State:
    """The next state from the pre-activations of inputs and hidden state, (N, gates · hidden) each."""
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        i, f, g, o = (z_input + z_hidden).chunk(4, dim=-1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if isinstance(module, nn.GRU | nn.GRUCell):
        (r, u, n), (hr, hu, hn) = z_input.chunk(3, dim=-1), z_hidden.chunk(3, dim=-1)
        update = (u + hu).sigmoid()
        return ((1 - update) * (n + (r + hr).sigmoid() * hn).tanh() + update * state[0],)
    activation: Callable[[Tensor], Tensor] = torch.relu if module.nonlinearity == "relu" else torch.tanh
    return (activation(z_input + z_hidden),)


@register(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
class CellLayer(GateLayer):
    """``weight_ih`` and ``weight_hh`` of a cell."""

    @classmethod
    def split(cls, name: str, module: nn.Module) -> Sequence[Layer]:
        """Input and hidden projection."""
        return _appoint([cls(f"{name}.{part}", module, *_pair(module, part)) for part in ("ih", "hh")])

    def watch(self, recorder: Recorder) -> list[RemovableHandle]:
        """Replace the module's output by the same recurrence in the open."""
        if not self.everything:
            return []
        return [self.module.register_forward_hook(partial(self._unroll, recorder), with_kwargs=True)]

    def _unroll(self, recorder: Recorder, module: nn.Module, args: Any, kwargs: Any, z: Any) -> Tensor | State | None:
        if not recorder.wants(self.everything):
            return None
        x, given = _arguments(args, kwargs)
        if x.ndim == 1:
            raise ValueError(f"layer {self.name!r} got an input without a batch dimension: use `x.unsqueeze(0)`.")
        state = _initial(module, x, given)
        inputs, hidden = self.everything
        state = step(module, inputs.apply(x, recorder), hidden.apply(state[0], recorder), state)
        state = _like(state, z if isinstance(module, nn.LSTMCell) else (z,))
        return state if isinstance(module, nn.LSTMCell) else state[0]


@register(nn.LSTM, nn.GRU, nn.RNN)
class RecurrentLayer(GateLayer):
    """``weight_ih_l…`` and ``weight_hh_l…`` of a recurrent module, by layer and direction."""

    module: nn.RNNBase

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """LSTMs with a projection."""
        return "proj_size is not supported" if getattr(module, "proj_size", 0) else None

    @classmethod
    def split(cls, name: str, module: nn.Module) -> Sequence[Layer]:
        """Input and hidden projection of each direction of each layer."""
        assert isinstance(module, nn.RNNBase)
        directions = ("", "_reverse") if module.bidirectional else ("",)
        parts = [f"{p}_l{i}{d}" for i in range(module.num_layers) for d in directions for p in ("ih", "hh")]
        return _appoint([cls(f"{name}.{part}", module, *_pair(module, part)) for part in parts])

    def watch(self, recorder: Recorder) -> list[RemovableHandle]:
        """Replace the module's output by the same recurrence in the open."""
        if not self.everything:
            return []
        replay = _Replay(self, recorder)
        return [
            self.module.register_forward_pre_hook(replay.before),
            self.module.register_forward_hook(replay.after, with_kwargs=True),
        ]


class _Replay:
    """Runs the recurrence of a module again, with the same dropout between its layers."""

    def __init__(self, layer: RecurrentLayer, recorder: Recorder) -> None:
        self.name, self.layers, self.recorder = layer.name.rpartition(".")[0], layer.everything, recorder
        self.chance: Chance | None = None

    def before(self, module: nn.RNNBase, args: tuple[Any, ...]) -> None:
        if self.recorder.wants(self.layers) and self._draws(module):
            self.chance = Chance(module)

    def after(self, module: nn.RNNBase, args: Any, kwargs: Any, z: Any) -> tuple[Tensor, Tensor | State] | None:
        if not self.recorder.wants(self.layers):
            return None
        x, given = _arguments(args, kwargs)
        if not isinstance(x, Tensor) or x.ndim != 3:
            got = tuple(x.shape) if isinstance(x, Tensor) else "a packed sequence"
            raise ValueError(
                f"layer {self.name!r} got {got}: natgrad needs a padded batch of shape (N, S, in) or (S, N, in); use "
                "`pad_packed_sequence`, or `unsqueeze` the missing dimension; or leave its parameters to AdamW, in a "
                'group {"params": …, "fallback": True} among the `params` of natgrad.KFAC.'
            )
        if self.chance is not None and self._draws(module):
            self.chance.restore()  # the module's own draw again, so that the stream goes on as it did
        output, state = self._run(module, x if module.batch_first else x.transpose(0, 1), given)
        # Laid out as torch has it, so that it can be viewed.
        output = output if module.batch_first else output.transpose(0, 1).contiguous()
        finals = _like(state, z[1]) if isinstance(state, tuple) else state.to(z[1].dtype)
        return output.to(z[0].dtype), finals

    def _draws(self, module: nn.RNNBase) -> bool:
        return module.training and module.dropout > 0 and module.num_layers > 1

    def _run(self, module: nn.RNNBase, x: Tensor, given: Any) -> tuple[Tensor, Tensor | State]:
        """From inputs (N, S, in) to outputs (N, S, directions · hidden) and final states."""
        finals: list[State] = []
        pairs = list(zip(self.layers[::2], self.layers[1::2], strict=True))
        directions = 2 if module.bidirectional else 1
        given = given if given is None or isinstance(given, tuple) else (given,)
        for depth in range(module.num_layers):
            outputs = []
            for way in range(directions):
                index = depth * directions + way
                start = _initial(module, x, None if given is None else tuple(part[index] for part in given))
                output, final = self._one_way(module, x, start, *pairs[index], backwards=way == 1)
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, dim=-1)
            if depth < module.num_layers - 1:
                time_first = x.transpose(0, 1).contiguous()  # as torch has it: draws follow the order in memory
                x = functional.dropout(time_first, module.dropout, module.training).transpose(0, 1)
        stacked = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        return x, stacked if isinstance(module, nn.LSTM) else stacked[0]

    def _one_way(
        self, module: nn.RNNBase, x: Tensor, state: State, inputs: GateLayer, hidden: GateLayer, backwards: bool
    ) -> tuple[Tensor, State]:
        z = inputs.apply(x, self.recorder)  # all time steps at once
        times = range(x.shape[1])
        outputs: list[Tensor] = [x] * len(times)
        for t in reversed(times) if backwards else times:
            state = step(module, z[:, t], hidden.apply(state[0], self.recorder), state)
            outputs[t] = state[0]
        return torch.stack(outputs, dim=1), state


def _appoint(layers: Sequence[GateLayer]) -> Sequence[GateLayer]:
    """Let one layer, of which statistics are wanted, watch for all of the module."""
    for watcher in [layer for layer in layers if layer.trained][:1]:
        watcher.everything = layers
    return layers


def _pair(module: nn.Module, part: str) -> tuple[nn.Parameter, nn.Parameter | None]:
    return getattr(module, f"weight_{part}"), getattr(module, f"bias_{part}", None)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The input and the given initial state, or None."""
    given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
    return given["input"], given.get("hx")


def _initial(module: nn.Module, x: Tensor, given: Any) -> State:
    if given is not None:
        return given if isinstance(given, tuple) else (given,)
    zeros = x.new_zeros(x.shape[0], cast(int, module.hidden_size))
    return (zeros, zeros) if isinstance(module, nn.LSTM | nn.LSTMCell) else (zeros,)


def _like(state: State, returned: State) -> State:
    """In the precision in which the module returned it, which under autocast is its own choice."""
    return tuple(made.to(other.dtype) for made, other in zip(state, returned, strict=True))
