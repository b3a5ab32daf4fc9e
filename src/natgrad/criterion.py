"""Stage 1, what a loss has to tell: the interface of the likelihoods, and what follows from it.

A loss is ``R · Σ c``: a criterion ``c`` summed over the data and scaled by the reduction (:mod:`natgrad.likelihoods`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "batchmean"]
# So few entries of a gradient are zero by rounding, among millions; if they are masked, it makes no difference.
ROUNDED = 1e-4


class Likelihood(ABC):
    """A distribution over targets whose negative log density is the loss's criterion.

    Subclass it to give natgrad a loss of your own: fill in ``sample``, ``columns``, ``hessian_product`` and
    ``criteria``. Data are the first dimension of the output.

    Args:
        reduction: ``"mean"`` and ``"sum"`` as torch's loss modules mean them; ``"batchmean"`` sums the criterion over
            each datum's outputs and averages over the data.

    Attributes:
        of_labels: Whether targets can only be labels, at each of which ∇c has the size that ``reach`` tells.
        of_residuals: Whether ∇c is what is predicted less its target, up to a constant, so that its square falls with
            the loss; by default it is not asked for progress (:mod:`natgrad.averaging`).
    """

    of_labels = of_residuals = False

    def __init__(self, reduction: Reduction = "mean") -> None:
        if reduction not in get_args(Reduction):
            raise ValueError(f"`reduction` must be one of {get_args(Reduction)}, not {reduction!r}.")
        self.reduction = reduction

    def __repr__(self) -> str:
        return f"{type(self).__name__}(reduction={self.reduction!r})"

    @abstractmethod
    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of the criterion at a target drawn from the model's own distribution, shaped like ``output``."""

    @abstractmethod
    def columns(self, output: Tensor) -> Iterator[Tensor]:
        """Vectors shaped like ``output`` whose outer products sum to ∇²c of each datum; one per output entry."""

    @abstractmethod
    def hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        """∇²c times ``vector``; both shaped like ``output``."""

    def smoothed(self, output: Tensor, number: float) -> "Likelihood":
        """The same loss, with the curvature of predictions that are no more certain than data can tell.

        By default it is the same curvature, as for whatever predicts no probabilities.

        Args:
            output: Of a pass.
            number: How many criteria all passes of a step have.
        """
        return self

    def divergence(self, output: Tensor, moved: Tensor) -> Tensor:
        """KL divergence from the distribution at ``output`` to that at ``moved``, of each criterion.

        By default, its second-order term. Shaped like ``output``, up to dimensions summed to one.
        """
        return (moved - output) * self.hessian_product(output, moved - output) / 2

    def remainder(self, output: Tensor, moved: Tensor, gradient: Tensor) -> Tensor:
        """What each criterion changes by from ``output`` to ``moved``, less ∇c · (moved − output).

        Where targets enter the criterion linearly, as in most losses, that is the divergence, whatever they are.
        Shaped like that.

        Args:
            output: As everywhere.
            moved: Another output.
            gradient: ∇c at ``output``, which tells the target where it matters.
        """
        return self.divergence(output, moved)

    def gradient_change(self, output: Tensor, moved: Tensor) -> Tensor:
        """∇c at ``moved`` less ∇c at ``output``, for the same target; by default to first order."""
        return self.hessian_product(output, moved - output)

    def steepening(self, output: Tensor, moved: Tensor) -> Tensor:
        """By how much the slope of each criterion along moved − output rises from the one to the other."""
        return self.gradient_change(output, moved) * (moved - output)

    def reach(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        """The largest size of ∇c that a target allows, of each entry, with the sign of ``gradient``; None if unbounded.

        Args:
            output: As everywhere.
            gradient: Any multiple of ∇c, shaped like ``output``, as the reach is.
        """
        return None

    def as_called(self, output: Tensor, gradient: Tensor) -> "Likelihood":
        """The likelihood of the loss that was called, where the gradient tells that it is another one of these outputs.

        Args:
            output: As everywhere.
            gradient: Any positive multiple of ∇c, shaped like ``output``.
        """
        return self

    def counted(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        """Which criteria the loss counts: ones and zeros, one entry where the classes are; None if it cannot be told.

        No model meets a target to all digits: without a gradient it is masked or ignored, or nothing is left to learn.

        Args:
            output: As everywhere.
            gradient: Any multiple of ∇c, shaped like ``output``.
        """
        return None

    def shares(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        """As ``counted``, with what each that counts weighs more where a mean is over these only; None if all count."""
        counted = self.counted(output, gradient)
        if counted is None or counted.all() or not counted.any():
            return None
        return counted / counted.mean() if self.reduction == "mean" else counted

    @abstractmethod
    def criteria(self, output: Tensor) -> int:
        """How many criteria a torch ``mean`` would average over for this output."""

    @property
    def weight(self) -> float:
        """What one criterion counts in the loss before the reduction divides."""
        return 1.0

    def check(self, output: Tensor) -> None:
        """Raise a ``ValueError`` when the output cannot belong to this loss."""
        if output.ndim < 1 or not output.is_floating_point():
            raise ValueError(
                f"{self!r} needs a floating point output with the data as its first dimension, not {output.dtype} of "
                f"shape {tuple(output.shape)}. Pass `output=` to natgrad to select the tensor that the loss sees; if "
                "the model returns its losses, let it return what they are of, too."
            )

    def check_gradient(self, gradient: Tensor) -> None:
        """Raise a ``ValueError`` when what arrived at the output, shaped like it, cannot be this loss's gradient."""
        return  # without knowing the targets, most losses cannot tell

    def terms(self, output: Tensor) -> int:
        """What the reduction divides by; adds up when a batch is split."""
        return output.shape[0] if self.reduction == "batchmean" else self.criteria(output)

    def scale(self, terms: float) -> float:
        """R, the factor between the sum of the criteria and the loss, for a batch with so many ``terms``; 0 is as 1."""
        return self.weight if self.reduction == "sum" else self.weight / (terms or 1.0)


class Smoothable(Likelihood):
    """Of probabilities, or of counts, which N criteria cannot tell from others by more than one observation.

    Probabilities p of K classes become (N p + 1/K) / (N + 1). Where a model is certain, be it wrong, curvature
    vanishes, and a Newton step has no end.
    """

    _share = 0.0  # of the uniform distribution

    def smoothed(self, output: Tensor, number: float) -> "Smoothable":
        """By one more observation."""
        smoothed = copy(self)
        smoothed._share = 1 / (1 + number)
        return smoothed


class Elementwise(Likelihood):
    """One criterion for each entry of the output, with a diagonal ∇²c."""

    def criteria(self, output: Tensor) -> int:
        """One per output entry."""
        return output.numel()

    def counted(self, output: Tensor, gradient: Tensor) -> Tensor:
        """Entry by entry; an output of zero, or at a bound of the outputs, may be its very target."""
        if not output.numel():
            return torch.ones_like(gradient)
        met = output == 0
        for bound in torch.aminmax(output):
            reached = output == bound
            met |= reached & (reached.sum() > 1)
        return ((gradient != 0) | met).to(gradient.dtype)

    def shares(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        """As everywhere; all count where next to none is zero, which is had for a quarter of the time."""
        zeros = gradient.numel() - int(gradient.count_nonzero())
        return None if zeros <= ROUNDED * gradient.numel() else super().shares(output, gradient)

    @abstractmethod
    def diagonal(self, output: Tensor) -> Tensor:
        """Of the Fisher matrix."""

    def columns(self, output: Tensor) -> Iterator[Tensor]:
        """The root of the diagonal, at one entry of every datum at a time."""
        return entries(self.diagonal(output).sqrt())

    def hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        """The diagonal times the vector."""
        return self.diagonal(output) * vector


def entries(values: Tensor) -> Iterator[Tensor]:
    """``values`` restricted to one entry of every datum at a time, for a diagonal ∇²c."""
    flat = values.reshape(values.shape[0], -1)
    for k in range(flat.shape[1]):
        column = torch.zeros_like(flat)
        column[:, k] = flat[:, k]
        yield column.reshape(values.shape)
