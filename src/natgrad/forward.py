"""One forward pass of the model, as it is remembered until the step: what went in, what the loss saw, what came back.

:class:`~natgrad.capture.Capture` makes a :class:`Forward`; hooks on the graph add what the user's backward pass brings.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from natgrad.calls import Call
from natgrad.chance import Chance
from natgrad.distributed import is_sharded
from natgrad.joint import side_by_side
from natgrad.layers import at_least_float32
from natgrad.likelihoods import Likelihood
from natgrad.losses import Weights
from natgrad.outputs import Find, Origin
from natgrad.torch_internals import will_run

# Of two passes, one whose gradient at the output is less than this share of the other's tells nothing of the loss.
WEAK = 0.1
# Passes that the user's loss multiplies by numbers this close to each other are multiplied by the same.
ALIKE = 1e-3


@dataclass
class Ear:
    """Whether a gradient of the user's loss arrived at the output of a forward pass, or still may.

    Attributes:
        heard: It did.
        is_forgotten: It was let go before the loss module was called with its output.
        hooks: What waits for it. Only the graph keeps these.
    """

    heard: bool = False
    is_forgotten: bool = False
    hooks: list[weakref.ref[Any]] = field(default_factory=list)

    @property
    def is_deaf(self) -> bool:
        """None came and none can come, as the graph is gone."""
        return not self.heard and all(hook() is None for hook in self.hooks)


@dataclass(eq=False)
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
        seed: Of the order in which data are chosen, see :func:`natgrad.calls.shuffled`.
        chance: The random streams before it, if it drew from them.
        multiplier: Of the value of the loss module, in the user's loss, once its gradient has arrived.
        ear: Tells whether a gradient arrived or may arrive.
        is_makeshift: Whether ``gradient`` is of a derivative that may enter the loss, for want of the loss's own.
        trained: Parameters of the layers; a pass that brings none of them a gradient is no backward pass of the loss.
        modes: Of its modules, see :func:`natgrad.rerun.modes`.
        likelihood: Of the declared loss; for several heads with the shapes of this pass's.
        versions: Of the arguments' tensors before the pass, see :func:`versions`.
        lengths: Of the heads, if these have different numbers of data: then rows of the output are no data.
        emphasis: What the user's loss multiplies each criterion by, where there are several passes and this one tells;
            NaN otherwise.
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
    versions: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    emphasis: float = math.nan

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

    def see_what_was_called(self) -> None:
        """Let the likelihood be that of the loss which was called, if the gradient tells of another."""
        if self.gradient is not None and self.find is None and self.likelihood is not None:
            self.likelihood = self.likelihood.as_called(at_least_float32(self.output), self.gradient)

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

    def tell_of_changed_arguments(self) -> None:
        """Warn where the arguments are no longer what the pass saw."""
        if self.versions and versions(self.args, self.kwargs) != self.versions:
            _tell_of_arguments()

    def terms(self, likelihood: Likelihood | None) -> float:
        """What the loss's reduction divides by."""
        if likelihood is None:
            return self.data
        if self.weights is not None and likelihood.reduction == "mean":
            return float(self.weights.terms.sum())
        return likelihood.terms(self.output)

    def criteria(self, likelihood: Likelihood | None) -> int:
        """How many criteria count, as far as that is known."""
        if likelihood is None:
            return 0
        return likelihood.criteria(self.output) if self.weights is None else int(self.weights.curvature.count_nonzero())

    def is_outweighed(self, other: "Forward | None") -> bool:
        """Whether another pass, whose backward pass is done as well, tells more of the loss.

        That is the larger one, unless its gradient is next to nothing beside the other's; or the one whose criteria
        count for more, as a step is fitted to these, and curved along it.
        """
        if other is None or other.gradient is None or self.gradient is None:
            return False
        if min(self.told, other.told) < WEAK * max(self.told, other.told):
            return self.told < other.told
        if abs(other.emphasis / self.emphasis - 1) > ALIKE:
            return other.emphasis > self.emphasis
        return other.data > self.data

    @cached_property
    def told(self) -> float:
        """Sum of the absolute entries of the gradient: on any number of data as much, as that of a mean is."""
        return 0.0 if self.gradient is None else float(self.gradient.abs().sum())

    @property
    def data(self) -> int:
        """N."""
        return (self.output if self.seen is None else self.seen).shape[0]


def versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """How often each tensor among the arguments has been written to."""
    leaves = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return tuple(leaf._version for leaf in leaves if not leaf.is_inference())


def _reaches(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the backward pass under way brings a gradient to one of these; also where that cannot be told.

    There is no public way to ask. Those of which each rank has a part are not themselves in the graph.
    """
    if not parameters or any(map(is_sharded, parameters)):
        return True
    nodes = (get_gradient_edge(p).node for p in parameters if p.requires_grad)  # some may be frozen by now
    try:
        return any(map(will_run, nodes))
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


@cache
def _tell_of_arguments() -> None:
    warnings.warn(
        "natgrad: an argument of the model was changed in place, by its `forward` or before `step()`. To judge a step "
        "natgrad evaluates the model on it once more, and sees other data: change a copy (`x = x - mean`, not "
        "`x -= mean`), and refill the buffer of a batch after `step()`.",
        RuntimeWarning,
        stacklevel=3,
    )
