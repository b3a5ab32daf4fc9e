"""Stage 1: the loss as a likelihood, which tells what to backpropagate to obtain its curvature.

A loss is ``R · Σ c``: a criterion ``c`` summed over the data and scaled by the reduction. Each criterion is a negative
log likelihood up to a constant, so its Hessian at the model's output is also its Fisher matrix there:

============ ========================= ============== ==================================
likelihood   criterion c               Hessian ∇²c    R for mean / sum / batchmean
============ ========================= ============== ==================================
Gaussian     ½ ‖f − y‖²                I              2/numel, 2, 1/N  (torch's MSE has no ½)
Categorical  −log softmax(f)[y]        diag p − p pᵀ  1/(N·T), 1, 1/N
Bernoulli    BCE with logits           diag p(1 − p)  1/numel, 1, 1/N
============ ========================= ============== ==================================

A likelihood gives three things, all shaped like the output: draws of ∇c at a target sampled from the model (their
second moment is ∇²c: the Monte Carlo Fisher), the columns of a square root of ∇²c, and products with ∇²c. The
surprising convention: ``columns`` yields one vector per output *entry*, C·T of them for T positions, because positions
that interact inside the network would mix if their vectors were switched on together.

Sources: Martens (2020), "New insights and perspectives on the natural gradient method", sections 6, 9; Martens and
Grosse (2015), arXiv:1503.05671, section 2.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Reduction = Literal["mean", "sum", "batchmean"]


class Likelihood(ABC):
    """A distribution over targets whose negative log density is the loss's criterion.

    Subclass it to give natgrad a loss of your own: fill in the three products and ``terms_per_output``. Data are the
    first dimension of the output.

    Args:
        reduction: ``"mean"`` and ``"sum"`` as torch's loss modules mean them; ``"batchmean"`` sums the criterion over
            each datum's outputs and averages over the data.
    """

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
                f"{self!r} needs a floating point output with the data as its first dimension, and the model returned "
                f"{output.dtype} of shape {tuple(output.shape)}. Pass `output=` to natgrad to select the tensor that "
                "the loss sees."
            )

    def terms(self, output: Tensor) -> int:
        """What the reduction divides by; adds up when a batch is split."""
        return output.shape[0] if self.reduction == "batchmean" else self.criteria(output)

    def scale(self, terms: float) -> float:
        """R, the factor between the sum of the criteria and the loss, for a batch with so many ``terms``."""
        return self.weight if self.reduction == "sum" else self.weight / terms


class Gaussian(Likelihood):
    """Squared error. ``"mean"`` and ``"sum"`` are torch's ``MSELoss``; ``"batchmean"`` is Σ ½ (f − y)² / N."""

    @property
    def weight(self) -> float:
        """Two for torch's reductions, since the criterion has a half and ``MSELoss`` has none."""
        return 1.0 if self.reduction == "batchmean" else 2.0

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal: f − y with y drawn from N(f, I)."""
        return torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)

    def columns(self, output: Tensor) -> Iterator[Tensor]:
        """Unit vectors, the same in every datum."""
        return _entries(torch.ones_like(output))

    def hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        """The vector itself, since ∇²c = I."""
        return vector

    def criteria(self, output: Tensor) -> int:
        """One per output entry."""
        return output.numel()


class Bernoulli(Likelihood):
    """Binary cross-entropy of logits, as torch's ``BCEWithLogitsLoss``."""

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """p − y with y drawn from Bernoulli(p)."""
        p = torch.sigmoid(output)
        # What is not a number must reach the statistics, so that the step is skipped, and not `bernoulli`.
        return p - torch.bernoulli(p.nan_to_num(nan=0.0), generator=generator)

    def columns(self, output: Tensor) -> Iterator[Tensor]:
        """√(p(1 − p)) at one entry of every datum at a time."""
        p = torch.sigmoid(output)
        return _entries((p * (1 - p)).sqrt())

    def hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        """p(1 − p) times the vector."""
        p = torch.sigmoid(output)
        return p * (1 - p) * vector

    def criteria(self, output: Tensor) -> int:
        """One per output entry."""
        return output.numel()


