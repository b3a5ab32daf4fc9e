"""Stage 7, before a rate is chosen: whether the first steps want a heavier λ_G, found by trying.

λ_G is derived from the mean curvature of the network's outputs (:mod:`natgrad.damping`). That is no bound on how far
layers move whose own G is far below the mean, as those of recurrent units, embeddings and deep stacks often are: in the
first steps their weights become others altogether, and what follows trains all the worse. Nothing in the factors tells
such networks from those that want exactly these steps; the loss does. So wherever inverses are refreshed, the natural
gradient is computed with λ_G heavier as well, and lighter again where it is heavier than derived. That whose best step
lowers the quadratic model most is taken. Once nothing heavier was better several times in a row, nothing more is tried.

Gradients that are averaged over batches have a λ_G of their own.

Source: Martens and Grosse (2015), arXiv:1503.05671, section 6.6, who choose their γ in this way throughout.
"""

from typing import NamedTuple

from torch import Tensor

from natgrad.metric import Placed
from natgrad.multiplier import LossMultiplier
from natgrad.preconditioner import Preconditioner
from natgrad.quadratic import minimize
from natgrad.rates import Course, Direction

# λ_G becomes so many times heavier or lighter at once, and at most so many times as heavy as derived.
STEP, MOST = 10.0, 100.0
# By less than this share a trial is not better, but rounded otherwise: where G is a multiple of I, all go the same way.
BETTER = 1e-3


class Trial(NamedTuple):
    """A way to go.

    Attributes:
        stiffening: What λ_G was multiplied by.
        natural: The natural gradient.
        placed: The inverses that it was made with.
    """

    stiffening: float
    natural: Direction
    placed: Placed


def search(preconditioner: Preconditioner, multiplier: LossMultiplier, course: Course) -> None:
    """Let the course go along the natural gradient that is best, and the inverses that made it be in place.

    Args:
        preconditioner: Whose inverses have just been refreshed, or not.
        multiplier: Of this batch.
        course: Along the natural gradient as it is.
    """
    trust, metric = multiplier.trust, preconditioner.metric
    # What was not declared bends the loss as well, by what is not known of other directions.
    if not (metric.renewed and trust.is_stiffness_open) or multiplier.undeclared.is_found:
        return
    states, before = preconditioner.states(), trust.stiffening
    trials = [Trial(before, course.natural, metric.placed(states))]
    try:
        for factor in (before * STEP, before / STEP):
            if 1 <= factor <= MOST:
                metric.stiffen(states, preconditioner.steps - 1, factor)
                there = preconditioner.directions()
                natural = {p: there[p].contiguous() for p in course.natural}
                trials.append(Trial(factor, natural, metric.placed(states)))
        falls, M = promised(multiplier, course, [trial.natural for trial in trials])
    except BaseException:  # also one that interrupts: no trial is left in place
        metric.place(states, trials[0].placed)
        raise
    number = max(range(len(trials)), key=falls.__getitem__)
    number = number if falls[number] > (1 + BETTER) * falls[0] else 0
    best, along = trials[number], [number, *range(len(trials), len(M))]
    metric.place(states, best.placed)
    trust.found(best.stiffening, is_refusal=best.stiffening == before == 1)
    course.natural = best.natural
    if multiplier.loss == 1:  # it will be divided by that
        course.curvature = M[along][:, along]


def promised(multiplier: LossMultiplier, course: Course, naturals: list[Direction]) -> tuple[list[float], Tensor]:
    """By how much the quadratic model falls over the best step along each of them and the previous step; and its M."""
    b = multiplier.ranks.mean(course.slopes(*naturals))
    M = multiplier.local.curvature(course.directions(*naturals), is_first=not course.previous)
    return [_fall(M, b, [i, *range(len(naturals), len(b))]) for i in range(len(naturals))], M


def _fall(M: Tensor, b: Tensor, along: list[int]) -> float:
    """Of bᵀc + ½ cᵀMc along some directions, the first of which is no way back; 0 where that is not finite."""
    M, b = M[along][:, along], b[along]
    if not (M.isfinite().all() and b.isfinite().all()):
        return 0.0
    c = minimize(M, b, [None] * len(b))
    return -float(b @ c) / 2 if c[0] > 0 else 0.0
