"""Stage 7, where batches are mostly noise: steps along gradients that are averaged over batches.

A step made for a single batch of noise is fitted to it, and so are rate and momentum: the next batch confirms a tenth
of what it promised (:mod:`natgrad.trust`). Then the gradient g gives way to a running average, looking ahead at the
batch at hand as Nesterov does, before the metric P is applied to it. It takes the place of momentum:

    ū ← β ū + (1 − β) g        u = β ū + (1 − β) g        θ ← θ − α Δ,    Δ = P⁻¹ u

The exact quadratic model of the loss still tells the rate, α = f · uᵀΔ / ΔᵀFΔ, where uᵀΔ has far less noise in it than
gᵀΔ. The inverse of this ratio, the *pace*, hardly changes from one average to the next. So it is measured only now and
then: when inverses are new, when Δ has become much longer in its own metric, when the loss goes on falling along the
latest step as fast as at its start and the rate may rise, and otherwise at every eighth step. Rates fall at once and
rise slowly: a batch that is learnt by heart shows next to no curvature. So they rise only in windows with progress, and
once in each.

Where gᵀΔ < uᵀΔ the average is out of date: the step is shortened as much, and where gᵀΔ < 0 the average starts anew.

The factor f is 1 until there is no more progress; noise then makes steps undo each other, and they become shorter, and
faster where later batches confirm next to nothing of what they promise.
Where the slope along a step is still mostly there when it has been taken, they become longer again. Progress is an
error of new batches that falls, the squared gradient at the output, or a loss that still falls where steps end: that
of absolute errors and moving targets does not show in the error. Both are looked at over windows that
grow with the number of steps, so that f cannot fall faster than a power of it. Where the error is no residual, as of
learnt variances, mixtures and likelihoods of a user's own, it tells nothing: there steps become shorter only where the
loss rises where they end, as it does where they swing about what they cannot reach.

Measured in ``docs/decisions.md``.
"""

import math
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natgrad.distributed import like, whole
from natgrad.factors import flush
from natgrad.layers import at_least_float32
from natgrad.memory import Kept, State

# β, of the running average.
DECAY = 0.9
# Steps between two measurements of the pace at most, as between two of the curvature; and how much longer Δ may become.
EVERY, LONGER = 16, 2.0
# A rate becomes no more times larger in a window, and no larger at all after one without progress; by ANEW more along
# an average that starts anew.
RISE, ANEW = 2.0, 100.0
# A window is this share of the steps before it, and no fewer than so many steps.
WINDOW, SHORTEST_WINDOW = 0.25, 8
# Error must fall by this share from one window to the next, or f by SHRINK, or by STEEP where next to nothing is
# confirmed; unless the loss still falls where steps end by FALLING standard deviations, or, where the error is no
# residual, does not rise by RISING. f grows where more than PERSISTENT of the slope persists on average.
GAIN, SHRINK, STEEP, FALLING, RISING, PERSISTENT = 0.002, 0.7, 0.5, 1.0, 2.0, 0.3
# Squared gradients at the output this many times what they were in the window before say that training diverges, if
# they are so in a row.
LOST, IN_A_ROW = 10.0, 4
# So often entries that are next to nothing are set to it: before the next time they do not become much less.
FLUSHED = 64
# No pace is below this, as where the outputs do not change.
TINY = 1e-6


def noise_left(share: float) -> float:
    """The share of noise in u, from that in the gradients of single batches, which are independent.

    The latest enters u by 1 − β², the one i steps before it by (1 − β) βⁱ⁺¹; the squares of these add up.
    """
    squares = (1 - DECAY**2) ** 2 + (1 - DECAY) ** 2 * DECAY**4 / (1 - DECAY**2)
    return squares * share / (squares * share + 1 - share)