class Categorical(Likelihood):
    """Cross-entropy of logits of shape (N, C) or (N, C, T…), as torch's ``CrossEntropyLoss``."""

    def check(self, output: Tensor) -> None:
        """Refuse outputs without at least two classes in dimension 1."""
        super().check(output)
        if output.ndim < 2 or output.shape[1] < 2:
            raise ValueError(
                f"{self!r} needs logits of shape (N, classes, …) with at least two classes, and the model returned "
                f'{tuple(output.shape)}. For one logit per datum use loss="bce_with_logits"; to rearrange the output '
                "as the loss sees it pass `output=`, for instance `output=lambda out: out.transpose(1, 2)`."
            )

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """p − onehot(y) with y drawn from the categorical distribution p."""
        p = torch.softmax(output, dim=1)
        rows = p.movedim(1, -1).reshape(-1, p.shape[1])
        # What is not a number must reach the statistics, so that the step is skipped, and not `multinomial`.
        drawn = torch.multinomial(rows.nan_to_num(nan=1.0), 1, generator=generator)
        onehot = torch.zeros_like(rows).scatter_(1, drawn, 1.0)
        return p - onehot.reshape(p.movedim(1, -1).shape).movedim(-1, 1)

    def columns(self, output: Tensor) -> Iterator[Tensor]:
        """√p_k (e_k − p) for class k, at one position of every datum at a time."""
        p = torch.softmax(output, dim=1).reshape(*output.shape[:2], -1)  # (N, C, T)
        _, classes, positions = p.shape
        for position in range(positions):
            at = p[:, :, position]  # (N, C)
            for k in range(classes):
                column = torch.zeros_like(p)
                column[:, :, position] = -at * at[:, k : k + 1].sqrt()
                column[:, k, position] += at[:, k].sqrt()
                yield column.reshape(output.shape)

    def hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        """p ∘ v − p (p · v)."""
        p = torch.softmax(output, dim=1)
        pv = p * vector
        return pv - p * pv.sum(dim=1, keepdim=True)

    def criteria(self, output: Tensor) -> int:
        """One per datum and position."""
        return output.numel() // output.shape[1]


def _entries(values: Tensor) -> Iterator[Tensor]:
    """``values`` restricted to one entry of every datum at a time, for a diagonal ∇²c."""
    flat = values.reshape(values.shape[0], -1)
    for k in range(flat.shape[1]):
        column = torch.zeros_like(flat)
        column[:, k] = flat[:, k]
        yield column.reshape(values.shape)


_BY_NAME: dict[str, type[Likelihood]] = {
    "mse": Gaussian,
    "cross_entropy": Categorical,
    "bce_with_logits": Bernoulli,
}


def resolve(loss: str | nn.Module | Likelihood | None) -> Likelihood | None:
    """The likelihood that a user's ``loss`` argument means.

    Raises:
        ValueError: for an unknown name, or a loss module with options whose curvature is not known.
        TypeError: for anything else than a name, a torch loss module, a ``Likelihood`` or None.
    """
    if loss is None or isinstance(loss, Likelihood):
        return loss
    if isinstance(loss, str):
        if loss not in _BY_NAME:
            raise ValueError(f"`loss={loss!r}` is not known: use one of {', '.join(map(repr, _BY_NAME))}.")
        return _BY_NAME[loss]()
    if isinstance(loss, nn.Module):
        return _from_module(loss)
    raise TypeError(f"`loss` must be a name, a torch loss module or a `natgrad.likelihoods.Likelihood`, not {loss!r}.")


def _from_module(module: nn.Module) -> Likelihood:
    kinds: dict[type[nn.Module], type[Likelihood]] = {
        nn.MSELoss: Gaussian,
        nn.CrossEntropyLoss: Categorical,
        nn.BCEWithLogitsLoss: Bernoulli,
    }
    kind = kinds.get(type(module))
    if kind is None:
        raise ValueError(
            f"`loss={module!r}`: natgrad knows {', '.join(k.__name__ for k in kinds)}. For another loss pass a "
            "`natgrad.likelihoods.Likelihood` with the same curvature."
        )
    for option, neutral in (("weight", None), ("pos_weight", None), ("label_smoothing", 0.0), ("ignore_index", -100)):
        value = getattr(module, option, neutral)
        if value is not None and value != neutral:
            raise ValueError(f"`loss={module!r}`: the option {option!r} is not supported; leave it at {neutral!r}.")
    if module.reduction == "none":
        raise ValueError(f"`loss={module!r}`: reduce with 'mean' or 'sum', so that the scale of the loss is known.")
    return kind(reduction=module.reduction)
