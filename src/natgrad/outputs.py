"""From what a model returns to the tensor that the loss sees, and to those at which the loss's gradient arrives.

Arithmetic is done with one tensor. It may be one that the model returned; then the gradient of the user's loss arrives
there. Or a function of the user's makes it of some of those, for us alone: then the gradient arrives at these, and they
are found by going up the graph from what was made.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_leaves

from natgrad.joint import Joint, side_by_side
from natgrad.losses import Loss

Find = Callable[[Any], Tensor]
"""From what a model returned to the tensors at which the gradient arrives, side by side if there are several."""


class View:
    """How the loss sees what the model returns.

    Args:
        function: Of the user's, from the one to the other; None if the loss sees what is returned.
        loss: The loss.

    Raises:
        ValueError: if the function is none.
    """

    def __init__(self, function: Callable[[Any], Any] | None, loss: Loss) -> None:
        if not (function is None or callable(function)):
            raise ValueError(
                "`output` must be a function from what the model returns to the tensor that the loss sees, for "
                f"instance `lambda out: out.logits`, not {function!r}."
            )
        self.function, self.loss = function, loss

    def __call__(self, raw: Any) -> Tensor:
        """The tensor that the loss sees, or all of them side by side, checked against the likelihood."""
        return self.join(self.heads(raw))

    def heads(self, raw: Any) -> list[Tensor]:
        """The tensors that the loss sees.

        Raises:
            TypeError: if they are not there.
            ValueError: if they cannot belong to the loss.
        """
        output, by = (raw, "the model") if self.function is None else (self.function(raw), "the function `output=`")
        if isinstance(self.loss.likelihood, Joint):
            return self.loss.likelihood.heads(output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{by} returned {type(output).__name__}, not a tensor: pass `output=` to natgrad to select the "
                "tensor that the loss sees, for instance `output=lambda out: out.logits`; or as `loss` a dictionary "
                "or a tuple of losses, if several have one."
            )
        if output.ndim < 1:
            raise ValueError(
                f"{by} returned a scalar, and natgrad needs the output with the data as its first dimension: pass "
                "`output=` to select the tensor that the loss sees; if the model returns its loss, let it return that "
                "tensor, too."
            )
        if self.loss.likelihood is not None and self.loss.module is None:
            self.loss.likelihood.check(output)
        return [output]

    def join(self, heads: Sequence[Tensor]) -> Tensor:
        """One tensor of those that the loss sees."""
        return self.loss.likelihood.join(heads) if isinstance(self.loss.likelihood, Joint) else heads[0]

    def origins(self, raw: Any, heads: list[Tensor]) -> tuple[list["Origin"], Find | None]:
        """Where the gradient of the user's loss arrives.

        Args:
            raw: What the model returned.
            heads: What the loss sees of it.

        Returns:
            The tensors, and how to find them in what the model returns another time; None if they are the heads.
        """
        themselves = [Origin(head) for head in heads]
        if self.function is None:
            return themselves, None
        returned = _tensors(raw)
        if all(any(head is one for one in returned) for head in heads):
            return themselves, None
        edges = [get_gradient_edge(one) if one.requires_grad else None for one in returned]
        met = [met_first(get_gradient_edge(head), edges) if head.requires_grad else set[int]() for head in heads]
        if all(
            len(places) == 1 and _is_rearranged(head, returned[min(places)])
            for head, places in zip(heads, met, strict=True)
        ):
            origins = [returned[min(places)] for places in met]
            return [Origin(one, head.shape, head.stride()) for one, head in zip(origins, heads, strict=True)], None
        places = sorted(set().union(*met))
        if not places or (len(places) > 1 and any(len(returned[place]) != len(heads[0]) for place in places)):
            return themselves, None

        def find(again: Any) -> Tensor:
            tensors = _tensors(again)
            return as_one([tensors[place] for place in places])

        return [Origin(returned[place]) for place in places], find


class Origin(NamedTuple):
    """A tensor at which the gradient of the user's loss arrives.

    Attributes:
        tensor: The tensor.
        shape: Of the output, if that has the same entries in another order.
        stride: Likewise.
    """

    tensor: Tensor
    shape: torch.Size | None = None
    stride: tuple[int, ...] = ()

    @property
    def order(self) -> Callable[[Tensor], Tensor]:
        """From the gradient at the tensor to that at the output; without a hold on the tensor."""
        if self.shape is None:
            return Tensor.detach
        return partial(_rearrange, self.tensor.stride(), self.shape, self.stride)


def _is_rearranged(head: Tensor, origin: Tensor) -> bool:
    """Whether one is a view of all entries of the other, each once."""
    sizes = sorted((stride, size) for stride, size in zip(head.stride(), head.shape, strict=True) if size > 1)
    dense = all(stride == prod(size for _, size in sizes[:i]) for i, (stride, _) in enumerate(sizes))
    return dense and head.data_ptr() == origin.data_ptr() and head.numel() == origin.numel()


def _rearrange(origin: tuple[int, ...], shape: torch.Size, stride: tuple[int, ...], gradient: Tensor) -> Tensor:
    stored = torch.empty_strided(gradient.shape, origin, dtype=gradient.dtype, device=gradient.device)
    return stored.copy_(gradient.detach()).as_strided(shape, stride)


def rearrangement(returned: Tensor | None, given: Tensor) -> Callable[[Tensor], Tensor]:
    """How the training loop turned the model's output into the loss module's input.

    Args:
        returned: By the model; None if that is what the loss sees.
        given: To the loss module.

    Raises:
        ValueError: when it was neither handed on as it is, nor flattened to rows, nor its classes moved.
    """
    if returned is None:
        return lambda out: out
    returned, given = returned.detach(), given.detach()
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda out: out,
        lambda out: out.reshape(-1, *given.shape[1:]),
        lambda out: out.movedim(-1, 1),
        lambda out: out.movedim(1, -1).reshape(-1, given.shape[1]),
    ]
    for way in ways:
        try:
            same = way(returned)
        except (RuntimeError, IndexError):  # a shape that does not divide
            continue
        if _equal(same, given):
            return way
    raise ValueError(
        f"the loss module got an input of shape {tuple(given.shape)} that natgrad cannot trace to the model's output, "
        f"of shape {tuple(returned.shape)}: pass `output=` to natgrad, a function that makes the one from the other. "
        "Where some entries are chosen by the data, choose them in the model, mark the other targets as ignored, or "
        'declare the loss by name, "cross_entropy" or for any kind of error "mse": then the gradient tells what counts.'
    )


class Selection:
    """Some entries of each datum, as those of the actions that were taken.

    Args:
        index: Their places among the datum's entries, (N, k).
        shape: Of what is made of them, without the data.
    """

    def __init__(self, index: Tensor, shape: torch.Size) -> None:
        self.index, self.shape = index, shape

    def __call__(self, out: Tensor) -> Tensor:
        """(N, …) → (N, *shape)."""
        return out.flatten(1).gather(1, self.index).reshape(len(out), *self.shape)

    def of(self, chosen: slice | Tensor) -> "Selection":
        """The same of some of the data."""
        return Selection(self.index[chosen], self.shape)

    @classmethod
    def between(cls, returned: Tensor, given: Tensor) -> "Selection | None":
        """How the training loop selected the loss module's input, if it did no more than that.

        Numbers that are sent back from the input arrive where its entries come from.
        """
        if returned.ndim < 2 or len(returned) != len(given) or given.numel() > 1 / torch.finfo(given.dtype).eps:
            return None
        numbers = torch.arange(1, given.numel() + 1, device=given.device).to(given.dtype).view_as(given)
        (marks,) = torch.autograd.grad(given, returned, numbers, retain_graph=True, allow_unused=True)
        if marks is None or not torch.equal(marks[marks != 0].sort().values, numbers.flatten()):
            return None
        places = marks.flatten(1).argsort(dim=1, descending=True, stable=True)[:, : given[0].numel()].flip(1)
        found = cls(places, given.shape[1:])
        return found if _equal(found(returned), given) else None


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, also where they are not numbers."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def as_one(tensors: Sequence[Tensor]) -> Tensor:
    """A tensor as it is; several side by side."""
    return tensors[0] if len(tensors) == 1 else side_by_side(tensors)


def _tensors(raw: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(raw) if isinstance(leaf, Tensor) and leaf.ndim]


def met_first(start: GradientEdge, edges: Sequence[GradientEdge | None]) -> set[int]:
    """Which of the edges are met first on the ways up from one of them or from another."""
    met, seen = set[int](), set[tuple[Node, int]]()
    ahead: list[tuple[Node | None, int]] = [(start.node, start.output_nr)]
    while ahead:
        node, number = ahead.pop()
        if node is None or (node, number) in seen:
            continue
        seen.add((node, number))
        here = {i for i, edge in enumerate(edges) if edge and edge.node is node and edge.output_nr == number}
        met |= here
        if not here:
            ahead.extend(node.next_functions)
    return met
