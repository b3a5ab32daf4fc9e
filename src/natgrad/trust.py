"""Stage 7, between its halves: how far the blocks of curvature can be trusted, as the steps show.

A step is made for one batch, by blocks that know neither each other nor other data. Three things tell how good that is:

- **What the next batch confirms**: of the fall of the loss that a step promised on its own batch, the share that the
  next one sees. It is all of it on a full batch and where targets are without noise, and next to nothing where a step
  has only learnt its batch by heart. A quadratic model sees it, looking back; where that sees little and the batch is
  the same one, the loss itself is asked.
- **Whether the next batch refutes a step**, its loss having risen by more than half of what the step promised to lower
  its own, by the model and in fact. A batch that shows few of thousands of classes cannot tell how far to go. Rates
  are cut until steps stand. What went far too far is undone (:mod:`natgrad.multiplier`).
- **The rate that the quadratic model chose.** It is one where the blocks are the curvature, and as much smaller as the
  curvature along their direction is larger than they say.

Where a fair rate was chosen and a fair share confirmed, less damping would have done, and is tried the next time; where
either is small there was too little. The dampings of averaged gradients, and of others, are eased apart. Where next to
nothing is confirmed, batches are mostly noise, and gradients are averaged over them (:mod:`natgrad.averaging`). Only
steps can tell: on linear networks and for smooth solutions of differential equations damping must fall to nothing,
while noisy minibatches need all that there is.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from natgrad.averaging import Pace
from natgrad.memory import Kept, State

# Of the running average of what is confirmed.
DECAY = 0.8
# Damping falls by the factor EASIER where rates were above FAIR_RATE and the confirmed share above FAIR_SHARE; it grows
# by HARDER where the one was below POOR_RATE or the other below POOR_SHARE. Between 1 and LEAST of what it would be.
FAIR_RATE, FAIR_SHARE, EASIER = 0.1, 0.2, 0.25
POOR_RATE, POOR_SHARE, HARDER = 0.03, 0.1, 2.0
# The same along averaged gradients, whose batches are others than those of the factors.
AVERAGED_EASIER, AVERAGED_HARDER = 0.7, 1.4
LEAST = 0.003
# No heavier λ_G is tried once it was refused so many times in a row.
PATIENCE = 3
# A step is refuted by a batch whose loss rose by more than REFUTED of what it promised to lower its own. Rates fall by
# BACK then, and recover by FORTH at every other; between 1 and SLOWEST. Where less than POOR_SHARE is confirmed, as at
# first, promises are mostly learnt by heart: less of them refutes, and rates recover slowly.
REFUTED, BACK, FORTH, SLOWEST = 0.5, 0.25, 2.0, 1e-4
NOISY_REFUTED, NOISY_FORTH = 0.2, 1.2
LEAST_RATE = 1e-6  # of a step that was not taken
# Gradients are averaged once less than LITTLE is confirmed, and until more than MUCH is; not at the first steps, which
# are too long to be foreseen.
LITTLE, MUCH, FIRST_STEPS = 0.5, 0.7, 8
# A step that had to be shortened on the model's data, where others confirm little, was misjudged for want of data: so
# many times more of them, and ever fewer then. Elsewhere it was the loss that is not quadratic so far. Where a
# network takes statistics of its batch, those of few data may be what is wrong.
MORE, MANY_MORE, FEWER = 2.0, 8.0, 0.95


class Evidence(NamedTuple):
    """What steps have shown.

    Attributes:
        confirmed: The running average of the confirmed share; −1 before any was.
        caution: What rates are multiplied by.
        more: How many times as many data as usual the quadratic model has.
    """

    confirmed: float = -1.0
    caution: float = 1.0
    more: float = 1.0


class Ease(NamedTuple):
    """How much damping was eased, and by what.

    Attributes:
        factor: What damping is multiplied by, unless gradients are averaged.
        share: The confirmed share when that was last set.
        logarithms: Sum of the logarithms of the rates since.
        rates: Their number.
        averaged: Whether gradients were averaged when it was set.
        averaged_factor: What damping is multiplied by if they are.
    """

    factor: float = 1.0
    share: float = 0.0
    logarithms: float = 0.0
    rates: float = 0.0
    averaged: float = 0.0
    averaged_factor: float = 1.0

    @property
    def current(self) -> float:
        """What damping is multiplied by."""
        return self.averaged_factor if self.averaged else self.factor

    def eased(self, share: float) -> float:
        """What it had better be multiplied by, as the rates since and the share that is confirmed now tell."""
        if not self.rates:
            return self.current
        rate = math.exp(self.logarithms / self.rates)
        easier, harder = (AVERAGED_EASIER, AVERAGED_HARDER) if self.averaged else (EASIER, HARDER)
        if rate > FAIR_RATE and share > FAIR_SHARE:
            return max(self.current * easier, LEAST)
        if rate < POOR_RATE or share < POOR_SHARE:
            return min(self.current * harder, 1.0)
        return self.current


class Stiffness(NamedTuple):
    """How heavy λ_G is, as was found by trying (:mod:`natgrad.stiffness`).

    Attributes:
        factor: What it is multiplied by, unless gradients are averaged.
        refused: How often in a row nothing heavier than what is derived was better.
    """

    factor: float = 1.0
    refused: float = 0.0


class Trust:
    """What the steps so far have shown.

    Args:
        state: Of the first layer's first parameter, see :mod:`natgrad.memory`.
    """

    _evidence, _ease, _stiffness = Kept(Evidence), Kept(Ease), Kept(Stiffness)

    def __init__(self, state: State) -> None:
        self.state = state

    @property
    def confirmed(self) -> float:
        """Share of the promised fall that later batches confirmed, between 0 and 1; 0 before any did."""
        return self._evidence.confirmed if self._is_known else 0.0

    @property
    def is_noisy(self) -> bool:
        """Whether next to nothing is confirmed, or nothing was looked at yet."""
        return self.confirmed < POOR_SHARE

    @property
    def averages(self) -> bool:
        """Whether gradients are to be averaged over batches."""
        if not self._is_known or float(self.state["step"]) < FIRST_STEPS:
            return False
        return self.confirmed < (MUCH if Pace(self.state).known else LITTLE)

    @property
    def more(self) -> float:
        """How many times as many data as usual the quadratic model needs."""
        return self._evidence.more

    def tried(self, halvings: int, had_all: bool, refused: bool = False) -> None:
        """Note how often a step was halved on the model's data.

        Args:
            halvings: Their number.
            had_all: Whether these data were all that there are.
            refused: Whether no part of the step lowered a loss whose batch statistics are of these data alone. Nothing
                is confirmed then, and the next step would be judged as this one was.
        """
        doubtful = refused or (self._is_known and self.confirmed < LITTLE)
        times = MANY_MORE if refused else MORE
        more = self.more * times if halvings and doubtful and not had_all else max(1.0, self.more * FEWER)
        self._evidence = self._evidence._replace(more=more)

    @property
    def ease(self) -> float:
        """What damping is multiplied by."""
        return self._ease.current

    @property
    def settled_share(self) -> float:
        """The confirmed share that the inverses were made with, which is not the latest in a checkpoint."""
        return self._ease.share

    @property
    def settled_average(self) -> bool:
        """Whether gradients were averaged when the inverses were made."""
        return bool(self._ease.averaged)

    @property
    def stiffening(self) -> float:
        """What λ_G is multiplied by."""
        return self._stiffness.factor

    @property
    def is_stiffness_open(self) -> bool:
        """Whether a heavier λ_G may still be better."""
        return self._stiffness.refused < PATIENCE

    def found(self, stiffening: float, is_refusal: bool) -> None:
        """Note what was best, and whether nothing heavier than what is derived was."""
        self._stiffness = Stiffness(stiffening, self._stiffness.refused + 1 if is_refusal else 0.0)

    def confirm(self, share: float) -> None:
        """Fold in the share that the latest batch confirmed."""
        latest = min(max(share, 0.0), 1.0)
        before = self.confirmed if self._is_known else latest
        self._evidence = self._evidence._replace(confirmed=latest + DECAY * (before - latest))

    @property
    def caution(self) -> float:
        """What rates are multiplied by, as steps were too long for the next batch."""
        return self._evidence.caution

    def judge(self, promised: float, change: float, in_fact: Callable[[], float]) -> None:
        """Let ``caution`` follow how a step changed the loss of the next batch, if it promised a fall.

        Args:
            promised: Change of the loss that it promised.
            change: As the quadratic model sees it, looking back; of a long step that may be anything.
            in_fact: Evaluates it, where the model refutes the step.
        """
        if promised < 0:
            refuted = self.refutes(promised, change) and self.refutes(promised, in_fact())
            self._heed(BACK if refuted else NOISY_FORTH if self.is_noisy else FORTH)

    def refutes(self, promised: float, change: float) -> bool:
        """Whether the loss of the next batch rose by too much."""
        return change > -(NOISY_REFUTED if self.is_noisy else REFUTED) * promised > 0

    def lets_stand(self, promised: float, change: float) -> bool:
        """Whether a step is left as it was; those to come are more cautious where it is to be undone."""
        refuted = self.refutes(promised, change)
        if refuted:
            self._heed(BACK)
        return not refuted

    def _heed(self, factor: float) -> None:
        self._evidence = self._evidence._replace(caution=min(max(factor * self.caution, SLOWEST), 1.0))

    def witness(self, share: float) -> None:
        """Forget what was confirmed so far for this share, which is certain."""
        self._evidence = self._evidence._replace(confirmed=min(max(share, 0.0), 1.0))

    def chose(self, rate: float, averaged: bool) -> None:
        """Note the rate of a step, if the inverses are of its kind: along averaged gradients or not."""
        before = self._ease
        if averaged == bool(before.averaged):
            logarithms = before.logarithms + math.log(max(rate, LEAST_RATE))
            self._ease = before._replace(logarithms=logarithms, rates=before.rates + 1)

    def settle(self, averaged: bool) -> None:
        """Before inverses are refreshed: set the ease by the steps since it was last set, if there were any.

        Args:
            averaged: Whether gradients are averaged now.
        """
        before, share = self._ease, self.confirmed
        if not (before.rates or share):
            return
        eased = {"averaged_factor" if before.averaged else "factor": before.eased(share)}
        self._ease = before._replace(share=share, logarithms=0.0, rates=0.0, averaged=float(averaged), **eased)

    def told(self) -> dict[str, float]:
        """For diagnostics."""
        return {
            "confirmed": self.confirmed,
            "ease": self.ease,
            "stiffening": self.stiffening,
            "caution": self.caution,
        }

    @property
    def _is_known(self) -> bool:
        """Whether a step was looked back at."""
        return self._evidence.confirmed >= 0
