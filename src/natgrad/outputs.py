"""From what a model returns to the tensor that the loss sees, and to those at which the loss's gradient arrives.

Arithmetic is done with one tensor. It may be one that the model returned; then the gradient of the user's loss arrives
there. Or a function of the user's makes it of some of those, for us alone: then the gradient arrives at these, and they
are found by going up the graph from what was made.
"""

from collections.abc import Callable, Sequence
from typing import Any

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
    """

    def __init__(self, function: Callable[[Any], Any] | None, loss: Loss) -> None:
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
        output = raw if self.function is None else self.function(raw)
        if isinstance(self.loss.likelihood, Joint):
            return self.loss.likelihood.heads(output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the model returned {type(output).__name__}, not a tensor: pass `output=` to natgrad to select the "
                "tensor that the loss sees, for instance `output=lambda out: out.logits`; or as `loss` a dictionary "
                "or a tuple of losses, if several have one."
            )
        if output.ndim < 1:
            raise ValueError(
                "the model returned a scalar, and natgrad needs the output with the data as its first dimension: pass "
                "`output=` to select the tensor that the loss sees."
            )
        if self.loss.likelihood is not None and self.loss.module is None:
            self.loss.likelihood.check(output)
        return [output]

    def join(self, heads: Sequence[Tensor]) -> Tensor:
        """One tensor of those that the loss sees."""
        return self.loss.likelihood.join(heads) if isinstance(self.loss.likelihood, Joint) else heads[0]

    def origins(self, raw: Any, heads: list[Tensor]) -> tuple[list[Tensor], Find | None]:
        """Where the gradient of the user's loss arrives.

        Args:
            raw: What the model returned.
            heads: What the loss sees of it.

        Returns:
            The tensors, and how to find them in what the model returns another time; None if they are the heads.
        """
        if self.function is None:
            return heads, None
        returned = _tensors(raw)
        if all(any(head is one for one in returned) for head in heads):
            return heads, None
        edges = [get_gradient_edge(one) if one.requires_grad else None for one in returned]
        met = {place for head in heads if head.requires_grad for place in _met(get_gradient_edge(head), edges)}
        places = sorted(met)
        if not places or (len(places) > 1 and any(len(returned[place]) != len(heads[0]) for place in places)):
            return heads, None

        def find(again: Any) -> Tensor:
            tensors = _tensors(again)
            return as_one([tensors[place] for place in places])

        return [returned[place] for place in places], find


def as_one(tensors: Sequence[Tensor]) -> Tensor:
    """A tensor as it is; several side by side."""
    return tensors[0] if len(tensors) == 1 else side_by_side(tensors)


def _tensors(raw: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(raw) if isinstance(leaf, Tensor) and leaf.ndim]


def _met(start: GradientEdge, edges: Sequence[GradientEdge | None]) -> set[int]:
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
