"""Stage 7 meets stage 8: how far to go along the natural gradient, and along the previous step.

Where rate and momentum are automatic there are two ways, and how much batches confirm of the steps before them chooses
(:mod:`natgrad.trust`):

- ``by_model``: the minimizer of the exact quadratic model along both directions, at every step
  (:mod:`natgrad.quadratic`);
- ``by_average``: where batches are mostly noise, along gradients that are averaged over them, the minimizer along the
  natural gradient alone, measured now and then (:mod:`natgrad.averaging`).

Either way a step is tried on the model's data before it is taken, unless it is like one that was, and what it promises
is remembered, so that the next batch can tell how much of it was true.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from natgrad import quadratic
from natgrad.averaging import Pace
from natgrad.clipping import Gradient, dot
from natgrad.multiplier import LossMultiplier

# So many steps in a row that did not lower the loss are told of, if they promised so much of the most that one did.
REFUSED, MEANT = 5, 1e-3

Direction = dict[nn.Parameter, Tensor]
Told = dict[str, float]


@dataclass
class Course:
    """Where a step may go.

    Attributes:
        names: Of all parameters of the model.
        natural: The natural gradient.
        previous: The previous step; empty if there was none.
        onward: What the rates of the groups leave of it, to be added to the next.
        gradient: Of the loss on this batch.
        times: What a chosen step is multiplied by before it is taken.
        looks: Whether to look for a reason where steps are refused; with a damping that was given, that may be it.
        curvature: M of the quadratic model along the directions, where that is known already.
    """

    names: Mapping[nn.Parameter, str]
    natural: Direction
    previous: Direction
    onward: Direction
    gradient: Gradient
    times: float
    looks: bool
    curvature: Tensor | None = None

    def directions(self, *naturals: Direction) -> list[dict[str, Tensor]]:
        """By parameter name: downhill along the natural gradient; onward, where rates are uneven; the previous step.

        Args:
            naturals: Natural gradients to go along in the place of the course's own.
        """
        downhill = [{self.names[p]: -d for p, d in natural.items()} for natural in naturals or (self.natural,)]
        onward = [self._named(self.onward)] if self.is_uneven else []
        return [*downhill, *onward, *([self.back] if self.previous else [])]

    def slopes(self, *naturals: Direction) -> Tensor:
        """Of the loss along the directions, on the CPU."""
        downhill = [-dot(natural, self.gradient) for natural in naturals or (self.natural,)]
        onward = [dot(self.onward, self.gradient)] if self.is_uneven else []
        back = [self.slope()] if self.previous else []
        return torch.stack([slope.cpu() for slope in (*downhill, *onward, *back)])

    @property
    def is_uneven(self) -> bool:
        """Whether what is left of the previous step is another direction."""
        return self.onward is not self.previous

    @property
    def back(self) -> dict[str, Tensor]:
        """The previous step, by parameter name."""
        return self._named(self.previous)

    def slope(self) -> Tensor:
        """Of the loss along the previous step, a scalar; 0 if there was none."""
        return dot(self.previous, self.gradient) if self.previous else torch.zeros(())

    def _named(self, direction: Direction) -> dict[str, Tensor]:
        return {self.names[p]: d for p, d in direction.items()}


@dataclass
class Refusals:
    """Steps that were not taken, as even a small part of them would not have lowered the loss.

    One such step is noise. Several are a loss other than that which natgrad was told of, or a network without
    curvature. Where everything is learnt they are rounding, and promise next to nothing, nor is there an error.

    Attributes:
        in_a_row: Number of the latest ones.
        most: The largest fall of the loss that a step promised.
        most_error: The largest squared gradient at the output.
        told: Whether that was told of.
    """

    in_a_row: int = 0
    most: float = 0.0
    most_error: float = 0.0
    told: bool = False

    def note(self, alpha: float, told: Told, error: float) -> None:
        """Look at a step that was tried, and warn once after several.

        Args:
            alpha: Its rate.
            told: Diagnostics of it.
            error: Mean squared gradient at the output.
        """
        if "halvings" not in told:
            return
        promised = -told["predicted_change"] * 2.0 ** told["halvings"]
        self.most, self.most_error = max(self.most, promised), max(self.most_error, error)
        is_meant = promised > MEANT * self.most if told["halvings"] else error > MEANT * self.most_error
        # What cannot be compared is no promise that was kept.
        self.in_a_row = self.in_a_row + 1 if not alpha and (is_meant or math.isnan(promised)) else 0
        if self.in_a_row == REFUSED and not self.told:
            self.told = True
            warnings.warn(
                f"natgrad: {REFUSED} steps in a row were not taken, as none lowers the loss that `loss` and `output` "
                "tell of. If the loop's is another, such as a sum over several outputs, declare that: a dictionary of "
                "losses by the keys of the outputs, or a `Likelihood` of your own. If it has a large penalty on the "
                "parameters, use `weight_decay` in its place, or numbers as `lr` and `momentum`. If it calls the model "
                "many times and hands something on, as a state, let one module do that and return all outputs. If the "
                "output is saturated, as by inputs that are not normalized, a huge bias or data that are not shuffled, "
                "there is no curvature to go by: normalize and shuffle them, and begin with smaller weights.",
                RuntimeWarning,
                stacklevel=2,
            )


def by_model(multiplier: LossMultiplier, course: Course, given: Sequence[float | None]) -> tuple[float, float, Told]:
    """α and μ by the exact quadratic model of this batch, and diagnostics.

    Args:
        multiplier: Of this batch.
        course: Where to go.
        given: α and μ where the user chose them, else None.
    """
    directions, promised, trust = course.directions(), multiplier.promised, multiplier.trust
    b, rest = multiplier.ranks.mean(course.slopes()), multiplier.undeclared
    free = given[0] is None and not given[1]  # with a given momentum a shorter step is none downhill
    is_witness = free and not multiplier.is_repeated
    given = [*given, 0.0] if course.is_uneven else given[: len(directions)]

    def judge(change: float) -> float:
        change = change if is_witness else promised  # what nothing refutes stands
        trust.judge(promised, change, lambda: multiplier.risen_by(course.back, promised))
        return trust.caution

    c, seen, told = quadratic.choose(multiplier.local, directions, b, given, rest.along, judge, course.curvature)
    slope, bend = (own + more for own, more in zip(seen[:2], rest.parts(c), strict=True))
    _look_back(multiplier, course, told, promised)
    multiplier.promise(course.times * slope, course.times**2 * bend)
    if not c.any() and told["halvings"]:
        if course.looks:
            rest.refused(multiplier.of_all, directions, b)
        multiplier.reject()
    else:
        rest.took(course.times * c)
    if given[0] is None:
        trust.chose(float(c[0]), averaged=False)
    told |= trust.told()
    return float(c[0]), float(c[1]) if course.previous else 0.0, told


def by_average(multiplier: LossMultiplier, course: Course, averaged: Gradient, renewed: bool) -> tuple[float, Told]:
    """α along the natural gradient of averaged gradients, and diagnostics; 0 where the average had better start anew.

    Args:
        multiplier: Of this batch.
        course: Where to go.
        averaged: What the natural gradient was made of.
        renewed: Whether the metric is new.
    """
    pace, trust = Pace(multiplier.state), multiplier.trust
    promised = pace.promised if pace.known else multiplier.promised
    slopes = [dot(course.natural, course.gradient), dot(course.natural, averaged), course.slope()]
    own, slope, back = multiplier.ranks.mean(torch.stack([one.cpu() for one in slopes])).tolist()
    error = multiplier.error()
    of_residuals = multiplier.likelihood.of_residuals and not multiplier.undeclared.is_found
    pace.note(error, back, of_residuals, trust.is_noisy)
    told: Told = {"shortening": pace.factor}
    multiplier.forget()
    if not (0 < own < math.inf and 0 < slope < math.inf):
        pace.rest()
        return 0.0, told
    along, due = Slopes(own, slope, back), pace.due(slope, renewed)
    kept = 1.0
    if due or pace.lags(back):
        kept, tried = _measured(multiplier, course, along, due, promised)
        # A batch that is asked for its slope is no witness of what others confirm.
        _look_back(multiplier, course, tried, promised if due else 0.0)
        told |= tried
    else:
        multiplier.undeclared.forget()
    told |= trust.told()
    if not kept:
        pace.rest()
        multiplier.reject()
        return 0.0, told
    alpha = kept * along.fresh * pace.rate * trust.caution
    trust.chose(alpha, averaged=True)
    step = course.times * alpha
    bend = step**2 * slope * pace.ratio
    pace.take(kept, -step * slope, -step * own + bend / 2)
    if pace.diverges(error):
        _tell_of_divergence()
    multiplier.promise(-step * slope, bend, evident=pace.is_young or pace.has_lost(error))
    return alpha, told


class Slopes(NamedTuple):
    """Of the loss.

    Attributes:
        own: Along the natural gradient, on this batch, uphill.
        averaged: The same by the average of gradients.
        back: Along the previous step.
    """

    own: float
    averaged: float
    back: float

    @property
    def fresh(self) -> float:
        """So much of the step along the average this batch agrees to."""
        return min(self.own / self.averaged, 1.0)


def _measured(
    multiplier: LossMultiplier, course: Course, slopes: Slopes, due: bool, promised: float
) -> tuple[float, Told]:
    """The share of a step that is kept when it is tried, once its rate has been measured, and diagnostics."""
    directions, rest = course.directions(), multiplier.undeclared
    pace, trust = Pace(multiplier.state), multiplier.trust
    M = multiplier.local.curvature(directions)
    total = torch.tensor([-slopes.own, slopes.back], dtype=M.dtype)[: len(directions)]
    more = rest.along(multiplier.local, directions, total)
    M = M if more is None else M + more.curvature
    if not M.isfinite().all():
        return 0.0, {}
    if len(total) > 1:
        trust.judge(promised, quadratic.looking_back(total, M), lambda: multiplier.risen_by(course.back, promised))
    pace.measure(slopes.averaged, float(M[0, 0]), due)
    b, c = torch.zeros(2, len(directions), dtype=torch.float64)
    b[0], b[1:], c[0] = -slopes.fresh * slopes.averaged, slopes.back, slopes.fresh * pace.rate * trust.caution
    within = c if more is None else more.within(c)
    tried, _, told = quadratic.shorten(multiplier.local, directions, b, M, within, more)
    kept = float(tried[0] / c[0])
    if kept:
        rest.took(course.times * tried)
    elif course.looks:
        rest.refused(multiplier.of_all, directions, total)
    return kept, told


def _look_back(multiplier: LossMultiplier, course: Course, told: Told, promised: float) -> None:
    """What trying a step has shown: of the previous one, and of how many data the model needs."""
    if "previous_change" in told:
        multiplier.confirm(told["previous_change"], promised)
        if multiplier.trust.averages:
            multiplier.look_back(course.back, promised)
    halvings = int(told.get("halvings", 0))
    had_all = bool(halvings) and multiplier.ranks.all(multiplier.local.has_all)
    refused = halvings == quadratic.HALVINGS and multiplier.ranks.all(multiplier.local.has_other_statistics)
    multiplier.trust.tried(halvings, had_all, refused)


@cache
def _tell_of_divergence() -> None:
    warnings.warn(
        "natgrad: the gradient at the model's output has become more than ten times as long as it was. If the loss has "
        "grown as well, and relates data, as one of distances between embeddings does: let a module return what a loss "
        "of single data sees, such as these distances as logits, and give natgrad that module. If it has changed, make "
        "a new optimizer. docs/troubleshooting.md has more.",
        RuntimeWarning,
        stacklevel=3,
    )
