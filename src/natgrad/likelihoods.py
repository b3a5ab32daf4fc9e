"""Stage 1: the loss as a likelihood, which tells what to backpropagate to obtain its curvature.

A loss is ``R · Σ c``: a criterion ``c`` summed over the data and scaled by the reduction. Each criterion is a negative
log likelihood up to a constant, so its Hessian at the model's output is also its Fisher matrix there:

============ ========================= ============== ==================================
likelihood   criterion c               Hessian ∇²c    R for mean / sum / batchmean
============ ========================= ============== ==================================
Gaussian     ½ ‖f − y‖²                I              2/numel, 2, 1/N  (torch's MSE has no ½)
Categorical  −log softmax(f)[y]        diag p − p pᵀ  1/(N·T), 1, 1/N
Bernoulli    BCE with logits           diag p(1 − p)  1/numel, 1, 1/N
Poisson      rate − y log rate         diag rate      1/numel, 1, 1/N  (of the logarithm of the rate)
============ ========================= ============== ==================================

A likelihood gives three things, all shaped like the output: draws of ∇c at a target sampled from the model (their
second moment is ∇²c: the Monte Carlo Fisher), the columns of a square root of ∇²c, and products with ∇²c. The
surprising convention: ``columns`` yields one vector per output *entry*, C·T of them for T positions, because positions
that interact inside the network would mix if their vectors were switched on together.

∇²c vanishes where p is zero or one, though N criteria cannot tell that. ``smoothed`` is the same loss with ∇²c at
p̃ = (N p + 1/K) / (N + 1) for K classes. Where damping and steps are automatic, Fisher matrix and quadratic model are
those of it.

Sources: Martens (2020), "New insights and perspectives on the natural gradient method", sections 6, 9; Martens and
Grosse (2015), arXiv:1503.05671, section 2; Krichevsky and Trofimov (1981), DOI 10.1109/TIT.1981.1056331, for p̃ with
K = 2.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from natgrad import criterion
from natgrad.criterion import Likelihood, Reduction
from natgrad.heteroscedastic import MeanVariance, Poisson

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "LogCategorical",
    "MeanVariance",
    "Poisson",
    "Reduction",
]
# Sums of a gradient over its classes are zero up to rounding of half precision; over anything else they are not.
# Relative to sums of absolute values.
SAME, DIFFERENT = 0.02, 0.1


class Gaussian(criterion.Elementwise):
    """Squared error. ``"mean"`` and ``"sum"`` are torch's ``MSELoss``; ``"batchmean"`` is Σ ½ (f − y)² / N.

    Args:
        reduction: As for every likelihood.
        half: Whether the loss has the ½ of the criterion; by default, for ``"batchmean"`` only.
    """

    of_residuals = True

    def __init__(self, reduction: Reduction = "mean", half: bool | None = None) -> None:
        super().__init__(reduction)
        self.half = reduction == "batchmean" if half is None else half

    @property
    def weight(self) -> float:
        """Two for ``MSELoss``, which has no half."""
        return 1.0 if self.half else 2.0

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal: f − y with y drawn from N(f, I)."""
        return torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)

    def diagonal(self, output: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(output)

    def hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        """The vector itself, since ∇²c = I."""
        return vector


class Bernoulli(criterion.Smoothable, criterion.Elementwise):
    """Binary cross-entropy of logits, as torch's ``BCEWithLogitsLoss``."""

    of_residuals = True

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """p − y with y drawn from Bernoulli(p)."""
        p = self._probabilities(output)
        # What is not a number must reach the statistics, so that the step is skipped, and not `bernoulli`.
        return p - torch.bernoulli(p.nan_to_num(nan=0.0), generator=generator)

    def diagonal(self, output: Tensor) -> Tensor:
        """p(1 − p)."""
        p = self._probabilities(output)
        return p * (1 - p)

    def _probabilities(self, output: Tensor) -> Tensor:
        p = torch.sigmoid(output)
        return (1 - self._share) * p + self._share / 2 if self._share else p

    def gradient_change(self, output: Tensor, moved: Tensor) -> Tensor:
        """p′ − p."""
        return moved.sigmoid() - output.sigmoid()

    def reach(self, output: Tensor, gradient: Tensor) -> Tensor:
        """p down to a target of 0, 1 − p up to 1."""
        return torch.where(gradient > 0, output, -output).sigmoid()

    def divergence(self, output: Tensor, moved: Tensor) -> Tensor:
        """softplus(f′) − softplus(f) − p (f′ − f)."""
        return functional.softplus(moved) - functional.softplus(output) - output.sigmoid() * (moved - output)


# No model has such a logit for a class, unless it is one that cannot be.
RULED_OUT = -1e8
# Two values of a weight that differ by less are the same, rounded.
ALIKE = 1e-3


class Categorical(criterion.Smoothable):
    """Cross-entropy of logits of shape (N, C) or (N, C, T…), as torch's ``CrossEntropyLoss``."""

    of_logits = of_residuals = True

    def check(self, output: Tensor) -> None:
        """Refuse outputs without at least two classes in dimension 1."""
        super().check(output)
        if output.ndim < 2 or output.shape[1] < 2:
            raise ValueError(
                f"{self!r} needs logits of shape (N, classes, …) with at least two classes, not "
                f'{tuple(output.shape)}. For one logit per datum use loss="bce_with_logits"; to rearrange the output '
                "as the loss sees it pass `output=`, for instance `output=lambda out: out.transpose(1, 2)`."
            )

    def as_called(self, output: Tensor, gradient: Tensor) -> Likelihood:
        """That of ``nll_loss``, where it was called with the log-probabilities that the model returns."""
        if not gradient.numel() or (gradient > 0).any() or (gradient != 0).sum(1).amax() != 1:
            return self
        if output.logsumexp(1).abs().amax() >= ALIKE:
            return self
        called = LogCategorical(self.reduction)
        called._share = self._share
        return called

    def check_gradient(self, gradient: Tensor) -> None:
        """Refuse gradients that sum to zero over another dimension than that of the classes, and tell of others."""
        if not gradient.numel():
            return
        sizes = [gradient.abs().sum(d).amax() for d in range(gradient.ndim)]
        sums = [float(gradient.sum(d).abs().amax() / size) for d, size in enumerate(sizes)]
        classes = min(range(2, gradient.ndim), key=lambda d: sums[d], default=1)
        if sums[1] > DIFFERENT and sums[classes] < SAME:
            raise ValueError(
                f"{self!r} has its classes in dimension 1 of the output, of shape {tuple(gradient.shape)}, and the "
                f"loss that was called has them in dimension {classes}. Tell natgrad how the loss sees the output: "
                f"`output=lambda out: out.movedim({classes}, 1)`."
            )
        if sums[1] > DIFFERENT and self.of_logits:
            warnings.warn(
                f"natgrad: the gradient that arrived at the output is not that of {self!r}, whose entries sum to zero "
                "over the classes. Declare the loss that the loop calls, or natgrad's steps will be far off.",
                RuntimeWarning,
                stacklevel=2,
            )

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """p − onehot(y) with y drawn from the categorical distribution p."""
        p = self._probabilities(output)
        rows = p.movedim(1, -1).reshape(-1, p.shape[1])
        # What is not a number must reach the statistics, so that the step is skipped, and not `multinomial`.
        drawn = torch.multinomial(rows.nan_to_num(nan=1.0), 1, generator=generator)
        onehot = torch.zeros_like(rows).scatter_(1, drawn, 1.0)
        return p - onehot.reshape(p.movedim(1, -1).shape).movedim(-1, 1)

    def columns(self, output: Tensor) -> Iterator[Tensor]:
        """√p_k (e_k − p) for class k, at one position of every datum at a time."""
        p = self._probabilities(output).reshape(*output.shape[:2], -1)  # (N, C, T)
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
        p = self._probabilities(output)
        pv = p * vector
        return pv - p * pv.sum(dim=1, keepdim=True)

    def gradient_change(self, output: Tensor, moved: Tensor) -> Tensor:
        """p′ − p."""
        return moved.softmax(dim=1) - output.softmax(dim=1)

    def reach(self, output: Tensor, gradient: Tensor) -> Tensor:
        """p down to a target of 0, 1 − p up to 1."""
        p = output.softmax(dim=1)
        return torch.where(gradient > 0, p, 1 - p)

    def counted(self, output: Tensor, gradient: Tensor) -> Tensor:
        """Position by position."""
        return (gradient.abs().amax(dim=1, keepdim=True) != 0).to(gradient.dtype)

    def shares(self, output: Tensor, gradient: Tensor) -> Tensor | None:
        """With the weights that the loop multiplies by; where all targets are labels, g = w (p − e_k) shows them."""
        counted = super().shares(output, gradient)
        weights = _weights_of_labels(output, gradient)
        if weights is None:
            return counted
        return weights if counted is None else weights * counted

    def divergence(self, output: Tensor, moved: Tensor) -> Tensor:
        """Σ_k p_k (log p_k − log p′_k); of a class that is ruled out, nothing."""
        log_p, log_moved = output.log_softmax(dim=1), moved.log_softmax(dim=1)
        p = log_p.exp()
        return torch.where(p > 0, p * (log_p - log_moved), 0.0).sum(dim=1, keepdim=True)

    def criteria(self, output: Tensor) -> int:
        """One per datum and position."""
        return output.numel() // output.shape[1]

    def _probabilities(self, output: Tensor) -> Tensor:
        p = torch.softmax(output, dim=1)
        if not self._share:
            return p
        possible = (output > RULED_OUT).to(p.dtype)  # of other classes there is no observation to come
        return (1 - self._share) * p + self._share / possible.sum(dim=1, keepdim=True) * possible


def _weights_of_labels(output: Tensor, gradient: Tensor) -> Tensor | None:
    """Over their median, of each criterion; None where they are all alike, or where targets are no labels.

    Of two classes a gradient is that of some label whatever the target is: weights are believed if they are those of
    the classes.
    """
    p, is_label = output.softmax(dim=1), gradient < 0
    least, missing = gradient.amin(dim=1, keepdim=True), 1 - (p * is_label).sum(dim=1, keepdim=True)
    # Where a label is met to many digits, these tell no weight.
    clear = (least < 0) & (missing > 0.01)
    weights = (-least / missing)[clear]
    if _are_alike(weights):
        return None
    if output.shape[1] == 2:
        if not all(_are_alike(weights[is_label[:, k : k + 1][clear]]) for k in (0, 1)):
            return None
    else:
        most, other = gradient.max(dim=1, keepdim=True)
        if not torch.allclose(weights, (most / p.gather(1, other))[clear], rtol=ALIKE, atol=0.0):
            return None
    return torch.ones_like(missing).masked_scatter_(clear, weights / weights.median())


def _are_alike(weights: Tensor) -> bool:
    if not weights.numel():
        return True
    least, most = torch.stack(torch.aminmax(weights)).tolist()
    return bool(most - least <= ALIKE * most)


class LogCategorical(Categorical):
    """Negative log likelihood of log-probabilities, as torch's ``NLLLoss`` after ``log_softmax``.

    In its input the loss is linear, so the curvature meant is the Fisher matrix, which is that of the cross-entropy:
    log-probabilities are logits like any others, as a constant that is added to all of them makes no difference.
    """

    of_logits, of_labels, of_residuals = False, True, False

    def check_gradient(self, gradient: Tensor) -> None:
        """Tell of entries above zero, too: to every target the loss is minus one of its inputs."""
        super().check_gradient(gradient)
        if (gradient > 0).any():
            warnings.warn(
                f"natgrad: the gradient that arrived at the output is not that of {self!r}, of which no entry is above "
                'zero. Declare the loss that the loop calls, or steps will be poor; a CTC loss as "cross_entropy".',
                RuntimeWarning,
                stacklevel=2,
            )

    def gradient_change(self, output: Tensor, moved: Tensor) -> Tensor:
        """Zero: in log-probabilities the loss is linear."""
        return torch.zeros_like(output)

    def steepening(self, output: Tensor, moved: Tensor) -> Tensor:
        """That of the cross-entropy, which the network bends."""
        return super().gradient_change(output, moved) * (moved - output)

    def reach(self, output: Tensor, gradient: Tensor) -> Tensor:
        """One, up to a target of 1."""
        return torch.where(gradient < 0, torch.ones_like(output), torch.inf)

    def divergence(self, output: Tensor, moved: Tensor) -> Tensor:
        """Zero, for the same reason."""
        return torch.zeros_like(output)
