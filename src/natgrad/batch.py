"""What is gathered between two steps: forward passes, and the sums that become factors.

:class:`~natgrad.capture.Capture` fills a :class:`Batch`, which knows how its sums, its loss and its number of data
make A and G in units of the loss.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from natgrad.calls import Call, Sample
from natgrad.chance import Chance
from natgrad.distributed import is_sharded
from natgrad.factors import Factors, Statistics, grown, join
from natgrad.joint import side_by_side
from natgrad.layers import Layer, at_least_float32
from natgrad.likelihoods import Likelihood
from natgrad.losses import Loss, Weights
from natgrad.outputs import Find, Origin

Fisher = Literal["mc", "exact", "empirical", "forward"]


@dataclass
class Ear:
    """Whether a gradient of the user's loss arrived at the output of a forward pass, or still may.

    Attributes:
        heard: It did.
        hooks: What waits for it. Only the graph keeps these.
    """

    heard: bool = False
    hooks: list[weakref.ref[Any]] = field(default_factory=list)

    @property
    def is_deaf(self) -> bool:
        """None came and none can come, as the graph is gone."""
        return not self.heard and all(hook() is None for hook in self.hooks)


@dataclass
class Forward:
    """One forward pass of the model.

    Attributes:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: The tensor that the loss sees.
        uses: The calls of the layers, together where their rows are positions of the same rows; none if not due.
        weights: What the targets imply, where a loss module was watched.
        seen: The model's own output, where the loss module got a rearranged one.
        rearrange: From the model's own output to that input, where it was looked for already.
        find: From what the model returned to what ``output`` was made from, where a function of the user's did so.
        gradient: Of the user's loss with respect to that or else ``output``, once it has arrived.
        seed: Of the order in which data are chosen, see :func:`shuffled`.
        chance: The random streams before it, if it drew from them.
        multiplier: Of the value of the loss module, in the user's loss, once its gradient has arrived.
        ear: Tells whether a gradient arrived or may arrive.
        is_makeshift: Whether ``gradient`` is of a derivative that may enter the loss, for want of the loss's own.
        trained: Parameters of the layers; a pass that brings none of them a gradient is no backward pass of the loss.
        modes: Of its modules, see :func:`natgrad.rerun.modes`.
        likelihood: Of the declared loss; for several heads with the shapes of this pass's.
        lengths: Of the heads, if these have different numbers of data: then rows of the output are no data.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    uses: list[list[Call]]
    weights: Weights | None = None
    seen: Tensor | None = None
    rearrange: Callable[[Tensor], Tensor] | None = None
    find: Find | None = None
    gradient: Tensor | None = None
    seed: int = 0
    chance: Chance | None = None
    multiplier: Tensor | None = None
    ear: Ear = field(default_factory=Ear)
    is_makeshift: bool = False
    trained: Sequence[nn.Parameter] = ()
    modes: tuple[bool, ...] = ()
    likelihood: Likelihood | None = None
    lengths: tuple[int, ...] = ()

    def listen(self, origins: Sequence[Origin]) -> None:
        """Note the gradient of the user's loss when it comes; natgrad's own backward passes must be over.

        Args:
            origins: Where it arrives; side by side, if at several tensors.
        """
        ends = list(accumulate(origin.tensor.shape[1:].numel() for origin in origins))
        for origin, start, end in zip(origins, [0, *ends], ends, strict=False):
            if origin.tensor.requires_grad:
                some = partial(self.note_some, ends[-1], slice(start, end), origin.order)
                hook = some if len(origins) > 1 else partial(self.note, order=origin.order)
                origin.tensor.register_hook(hook)
                self.ear.hooks.append(weakref.ref(hook))

    def note(self, gradient: Tensor, order: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
        """Keep a gradient that has come; those of several backward passes through one graph add up."""
        if self._hear():
            latest = at_least_float32(order(gradient))
            self.gradient = latest if self.gradient is None else self.gradient + latest

    def note_some(self, width: int, columns: slice, order: Callable[[Tensor], Tensor], gradient: Tensor) -> None:
        """The same at one of several tensors; where none comes, the loss does not depend on it."""
        if self._hear():
            some = at_least_float32(side_by_side([order(gradient)]))
            if self.gradient is None:
                self.gradient = some.new_zeros(len(self.output), width)
            self.gradient[: len(some), columns] += some

    def _hear(self) -> bool:
        """Whether what comes is of the loss: derivatives may be asked for to be looked at, or for a penalty on them."""
        is_of_loss, differentiates_again = _reaches(self.trained), torch.is_grad_enabled()
        if differentiates_again:
            _tell_of_derivatives()
        if is_of_loss and self.is_makeshift:
            self.gradient, self.is_makeshift = None, False
        elif not is_of_loss:
            if not differentiates_again or not (self.gradient is None or self.is_makeshift):
                return False
            self.is_makeshift = True
        self.ear.heard = True
        return True

    def see_what_counts(self, likelihood: Likelihood) -> None:
        """Let criteria without a gradient weigh nothing from now on, if they tell and nobody else told.

        In half precision a gradient may be zero for being small.
        """
        told = self.weights is not None or self.output.dtype == torch.float16
        if told or self.gradient is None or self.find is not None:
            return
        shares = likelihood.shares(at_least_float32(self.output), self.gradient)
        if shares is not None:
            self.weights = Weights(shares, torch.ones_like(shares))

    def add_multiplier(self, gradient: Tensor) -> None:
        """Add the gradient at one value of the loss module; there are several for a weighted sum over targets."""
        gradient = at_least_float32(gradient.detach())
        self.multiplier = gradient if self.multiplier is None else self.multiplier + gradient

    def is_input(self, tensor: Tensor) -> bool:
        """Whether the loss module got the tensor that it is to see, or a view of it."""
        return tensor.data_ptr() == self.output.data_ptr() and tensor.numel() == self.output.numel()

    def release(self) -> None:
        """Let go of the graph and of the calls."""
        self.uses, self.output = [], self.output.detach()
        self.seen = None if self.seen is None else self.seen.detach()

    def terms(self, likelihood: Likelihood | None) -> float:
        """What the loss's reduction divides by."""
        if likelihood is None:
            return self.data
        if self.weights is not None and likelihood.reduction == "mean":
            return float(self.weights.terms.sum())
        return likelihood.terms(self.output)

    def is_outweighed(self, other: "Forward | None") -> bool:
        """Whether another pass, whose backward pass is done as well, tells more of the loss."""
        if other is None or other.gradient is None or self.gradient is None:
            return False
        return other.data > self.data

    @property
    def data(self) -> int:
        """N."""
        return (self.output if self.seen is None else self.seen).shape[0]


@dataclass
class Batch:
    """Everything captured since the last step.

    Attributes:
        loss: Of the user.
        fisher: Which curvature the statistics are of.
        statistics: Per layer name, and whether rows of A and G change places.
        forwards: Number of forward passes.
        data: Number of data, summed over the forwards.
        terms: What the loss's reduction divides by, summed over the forwards.
        latest: The latest forward, or one before it that was of more data.
        ears: Of all forwards.
        spectra: Per layer name with a basis, the sum over data of the squared gradients in it.
        samples: Per layer name, data with the gradients of the user's loss.
        multiplier: What the user's gradients at the output are divided by, to be those of the declared loss.
        scaler: What they are divided by, to fit the gradients of the parameters.
        part: Of the latest forward pass among those of all ranks, by what the reduction divides by.
    """

    loss: Loss
    fisher: Fisher
    statistics: dict[tuple[str, bool], Statistics] = field(default_factory=dict)
    forwards: int = 0
    data: int = 0
    terms: float = 0.0
    latest: Forward | None = None
    ears: list[Ear] = field(default_factory=list)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    multiplier: float = 1.0
    scaler: float = 1.0
    part: float = 1.0

    def follow(self, earlier: "Batch") -> None:
        """Add what was gathered before."""
        for key, sums in earlier.statistics.items():
            if key in self.statistics:
                sums.add(self.statistics[key])
            self.statistics[key] = sums
        for name, total in earlier.spectra.items():
            self.spectra[name] = total + self.spectra[name] if name in self.spectra else total
        for name, samples in earlier.samples.items():
            self.samples[name] = samples + self.samples.get(name, [])
        self.forwards += earlier.forwards
        self.data += earlier.data
        self.terms += earlier.terms
        if self.latest is None or self.latest.is_outweighed(earlier.latest):
            self.latest = earlier.latest

    def tensors(self) -> Iterator[Tensor]:
        """All sums, for a look at whether they are finite."""
        yield from (tensor for statistics in self.statistics.values() for tensor in statistics.tensors())
        yield from self.spectra.values()

    def rows(self, name: str) -> tuple[int, float]:
        """Number of rows in A of the layer called ``name``, and of those that they stand for."""
        own = [sums for (owner, _), sums in self.statistics.items() if owner == name]
        return sum(sums.rows for sums in own), sum(sums.of for sums in own)

    def sums(self, call: Call) -> Statistics:
        """Those that a call's rows enter."""
        return self.statistics.setdefault(call.key, Statistics(call.layer.blocks))

    def sample(self, use: list[Call], ranks: int) -> None:
        """Note the gradients that the user's backward pass brings to some of the data; our own passes must be over."""
        sample = Sample.of(use, ranks)
        if sample is not None:
            self.samples.setdefault(sample.owner.name, []).append(sample)

    def check(
        self,
        layers: Sequence[Layer],
        states: Mapping[str, Mapping[str, Any]],
        step: int,
        gradient: Callable[[nn.Parameter], Tensor | None],
    ) -> None:
        """A gradient without factors means that the hooks missed the layer, if they watched and it is not zero.

        Args:
            layers: Those that are preconditioned.
            states: What is kept of each, by name.
            step: Number of steps taken.
            gradient: Of each parameter.

        Raises:
            RuntimeError: for such a layer.
            ValueError: at the first step, for a gradient at the output that is not that of the declared loss.
        """
        latest = None if step else self.latest
        if latest is not None and latest.gradient is not None and latest.find is None and latest.likelihood:
            latest.likelihood.check_gradient(latest.gradient)
        if step and not self.statistics:
            return  # the layer is used for the first time between two updates of the curvature
        captured, resting = {name for name, _ in self.statistics}, list[str]()
        for layer in layers:
            gradients = [g for p in layer.parameters if (g := gradient(p)) is not None]
            seen = layer.name in captured or "A" in states[layer.name]
            if not seen and any(g.any() for g in gradients):
                raise RuntimeError(
                    f"layer {layer.name!r} has a gradient but natgrad saw no data pass through it. Call the model that "
                    "was given to natgrad itself, not its parts, with gradients enabled. Of a compiled model give it "
                    "what `torch.compile` returned (not `model.compile()`), before the first call. Checkpoint "
                    "activations with `use_reentrant=False`. If its parameters are used and the layer is never called, "
                    'leave them to AdamW: a group {"params": …, "fallback": True} among the `params` of natgrad.KFAC.'
                )
            if not seen and not gradients and step == 0:
                resting.append(repr(layer.name))
        if resting:
            warnings.warn(
                f"natgrad: layer {', '.join(resting)} received no data and no gradient, and rests until it does.",
                stacklevel=4,
            )

    @property
    def R(self) -> float:  # noqa: N802  # as in the formulas
        """What the loss's reduction multiplies the sum of the criteria by."""
        likelihood = self.loss.likelihood
        return 1.0 / self.terms if likelihood is None else likelihood.scale(self.terms)

    def scale(self) -> float:
        """What turns sums of outer products into the curvature of the loss."""
        # The user's gradients carry R once, and the empirical Fisher is R Σ ∇c ∇cᵀ.
        return 1.0 / (self.R * self.multiplier**2) if self.fisher == "empirical" else self.R

    def weigh(self, number: float) -> None:
        """Multiply what gradients were gathered, squared, by a number."""
        for tensor in (*(sums.G for sums in self.statistics.values()), *self.spectra.values()):
            if tensor is not None:
                tensor.mul_(number)

    def factors(self, layer: Layer) -> Factors | None:
        """A and G of one layer, in units of the loss; None if no call was captured.

        Those of a tied layer have the shapes of all its uses together, whichever ran.
        """
        joined: Factors | None = None
        for swapped in (False, True):
            statistics = self.statistics.get((layer.name, swapped))
            if statistics is not None:
                A, G = statistics.factors(self.scale(), self._without_gradient(layer, swapped))
                one = (G, A) if swapped else (A, G)
                joined = one if joined is None else join(joined, one)
        if joined is None:
            return None
        (out, width), (G_diagonal, A_diagonal) = layer.shape, layer.diagonal
        return grown(joined[0], width, A_diagonal), grown(joined[1], out, G_diagonal)

    def add_squares(self, layer: Layer, total: Tensor, part: slice, weight: float) -> None:
        """Add the squared gradients of one use of the blocks ``part`` of a layer, counted ``weight`` times."""
        if layer.name not in self.spectra:
            shape = total.shape if layer.blocks is None else (layer.blocks, *total.shape[-2:])
            self.spectra[layer.name] = total.new_zeros(shape)
        self.spectra[layer.name][part] += total * weight

    def spectrum(self, layer: Layer) -> Tensor | None:
        """Second moments of the data's gradients in the layer's basis, in units of the loss; None if none came."""
        sums = self.spectra.get(layer.name)
        return None if sums is None else sums * self.scale()

    def _without_gradient(self, layer: Layer, swapped: bool) -> Tensor:
        """G of a layer to which no gradient came: the identity by definition for ``"forward"``, else zero."""
        parameter = layer.parameters[0]
        size, diagonal = layer.shape[int(swapped)], layer.diagonal[int(swapped)]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        fill = torch.ones if self.fisher == "forward" else torch.zeros
        column = fill(size, 1, dtype=dtype, device=parameter.device)
        one = column if diagonal else column.squeeze(-1).diag()
        return one if layer.blocks is None else one.expand(layer.blocks, *one.shape).clone()


def _reaches(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the backward pass under way brings a gradient to one of these; also where that cannot be told.

    There is no public way to ask. Those of which each rank has a part are not themselves in the graph.
    """
    if not parameters or any(map(is_sharded, parameters)):
        return True
    nodes = (get_gradient_edge(p).node for p in parameters if p.requires_grad)  # some may be frozen by now
    try:
        return any(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:  # of `torch.autograd.grad` with parameters
        return True


@cache
def _tell_of_derivatives() -> None:
    warnings.warn(
        "natgrad: the training loop differentiates the model's output by `create_graph=True`. If that enters the loss, "
        "as the residual of a differential equation or a penalty on a gradient does, natgrad cannot see it there, and "
        "steps will be poor: let a module return it from its `forward`, next to other outputs with a loss, and give "
        "natgrad that module. docs/getting_started.md has an example.",
        RuntimeWarning,
        stacklevel=3,
    )


def shuffled(data: int, seed: int) -> Tensor:
    """The order in which data are chosen: from its start for the factors, from its end for the quadratic model."""
    return torch.randperm(data, generator=torch.Generator().manual_seed(seed))


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every entry is finite, with a single synchronization; both extremes are NaN where an entry is."""
    dense = [t.detach().coalesce().values() if t.is_sparse else t.detach() for t in tensors]
    dense = [torch.view_as_real(t) if t.is_complex() else t for t in dense]
    extremes = [extreme for t in dense if t.numel() for extreme in torch.aminmax(t)]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Without the user's autocast, on a type of device that may know none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