class Averages:
    """The running averages of the gradients of some parameters.

    They start at zero, and so lack a factor at first: the rate makes up for it. They are there from the first step on,
    so that memory does not depend on what batches turn out to be.

    Args:
        state: Of each parameter; ``average`` is ū, of the same shape.
        parameters: Which.
    """

    def __init__(self, state: MutableMapping[Any, State], parameters: Sequence[nn.Parameter]) -> None:
        self.state, self.parameters = state, parameters

    def take(self, gradient: Callable[[nn.Parameter], Tensor | None]) -> dict[nn.Parameter, Tensor]:
        """Put the latest gradients in; u of every parameter that has one."""
        ahead, flushed = {}, float(self.state[self.parameters[0]].get("step", 0.0)) % FLUSHED == 0
        for parameter in self.parameters:
            latest = gradient(parameter)
            if latest is not None:
                latest = at_least_float32(latest)
                average = whole(self._average(parameter)).lerp_(latest, 1 - DECAY)
                if flushed:
                    flush(average)
                ahead[parameter] = torch.lerp(average, latest, 1 - DECAY)
                self.state[parameter]["average"] = like(average, parameter)
        return ahead

    def start_anew(self) -> None:
        """As if there had been no gradient yet."""
        for parameter in self.parameters:
            self._average(parameter).zero_()

    def rest(self) -> None:
        """Gradients are not averaged at this step; nor were they, or what is known is forgotten."""
        pace = Pace(self.state[self.parameters[0]])
        if pace.known:
            pace.forget()
            self.start_anew()
        for parameter in self.parameters:
            self._average(parameter)

    def _average(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "average" not in state:
            zero = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            state["average"] = zero.contiguous()
        average: Tensor = state["average"]
        return average


class Latest(NamedTuple):
    """What is known of the rate, and the latest step.

    Attributes:
        pace: The inverse of the rate for f = 1; 0 where no step was taken.
        age: The number of steps since measuring it was due.
        length: uᵀΔ at that time.
        slope: −α uᵀΔ of the latest step.
        promised: Change of the loss that this promised on its own batch.
    """

    pace: float = 1.0
    age: float = 0.0
    length: float = 0.0
    slope: float = 0.0
    promised: float = 0.0


class Progress(NamedTuple):
    """What the current window has shown.

    Attributes:
        steps: Their number so far.
        errors: Their sum.
        persisted: Sum of the slopes at the end of steps, each over that at its start.
        before: The mean error of the window before; 0 if there was none.
        factor: f.
        least: The least pace in the window.
        slopes: Sum of the slopes of the loss at the end of steps.
        squares: Sum of their squares.
        lost: Number of the latest batches in a row whose error was above LOST times that of the window before.
    """

    steps: float = 0.0
    errors: float = 0.0
    persisted: float = 0.0
    before: float = 0.0
    factor: float = 1.0
    least: float = 0.0
    slopes: float = 0.0
    squares: float = 0.0
    lost: float = 0.0

    def note(self, error: float, slope: float, expected: float) -> "Progress":
        """With a batch more.

        Args:
            error: Mean squared gradient at the output.
            slope: Of the loss along the latest step, at its end.
            expected: At its start; 0 if there was none.
        """
        persists = min(max(slope / expected, -1.0), 1.0) if expected else 0.0
        return self._replace(
            steps=self.steps + 1,
            errors=self.errors + error,
            persisted=self.persisted + persists,
            slopes=self.slopes + slope,
            squares=self.squares + slope**2,
            lost=self.lost + 1 if self.is_lost(error) else 0.0,
        )

    def is_lost(self, error: float) -> bool:
        """Whether an error is so much above that of the window before that no noise is that large."""
        return error > LOST * self.before > 0

    def next(self, pace: float, of_residuals: bool, noisy: bool) -> "Progress":
        """The window after this one, which is over; with the pace, and the rest as for ``Pace.note``."""
        error = self.errors / self.steps
        spread = math.sqrt(self.squares)
        if of_residuals:
            gains = not self.before or error <= (1 - GAIN) * self.before or self.slopes < -FALLING * spread
        else:
            gains = not self.before or self.slopes <= RISING * spread
        factor = self.factor
        if self.persisted > PERSISTENT * self.steps:
            factor = min(factor / SHRINK, 1.0)
        elif not gains:
            factor *= STEEP if noisy else SHRINK
        # A rate that fell by more goes back to what it was without having to rise again, window by window.
        least = min(pace / RISE if gains else pace, RISE * self.least or math.inf)
        return Progress(before=error, factor=factor, least=least or self.least)  # while no step is taken


class Pace:
    """What is known of the rate along averaged gradients.

    Args:
        state: Of the first layer's first parameter, see :mod:`natgrad.memory`.
    """

    _latest, _progress = Kept(Latest), Kept(Progress)

    def __init__(self, state: State) -> None:
        self.state = state

    @property
    def rate(self) -> float:
        """α, of an average that is not out of date."""
        return self.factor / self._latest.pace

    @property
    def factor(self) -> float:
        """f."""
        return self._progress.factor

    @property
    def known(self) -> bool:
        """Whether there was a step along averaged gradients."""
        return "latest" in self.state

    @property
    def is_young(self) -> bool:
        """Whether the first window is not over. The average is of few batches then, and its steps may be refuted."""
        return not self._progress.before

    def has_lost(self, error: float) -> bool:
        """Whether the error is so much above what it was that no noise is that large, and steps may be refuted."""
        return self._progress.is_lost(error)

    def diverges(self, error: float) -> bool:
        """Whether it is above even that by as much again, and lost several times in a row; outliers are not."""
        return self._progress.lost >= IN_A_ROW and error > LOST**2 * self._progress.before > 0

    @property
    def ratio(self) -> float:
        """ΔᵀFΔ / uᵀΔ."""
        return self._latest.pace

    @property
    def promised(self) -> float:
        """Change of the loss that the latest step promised on its own batch; 0 if there was none."""
        return self._latest.promised

    def due(self, slope: float, renewed: bool) -> bool:
        """Whether to measure.

        Args:
            slope: uᵀΔ.
            renewed: Whether the metric is new.
        """
        old = self._latest.age + 1 >= EVERY
        return not self.known or renewed or old or slope > LONGER**2 * self._latest.length

    def lags(self, slope: float) -> bool:
        """Whether the loss goes on falling as fast as before the latest step, though the rate could be larger.

        Args:
            slope: Of the loss along the latest step, at its end.
        """
        return slope < self._latest.slope and self._latest.pace > self._progress.least

    def measure(self, slope: float, curvature: float, due: bool = True) -> None:
        """Set the pace by uᵀΔ and ΔᵀFΔ, at a time when that was due or at another."""
        latest = max(curvature, TINY * slope) / slope
        if before := self._latest.pace if self.known else 0.0:
            latest = max(latest, math.sqrt(latest * before), self._progress.least)
        else:
            latest = max(latest, self._progress.least / ANEW)
            self._progress = self._progress._replace(least=latest / RISE)
        # Due: one step before the present one.
        age = -1.0 if due else self._latest.age
        self._latest = self._latest._replace(pace=latest, age=age, length=slope)

    def take(self, share: float, slope: float, promised: float) -> None:
        """Remember the step that is taken.

        Args:
            share: Of the step that ``rate`` meant, if the loss asked for a shorter one.
            slope: Of the loss along it, by the averaged gradient.
            promised: Change of the loss on its own batch.
        """
        before = self._latest
        self._latest = Latest(before.pace / share, before.age + 1, before.length, slope, promised)

    def rest(self) -> None:
        """Remember that no step is taken, and measure anew for the next, whose average starts anew."""
        if self.known:
            self._latest = Latest(pace=0.0)

    def note(self, error: float, slope: float, of_residuals: bool, noisy: bool) -> None:
        """Follow the progress, once for each batch.

        Args:
            error: Mean squared gradient at the output.
            slope: Of the loss along the latest step, by the gradient of this batch.
            of_residuals: Whether the error is one of squared residuals, which fall with the loss.
            noisy: Whether batches confirm next to nothing of what steps promise.
        """
        latest = self._progress.note(error, slope, self._latest.slope)
        is_over = latest.steps >= max(SHORTEST_WINDOW, WINDOW * (float(self.state["step"]) - latest.steps))
        if is_over and not 0 < latest.lost <= IN_A_ROW:  # it will be seen whether these are outliers
            latest = latest.next(self._latest.pace, of_residuals, noisy)
        self._progress = latest

    def forget(self) -> None:
        """Gradients are not averaged any more."""
        for name in ("latest", "progress"):
            self.state.pop(name, None)
