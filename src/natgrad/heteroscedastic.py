"""Stage 1: likelihoods whose spread the output tells, counts of a rate and a Gaussian with a variance of its own.

Their targets need not enter linearly, so that what a step does to the loss depends on them; the gradient of the loss at
the output tells them.
"""

import torch
from torch import Tensor

from natgrad.criterion import Elementwise, Reduction, Smoothable

# A rate and a variance of zero count as these, which torch's losses have by default.
LEAST_RATE, LEAST_VARIANCE = 1e-8, 1e-6


class Poisson(Smoothable, Elementwise):
    """Poisson regression of counts, as torch's ``PoissonNLLLoss``.

    Args:
        reduction: As for every likelihood.
        log_input: Whether the output is the logarithm of the rate, or the rate.
    """

    def __init__(self, reduction: Reduction = "mean", log_input: bool = True) -> None:
        super().__init__(reduction)
        self.log_input = self.of_residuals = log_input

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """rate − y for the logarithm, 1 − y / rate for the rate, with y drawn from Poisson(rate)."""
        rate = self._expected(output)
        drawn = torch.poisson(rate.nan_to_num(nan=0.0).clamp(min=0), generator=generator)
        return rate - drawn if self.log_input else 1 - drawn / rate

    def reach(self, output: Tensor, gradient: Tensor) -> Tensor:
        """The rate, or 1, down to a count of 0."""
        return torch.where(gradient > 0, output.exp() if self.log_input else torch.ones_like(output), torch.inf)

    def divergence(self, output: Tensor, moved: Tensor) -> Tensor:
        """rate′ − rate − rate (log rate′ − log rate)."""
        before, after = (output, moved) if self.log_input else (self._rate(f).log() for f in (output, moved))
        return after.exp() - before.exp() * (1 + after - before)

    def remainder(self, output: Tensor, moved: Tensor, gradient: Tensor) -> Tensor:
        """For the rate y (rate′ / rate − 1 − log (rate′ / rate)), with y = rate (1 − ∇c)."""
        if self.log_input:
            return self.divergence(output, moved)
        rate = self._rate(output)
        ratio = self._rate(moved) / rate
        return rate * (1 - gradient) * (ratio - 1 - ratio.log())

    def gradient_change(self, output: Tensor, moved: Tensor) -> Tensor:
        """rate′ − rate for the logarithm; for the rate to first order, as it depends on the count."""
        return moved.exp() - output.exp() if self.log_input else super().gradient_change(output, moved)

    def diagonal(self, output: Tensor) -> Tensor:
        """The rate, or its inverse."""
        return self._expected(output) if self.log_input else self._rate(output).reciprocal()

    def _expected(self, output: Tensor) -> Tensor:
        """The rate; smoothed, for its logarithm, with the half of a count that N criteria cannot rule out."""
        rate = self._rate(output)
        return rate + self._share / 2 if self._share and self.log_input else rate

    def _rate(self, output: Tensor) -> Tensor:
        return output.exp() if self.log_input else _held(output, LEAST_RATE)


class MeanVariance(Elementwise):
    """Gaussian with a mean and a variance that the model predicts, as torch's ``GaussianNLLLoss``.

    The output is (N, 2, …): means, then variances.
    """

    def check(self, output: Tensor) -> None:
        """Refuse outputs without the two."""
        super().check(output)
        if output.ndim < 2 or output.shape[1] != 2:
            raise ValueError(
                f"{self!r} needs an output of shape (N, 2, …), means then variances, not "
                f"{tuple(output.shape)}: pass for instance `output=lambda out: torch.stack(out, dim=1)`."
            )

    def criteria(self, output: Tensor) -> int:
        """One per mean."""
        return output.numel() // 2

    def counted(self, output: Tensor, gradient: Tensor) -> Tensor:
        """Mean and variance together."""
        return (gradient != 0).any(dim=1, keepdim=True).to(gradient.dtype)

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """(mean − y) / variance and (1 − (mean − y)² / variance) / (2 variance) with y drawn from the Gaussian."""
        _, variance = _moments(output)
        noise = torch.randn(variance.shape, generator=generator, dtype=output.dtype, device=output.device)
        return torch.stack([noise / variance.sqrt(), (1 - noise.square()) / (2 * variance)], dim=1)

    def divergence(self, output: Tensor, moved: Tensor) -> Tensor:
        """½ (log s′/s + (s + (m − m′)²) / s′ − 1) for means m and variances s."""
        (m, s), (m_moved, s_moved) = _moments(output), _moments(moved)
        return ((s_moved / s).log() + (s + (m - m_moved).square()) / s_moved - 1).unsqueeze(1) / 2

    def remainder(self, output: Tensor, moved: Tensor, gradient: Tensor) -> Tensor:
        """With the residual r = variance · ∂c/∂mean in the place of its expectation."""
        (m, s), (m_moved, s_moved) = _moments(output), _moments(moved)
        r = gradient[:, 0] * s
        change = ((s_moved / s).log() + (r + m_moved - m).square() / s_moved - r.square() / s) / 2
        slope = r / s * (m_moved - m) + (1 - r.square() / s) / (2 * s) * (s_moved - s)
        return (change - slope).unsqueeze(1)

    def diagonal(self, output: Tensor) -> Tensor:
        """1 / variance, and 1 / (2 variance²)."""
        precision = _moments(output)[1].reciprocal()
        return torch.stack([precision, precision.square() / 2], dim=1)


def _moments(output: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances."""
    mean, variance = output.unbind(1)
    return mean, _held(variance, LEAST_VARIANCE)


def _held(values: Tensor, least: float) -> Tensor:
    """From zero on no less than that; what is below zero has no logarithm, and is to be seen to have none."""
    return torch.where((values >= 0) & (values < least), least, values)
