"""Stage 3: a forward pass goes in, the statistics of every layer come out.

Hooks on the layers remember, for each call, the input and the *gradient edge* of the output: the place in the autograd
graph where its gradient arrives. A hook on the root module then takes the model's output, asks the likelihood for
vectors and sends them back to the edges by ``torch.autograd.grad``. No parameter gradient is computed, ``.grad`` is
untouched, and the graph stays for the user's own ``backward()``. An edge, unlike the output tensor, still means the
same place after an in-place activation has overwritten the output.

The empirical Fisher needs the user's own gradients: there the hooks sit on the output tensors, and the statistics
arrive during the user's ``backward()``.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from natgrad.factors import ROWS_PER_DIMENSION, Sharing, Statistics, at_least_float32
from natgrad.layers import Layer
from natgrad.likelihoods import Likelihood

Fisher = Literal["mc", "exact", "empirical", "forward"]
ForwardInputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a forward pass."""

# With `batch_fraction="auto"`, no fewer rows than these enter a factor: more cost time and change little.
MIN_ROWS = 2048


@dataclass
class Call:
    """One call of a layer during one forward of the model.

    Attributes:
        x: The input, restricted to the data that enter the factors.
        edge: Where the gradient of the output arrives.
        data: Which data enter the factors.
        upscale: All data over those that enter.
    """

    layer: Layer
    x: Tensor
    edge: GradientEdge
    data: slice
    upscale: float


@dataclass
class Batch:
    """Everything captured since the last step.

    Attributes:
        statistics: Per layer name.
        forwards: Number of forward passes.
        terms: What the loss's reduction divides by, summed over the forwards.
        data: Number of data, summed over the forwards.
        inputs: Of the latest forward.
    """

    statistics: dict[str, Statistics] = field(default_factory=dict)
    forwards: int = 0
    terms: float = 0.0
    data: int = 0
    inputs: ForwardInputs | None = None


def check_fisher(fisher: str, likelihood: Likelihood | None) -> None:
    """Raise a ``ValueError`` for an unknown Fisher, or one that needs a loss and has none."""
    if fisher not in get_args(Fisher):
        raise ValueError(f"`fisher` must be one of {get_args(Fisher)}, not {fisher!r}.")
    if likelihood is None and fisher in ("mc", "exact"):
        raise ValueError(
            f'`fisher="{fisher}"` needs to know the loss: pass `loss="cross_entropy"`, a torch loss module or a '
            '`natgrad.likelihoods.Likelihood`, or use `fisher="empirical"`, which needs none.'
        )


