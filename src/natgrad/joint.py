"""The likelihood of several tensors with a loss each, as of a network with several heads.

A weighted sum of losses is the negative log likelihood of their targets together, which are independent given the
outputs: its Hessian has a block for each head, and no others. So everything that a likelihood gives is made head by
head, for one tensor in which each datum's outputs stand side by side. Heads may be of different data, and of more or
fewer, as residuals inside a domain and on its boundary are: the shorter ones are filled up with rows that count
nothing. With R_h what the loss of head h multiplies its criterion by (see :mod:`natgrad.likelihoods`) and w_h its
weight, the criterion and its scale are

    c = Σ_h F_h c_h,    F_h = w_h R_h / R,    R = 1 / N, or 1 if all losses are sums.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from natgrad.likelihoods import Likelihood


class Part(NamedTuple):
    """The loss of one head.

    Attributes:
        weight: What it is multiplied by in the sum.
        likelihood: Its own.
    """

    weight: float
    likelihood: Likelihood


class Joint(Likelihood):
    """A weighted sum of losses of several tensors.

    The tensors may have any shapes; ``join`` remembers them, for ``split``. A copy keeps those of its time.

    Args:
        parts: By the key of the head in what the model returns.

    Attributes:
        lengths: Of the latest heads, if these have different numbers of data; none otherwise.

    Raises:
        ValueError: if some of the losses are sums over the data and others are not.
    """

    def __init__(self, parts: Mapping[Any, Part]) -> None:
        sums = {part.likelihood.reduction == "sum" for part in parts.values()}
        if len(sums) != 1:
            raise ValueError(
                "the losses of several outputs must all be sums over the data, or all means; not "
                f"{', '.join(repr(part.likelihood) for part in parts.values()) or 'none at all'}."
            )
        super().__init__("sum" if sums.pop() else "batchmean")
        self.of_residuals = all(part.likelihood.of_residuals for part in parts.values())
        self.parts = dict(parts)
        self._shapes: list[torch.Size] = []
        self.lengths: tuple[int, ...] = ()

    def __repr__(self) -> str:
        parts = (f"{key!r}: {part.weight:g} * {part.likelihood!r}" for key, part in self.parts.items())
        return f"Joint({', '.join(parts)})"

    def heads(self, returned: Any) -> list[Tensor]:
        """The tensors that have a loss, in what a model returned: by key, by place or by the name of an attribute.

        Raises:
            TypeError: if one of them is not there or is no tensor.
            ValueError: if they cannot belong to their losses.
        """
        heads = [self._head(returned, key) for key in self.parts]
        for part, head in zip(self.parts.values(), heads, strict=True):
            part.likelihood.check(head)
        return heads

    @staticmethod
    def _head(returned: Any, key: Any) -> Tensor:
        is_container = isinstance(returned, Mapping | tuple | list)
        try:
            head = returned[key] if is_container else getattr(returned, str(key))
        except (KeyError, IndexError, TypeError, AttributeError):
            head = None
        if not isinstance(head, Tensor):
            there = list(returned) if isinstance(returned, Mapping) else type(returned).__name__
            raise TypeError(
                f"`loss` tells of an output {key!r}, and there is no such tensor in {there}: name the losses as the "
                "outputs are named, or pass `output=`, which makes a dictionary of what the model returns."
            )
        return head

    def join(self, heads: Sequence[Tensor]) -> Tensor:
        """The outputs of each datum side by side, (N, K)."""
        self._shapes = [head.shape[1:] for head in heads]
        self.lengths = differing_lengths(heads)
        return side_by_side(heads)

    def split(self, joined: Tensor) -> list[Tensor]:
        """Each head's own, (N_h, *shape), of (N, K)."""
        columns = joined.split([shape.numel() for shape in self._shapes], dim=1)
        numbers = self.lengths or [len(joined)] * len(columns)
        each = zip(columns, numbers, self._shapes, strict=True)
        return [part[:number].reshape(number, *shape) for part, number, shape in each]

    def smoothed(self, output: Tensor, number: float) -> "Joint":
        """Each head's own, of which a row has one criterion or more."""
        rows = len(output) or 1
        return self._made(lambda one, f: one.smoothed(f, number * one.criteria(f) / rows), output)

    def as_called(self, output: Tensor, gradient: Tensor) -> "Joint":
        """Each head's own, if another of its outputs was called."""
        return self._made(lambda one, f, g: one.as_called(f, g), output, gradient)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Each head's own draw, times √F."""
        return self._each(lambda one, F, f: F**0.5 * one.sample(f, generator), output)

    def columns(self, output: Tensor) -> Iterator[Tensor]:
        """Each head's own columns, times √F, with zeros at the others."""
        zeros = [torch.zeros_like(head) for head in self.split(output)]
        for number, (likelihood, F, head) in enumerate(self._scaled(output)):
            for column in likelihood.columns(head):
                yield side_by_side([*zeros[:number], F**0.5 * column, *zeros[number + 1 :]])

    def hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        """Each head's own, times F."""
        return self._each(lambda one, F, f, v: F * one.hessian_product(f, v), output, vector)

    def divergence(self, output: Tensor, moved: Tensor) -> Tensor:
        """Each head's own, times F; what is of several entries, as of all classes, is shared out among them."""
        return self._each(lambda one, F, f, m: _shared_out(F * one.divergence(f, m), f), output, moved)

    def remainder(self, output: Tensor, moved: Tensor, gradient: Tensor) -> Tensor:
        """Each head's own, times F and shared out likewise; ``gradient`` is F times each head's."""
        return self._each(
            lambda one, F, f, m, g: _shared_out(F * one.remainder(f, m, g / F), f), output, moved, gradient
        )

    def gradient_change(self, output: Tensor, moved: Tensor) -> Tensor:
        """Each head's own, times F."""
        return self._each(lambda one, F, f, m: F * one.gradient_change(f, m), output, moved)

    def steepening(self, output: Tensor, moved: Tensor) -> Tensor:
        """Each head's own, times F."""
        return self._each(lambda one, F, f, m: F * one.steepening(f, m), output, moved)

    def reach(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        """Each head's own, times F; None if one of them is unbounded, as its weight may be another than the others'."""
        reaches = []
        for (likelihood, F, head), g in zip(self._scaled(output), self.split(gradient), strict=True):
            own = likelihood.reach(head, g)
            if own is None:
                return None
            reaches.append(F * own)
        return side_by_side(reaches)

    def shares(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        """Each head's own."""

        def own(likelihood: Likelihood, F: float, head: Tensor, g: Tensor) -> Tensor:
            shares = likelihood.shares(head, g)
            return torch.ones_like(head) if shares is None else shares.expand_as(head)

        each = self._each(own, output, gradient)
        return None if all((shares == 1).all() for shares in self.split(each)) else each

    def criteria(self, output: Tensor) -> int:
        """One per row."""
        return len(output)

    def check_gradient(self, gradient: Tensor) -> None:
        """Let each head's likelihood check its own."""
        for part, own in zip(self.parts.values(), self.split(gradient), strict=True):
            part.likelihood.check_gradient(own)

    def _scaled(self, output: Tensor) -> Iterator[tuple[Likelihood, float, Tensor]]:
        """Each head with its likelihood and F."""
        for (weight, likelihood), head in zip(self.parts.values(), self.split(output), strict=True):
            yield likelihood, weight * likelihood.scale(likelihood.terms(head)) / self.scale(len(output)), head

    def _each(self, function: Callable[..., Tensor], output: Tensor, *others: Tensor) -> Tensor:
        """What a function of likelihood, F, head and the same head's part of others makes, side by side."""
        rest = [self.split(other) for other in others]
        made = [function(*scaled, *own) for scaled, *own in zip(self._scaled(output), *rest, strict=True)]
        return side_by_side(made)

    def _made(self, function: Callable[..., Likelihood], *joined: Tensor) -> "Joint":
        """A copy whose heads have what a function makes of each likelihood and the same head's part of others."""
        made = copy(self)
        own = zip(self.parts.items(), *map(self.split, joined), strict=True)
        made.parts = {key: Part(part.weight, function(part.likelihood, *head)) for (key, part), *head in own}
        return made


def _shared_out(criteria: Tensor, head: Tensor) -> Tensor:
    """The same sum, over the entries of a head."""
    return (criteria.numel() / head.numel() * criteria).expand_as(head)


def differing_lengths(heads: Sequence[Tensor]) -> tuple[int, ...]:
    """Numbers of data of the heads; none if it is one for all."""
    numbers = tuple(map(len, heads))
    return numbers if len(set(numbers)) > 1 else ()


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (N, …) as one, (N, K), with zeros below the shorter ones."""
    rows = [tensor.flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1) for tensor in tensors]
    most = max(map(len, rows))
    return torch.cat([one if len(one) == most else pad(one, (0, 0, 0, most - len(one))) for one in rows], dim=1)
