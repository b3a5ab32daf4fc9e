"""Stage 7, second half: the step that follows from what the loss does along a few directions.

Minimizing the quadratic model bᵀc + ½ cᵀMc (:mod:`natgrad.local_model`) over c gives rate and momentum at once: d₁ is
the natural gradient, d₂ the previous step. A step whose loss falls by too little in fact is halved.

Source: Martens and Grosse (2015), arXiv:1503.05671, sections 6.4 and 7.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.local_model import Change, LocalModel

# A step is taken when the loss falls by this share of what the model predicts, and else halved up to so many times.
SUFFICIENT, HALVINGS = 0.1, 8


@dataclass(frozen=True)
class Rest:
    """Of the loss that the loop differentiates, what was not declared, along k directions.

    Attributes:
        slopes: (k,).
        squares: Products of the directions, (k, k).
        bend: Its curvature per squared length.
        reach: How long a step may be.
    """

    slopes: Tensor
    squares: Tensor
    bend: float
    reach: float

    @property
    def curvature(self) -> Tensor:
        """(k, k)."""
        return self.bend * self.squares

    def within(self, c: Tensor) -> Tensor:
        """Coefficients, as much smaller as their step is too long."""
        wanted = float(c @ self.squares @ c) ** 0.5
        return c * min(1.0, self.reach / wanted) if wanted > 0 else c

    def change(self, c: Tensor) -> float:
        """By a step of these coefficients."""
        return float(self.slopes @ c + c @ self.curvature @ c / 2)


def choose(
    local: LocalModel,
    directions: Sequence[dict[str, Tensor]],
    b: Tensor,
    given: Sequence[float | None],
    find_rest: Callable[[LocalModel, Sequence[dict[str, Tensor]], Tensor], Rest | None],
    judge: Callable[[float], float],
    M: Tensor | None = None,
) -> tuple[Tensor, Change, dict[str, float]]:
    """Coefficients of the directions that lower the loss, by the model and then in fact.

    Args:
        local: The loss near the current parameters.
        directions: The natural gradient downhill and, perhaps, the previous step, by parameter name; that one is the
            last, if there are more.
        b: Products of the loss's gradient with the directions.
        given: Coefficients that the user chose; None for those that are free.
        find_rest: What of the loss was not declared, once the curvature of what was is known.
        judge: From the change of the loss by the previous step, 0 if there was none, to what a free coefficient of the
            natural gradient is multiplied by.
        M: Curvature of the loss along the directions, if ``local`` was just asked for it.

    Returns:
        The coefficients; what the latest step that was tried would do, by ``local``; and diagnostics. All coefficients
        are zero when even the shortest step does not lower the loss.
    """
    M = local.curvature(directions) if M is None else M
    rest = find_rest(local, directions, b)
    M = M if rest is None else M + rest.curvature
    c = minimize(M, b, given)
    if given[0] is None and c[0] < 0:  # noise: the natural gradient goes downhill
        c = minimize(M, b, [0.0, *given[1:]])
    caution = judge(looking_back(b, M) if len(b) > 1 else 0.0)
    if caution < 1 and given[0] is None:
        c = minimize(M, b, [caution * float(c[0]), *given[1:]])
    return shorten(local, directions, b, M, c if rest is None else rest.within(c), rest)


def shorten(
    local: LocalModel,
    directions: Sequence[dict[str, Tensor]],
    b: Tensor,
    M: Tensor,
    c: Tensor,
    rest: Rest | None = None,
) -> tuple[Tensor, Change, dict[str, float]]:
    """Coefficients halved until the step lowers the loss in fact.

    Args:
        local: The loss near the current parameters.
        directions: As for ``choose``.
        b: Slopes of the loss along them.
        M: Its curvature along them.
        c: The coefficients.
        rest: What of the loss ``local`` is not of.

    Returns:
        As ``choose``.
    """
    for halvings in range(HALVINGS + 1):
        step = combine(directions, c)
        kl = 0.5 * c @ M @ c
        change = local.change(step)
        predicted, actual = float(b @ c + kl), change.total + (0.0 if rest is None else rest.change(c))
        diagnostics = {
            "predicted_change": predicted,
            "actual_change": actual,
            "kl": float(kl),
            "halvings": float(halvings),
            **({"previous_change": looking_back(b, M)} if len(directions) > 1 else {}),
        }
        if actual + change.rounding <= SUFFICIENT * min(predicted, 0.0) or not c.any():
            return c, change, diagnostics
        c = c / 2
    return torch.zeros_like(c), change, diagnostics


def looking_back(b: Tensor, M: Tensor) -> float:
    """Change of the loss over the previous step, the last direction, by the model at its end."""
    return float(b[-1] - M[-1, -1] / 2)


def combine(directions: Sequence[dict[str, Tensor]], c: Tensor) -> dict[str, Tensor]:
    """Σ c_i d_i, by parameter name."""
    step = {name: float(c[0]) * d for name, d in directions[0].items()}
    for direction, coefficient in zip(directions[1:], c[1:], strict=True):
        for name, d in direction.items():
            step[name].add_(d, alpha=float(coefficient))
    return step


def minimize(M: Tensor, b: Tensor, fixed: Sequence[float | None]) -> Tensor:
    """The c that minimizes bᵀc + ½ cᵀMc, with some of its entries given.

    Args:
        M: (k, k), positive semi-definite up to rounding.
        b: (k,).
        fixed: Given entries of c; None where it is free.

    Returns:
        c, (k,). Directions in which the model has no curvature are not moved along.
    """
    c = torch.tensor([value or 0.0 for value in fixed], dtype=M.dtype)
    free = [i for i, value in enumerate(fixed) if value is None]
    if free:
        M_free, rest = M[free][:, free], b[free] + M[free] @ c
        # Scaled to a unit diagonal, so that a tiny previous step is not mistaken for a null direction.
        size = M_free.diagonal().clamp(min=0).sqrt()
        unit = torch.where(size > 0, 1 / size, 0.0)
        correlation = M_free * torch.outer(unit, unit)
        c[free] = -unit * (torch.linalg.pinv(correlation, rtol=1e-10, hermitian=True) @ (unit * rest))
    return c