class Capture:
    """Hooks on ``model`` that fill a :class:`Batch`.

    While ``enabled`` is False the forwards are counted, and no statistics are gathered.

    Args:
        model: The root module; its forward must be what the user calls.
        layers: The layers to watch.
        likelihood: What to backpropagate, for the Fishers that need it.
        fisher: Which curvature.
        mc_samples: Vectors drawn per forward for ``fisher="mc"``.
        batch_fraction: Share of the data whose rows enter the factors, or ``"auto"``.
        sharing: Weight sharing, by layer name.
        output: From the model's return value to the tensor that the loss sees.
        seed: With the number of the step it seeds every draw, so that a resumed run repeats them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        likelihood: Likelihood | None,
        *,
        fisher: Fisher,
        mc_samples: int,
        batch_fraction: float | Literal["auto"],
        sharing: dict[str, Sharing],
        output: Callable[[Any], Tensor] | None,
        seed: int,
    ) -> None:
        self.likelihood, self.fisher, self.mc_samples = likelihood, fisher, mc_samples
        self.batch_fraction, self.sharing, self.output, self.seed = batch_fraction, sharing, output, seed
        self.enabled = True
        self.step = 0
        self.batch = Batch()
        self._calls: list[Call] | None = None  # a list only while the root module's forward runs
        self._random = random.Random()
        for layer in layers:
            layer.module.register_forward_hook(partial(self._after_layer, layer), with_kwargs=True)
        model.register_forward_pre_hook(self._before_model)
        model.register_forward_hook(self._after_model, with_kwargs=True)

    def take(self) -> Batch:
        """Hand over what was captured and start anew."""
        batch, self.batch = self.batch, Batch()
        return batch

    def select(self, raw: Any) -> Tensor:
        """The tensor that the loss sees, checked against the likelihood."""
        output = raw if self.output is None else self.output(raw)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the model returned {type(output).__name__}, not a tensor: pass `output=` to natgrad to select the "
                "tensor that the loss sees, for instance `output=lambda out: out.logits`."
            )
        if output.ndim < 1:
            raise ValueError(
                "the model returned a scalar, and natgrad needs the output with the data as its first dimension: pass "
                "`output=` to select the tensor that the loss sees."
            )
        if self.likelihood is not None:
            self.likelihood.check(output)
        return output

    def _before_model(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._calls = [] if torch.is_grad_enabled() else None
        self._random.seed(self._draw())

    def _after_layer(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Any
    ) -> None:
        if self._calls is None or not self.enabled or not isinstance(z, Tensor) or not z.requires_grad:
            return
        x = args[0] if args else next(iter(kwargs.values()))
        data, upscale = self._choose(layer, z)
        call = Call(layer, x.detach()[data], get_gradient_edge(z), data, upscale)
        self._calls.append(call)
        if self.fisher == "empirical":
            z.register_hook(partial(self._add_gradients, call, weight=1.0))

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], raw: Any) -> None:
        calls, self._calls = self._calls, None
        if calls is None:
            return
        output = self.select(raw)
        if calls and self.enabled:
            # The user's autocast would round the products of rows to half precision.
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                self._add_inputs(calls)
                if self.fisher in ("mc", "exact"):
                    self._backpropagate(output, calls)
        self.batch.forwards += 1
        self.batch.data += output.shape[0]
        self.batch.terms += self.likelihood.terms(output) if self.likelihood else output.shape[0]
        self.batch.inputs = (args, kwargs)

    def _add_inputs(self, calls: list[Call]) -> None:
        for call in calls:
            layer = call.layer
            self._statistics(call).add_inputs(layer.inputs(call.x), layer.has_bias, self.sharing[layer.name])

    def _backpropagate(self, output: Tensor, calls: list[Call]) -> None:
        edges = [call.edge for call in calls]
        for vector, weight in self._vectors(at_least_float32(output.detach())):
            grads = torch.autograd.grad(output, edges, vector.to(output.dtype), retain_graph=True, allow_unused=True)
            for call, g in zip(calls, grads, strict=True):
                if g is not None:
                    self._add_gradients(call, g, weight)

    def _vectors(self, output: Tensor) -> Iterator[tuple[Tensor, float]]:
        """Vectors to backpropagate, and the weight of the outer product of each."""
        assert self.likelihood is not None
        if self.fisher == "exact":
            for column in self.likelihood.columns(output):
                yield column, 1.0
        else:
            generator = torch.Generator(output.device).manual_seed(self._draw())
            for _ in range(self.mc_samples):
                yield self.likelihood.sample(output, generator), 1.0 / self.mc_samples

    def _add_gradients(self, call: Call, g: Tensor, weight: float) -> None:
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            rows = call.layer.gradients(g[call.data])
            self._statistics(call).add_gradients(rows, self.sharing[call.layer.name], weight * call.upscale)

    def _statistics(self, call: Call) -> Statistics:
        return self.batch.statistics.setdefault(call.layer.name, Statistics())

    def _choose(self, layer: Layer, z: Tensor) -> tuple[slice, float]:
        """Every k-th datum of the batch, from a random start, as a view; and all data over these."""
        n = z.shape[0]
        if z.ndim < 2 or n == 0:
            return slice(None), 1.0
        if self.batch_fraction == "auto":
            rows = z.numel() // layer.shape[0]
            every = rows // max(MIN_ROWS, ROWS_PER_DIMENSION * max(layer.shape))
        else:
            every = round(1 / self.batch_fraction)
        every = min(max(every, 1), n)
        start = self._random.randrange(every)
        return slice(start, None, every), n / len(range(start, n, every))

    def _draw(self) -> int:
        """The seed of this forward's draws, different for every step and micro-batch."""
        return (self.seed * 1_000_003 + self.step) * 1009 + self.batch.forwards
