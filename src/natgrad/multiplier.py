"""By what number the training loop multiplies the loss that it declared.

A loop may differentiate s L where it declared L: ``(1e3 * loss).backward()``, a sum where a mean was meant, one loss
among several. Its gradients are s times those of L, and with the curvature of L its steps would be s times too long. A
gradient scaler multiplies by S as well, and takes that out of the gradients of the parameters, but not out of the one
at the output, g_f, which natgrad sees. Three things tell S s:

- the loss module that natgrad was given: it is the gradient that arrives at the module's value;
- the targets, where they are bounded: g_f = S s R (μ(f) − y), so with ``reach`` the largest |μ − y| that a target
  allows, no entry of |g_f| / (R reach) exceeds S s, and where y is at its bound (a label) the entry equals it;
- the previous step, elsewhere (squared error): along a step v, seen at its start and at its end on fresh data,

      s = (g_f(θ) · h − g_f(θ − v) · h) / Σ 2 R KL,    h = f(θ) − f(θ − v)

  holds whatever the network does in between. The first slope was seen by the step's own batch alone, of which the share
  of noise is taken off. A step s ≫ 1 times too long is taken back, once it is seen to be. An s that was seen to be
  right is given up only for what the batch's data, as they differ, do not explain by chance.

S alone (:mod:`natgrad.scaler`) takes a pass of the model, and is looked at where S s has changed by much, and now and
then.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad import scaler as scalers
from natgrad.distributed import Ranks
from natgrad.fingerprint import fingerprint
from natgrad.forward import Forward
from natgrad.likelihoods import Likelihood
from natgrad.local_model import Change, LocalModel
from natgrad.memory import Kept, State
from natgrad.quadratic import HALVINGS
from natgrad.scaler import NOISE
from natgrad.targets import at_least
from natgrad.trust import Trust
from natgrad.undeclared import Undeclared

# A multiplier this close to one is one: its step is as good, and the arithmetic stays as without it.
CLOSE = 0.05
# Along a step, curvature on fresh data above this times the modelled one, or below its inverse, is no overfitting.
SUSPECT = 3.0
# A slope is another if it is so many standard errors away: of thousands of steps the most extreme are looked at.
CERTAIN = 6.0
# Where targets are unbounded, a squared gradient at the output that grew by this much makes the step a suspect.
GROWTH = 1.5
# So much smaller s becomes by one step at most: a short step shows noise rather than curvature.
SHRINK = 0.1
# No loss is multiplied by so much; a sum over millions of entries is, by a hundredth.
IMPLAUSIBLE = 2.0**30
# The slope along a step is the same at both of its ends if it changes by less than this share.
UNCHANGED = 0.2
# What is known of S is looked at again every so many steps.
EVERY = 16


class Multiplier(NamedTuple):
    """What multiplies the declared loss.

    Attributes:
        loss: s.
        scaler: S.
    """

    loss: float = 1.0
    scaler: float = 1.0


class Promise(NamedTuple):
    """What the previous step promised.

    Attributes:
        slope: Derivative of the loss along it.
        bend: By how much that rises.
        error: The squared gradient at the output before it; −1 without a previous step.
        is_trusted: Whether steps are.
    """

    slope: float = 0.0
    bend: float = 0.0
    error: float = -1.0
    is_trusted: float = 0.0


class Inputs(NamedTuple):
    """Of the previous pass.

    Attributes:
        fingerprint: By which they are told from others; NaN without a previous pass.
    """

    fingerprint: float = math.nan


class LossMultiplier:
    """What is known of s and S so far.

    Args:
        state: Of the first layer's first parameter, see :mod:`natgrad.memory`.
        local: The quadratic model of the current pass, made where it is needed; with ``more`` data if wanted.
        forward: The current pass.
        likelihood: Of the declared loss.
        terms: What the declared loss's reduction divides by.
        ranks: Of a data-parallel run.
        noise: Tells the share of noise in the gradient that the previous step was made of.

    Attributes:
        is_repeated: Whether the batch is that of the pass before, as far as its inputs tell.
    """

    is_repeated = False
    _multiplier, _promise, _inputs = Kept(Multiplier), Kept(Promise), Kept(Inputs)

    def __init__(
        self,
        state: State,
        local: Callable[..., LocalModel],
        forward: Forward,
        likelihood: Likelihood,
        terms: float,
        ranks: Ranks | None = None,
        noise: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.state, self._local, self.ranks, self._noise = state, local, ranks or Ranks(), noise
        self.forward, self.likelihood, self.terms = forward, likelihood, terms

    @cached_property
    def local(self) -> LocalModel:
        """The quadratic model of the user's loss, on the current pass."""
        if self.undeclared.is_found:
            return self.of_all()
        some = self._made(more=self.trust.more)
        # Outputs by other statistics than the loop's tell nothing of s; where one rank's are, as shards are gathered.
        return some if self._is_trusted or self.ranks.all(not some.has_other_statistics) else self.of_all()

    def of_all(self) -> LocalModel:
        """The same on all data of the pass."""
        return self._made(more=math.inf)

    @cached_property
    def trust(self) -> Trust:
        """How far steps are trusted."""
        return Trust(self.state)

    @cached_property
    def undeclared(self) -> Undeclared:
        """What of the user's loss was not declared."""
        return Undeclared(self.state)

    def _made(self, more: float) -> LocalModel:
        local = self._local(more=more, state=self.state)
        self._tell(local)
        return local

    def _tell(self, local: LocalModel) -> None:
        local.multiplier, local.scaler = self.loss, self.scaler

    @cached_property
    def bound(self) -> tuple[float, bool]:
        """What the pass tells of S s: a lower bound, and whether it is attained. The mean of the ranks' own."""
        bound, attained = at_least(self.forward, self.likelihood, self.terms)
        lower, exact, share = self.ranks.mean([bound, attained * bound, attained]).tolist()
        return (exact / share, True) if share > 0 else (lower, False)

    @property
    def loss(self) -> float:
        """s: what the loop multiplies the declared loss by."""
        return self._multiplier.loss

    @property
    def scaler(self) -> float:
        """S: what a gradient scaler multiplies by besides."""
        return self._multiplier.scaler

    @property
    def at_output(self) -> float:
        """S s of the current pass; as before, where that does not tell or a step has told better."""
        bound, attained = self.bound
        before = self.loss * self.scaler
        product = bound if attained else before if self._promise.is_trusted else max(bound, before)
        return product if abs(product - 1) > CLOSE else 1.0

    def update(self, gradients: dict[str, Tensor], evaluate: bool) -> None:
        """Learn s and S from the current pass, and whether its batch is that of the pass before.

        Args:
            gradients: Of the parameters, by name: the direction in which they are compared with the output's.
            evaluate: Whether the model is evaluated to choose the step. Then s is learnt at the first one, too, if the
                output's tell nothing, and batches are told apart.
        """
        product, before = self.at_output, self.loss * self.scaler
        told = self.bound[1] or product > before
        loss, scaler = self.loss, 1.0
        if product != 1 and self._is_steady(product / before):
            scaler = 1.0 if self.scaler == 1 else product / loss
        elif product != 1 or (evaluate and not (told or "multiplier" in self.state)):
            real = {name: g for name, g in gradients.items() if not g.is_complex()}
            scaler = scalers.told(scalers.compared(real, self.local), product / loss, NOISE if told else 1.0)
            if not told and scaler not in (1.0, self.scaler) and scaler < scalers.LARGE:
                # Of several passes the latest may well have another share in the gradients than its data have.
                alone = self.ranks.all(self.ranks.is_alone(self.forward.terms(self.likelihood), self.terms))
                scaler = scalers.unless_clipped(scalers.compared(real, self.of_all())) if alone else 1.0
        if told:
            loss = product / scaler
        self._set(loss if abs(loss - 1) > CLOSE else 1.0, scaler)
        if evaluate:
            seen = self._inputs.fingerprint
            self._inputs = Inputs(float(self.ranks.mean([fingerprint((self.forward.args, self.forward.kwargs))])))
            self.is_repeated = self._inputs.fingerprint == seen

    def in_doubt(self, finite: bool, back: Callable[[], Tensor]) -> bool:
        """Whether to look back at the previous step.

        That is where no output is finite after it, where the error grew, or where the loss rises at its end more than
        it promised to fall; and if it is the first, where only it can tell s.

        Args:
            finite: Whether everything of the current pass is.
            back: Computes the product of the previous step with the gradient at its end.
        """
        error = self._promise.error
        if error < 0:
            return False
        if not finite:
            return not self._finite_output
        if self.undeclared.is_found:  # of which outputs tell nothing
            return False
        if not self._is_trusted or self.error() > GROWTH * error:
            return True
        # On its own batch a step was tried before it was taken.
        is_evident = error < torch.finfo(torch.float32).max and not self.is_repeated
        return is_evident and float(self.ranks.mean(back())) > -self.promised

    def accepts(self, step: dict[str, Tensor]) -> bool:
        """Whether the previous step was not much too long, seen on fresh data; s is corrected where it may be wrong.

        A step too long is better undone even if the loss has fallen: it may leave the network where gradients vanish.

        Args:
            step: The previous one, by parameter name.
        """
        slope, bend, _, _ = self._promise
        if not self._finite_output:
            if not self.local.is_finite(_reversed(step)):
                return True
            self.reject()
            return False
        back = self._back(step)
        is_certain = self.bound[1] or not back.bend  # a loss that is linear in the output tells nothing of s
        # Trust by an earlier step may have been a mistake.
        if is_certain or (self._is_trusted and not self.trust.refutes(self.promised, -back.total)):
            return self._lets_stand(step, back)
        # By the slope that its own batch saw at its start: so much of that is noise, and was never there on other data.
        noise = 0.0 if self.is_repeated else self._noise()
        most, least = -back.slope - slope, -back.slope - (1 - noise) * slope
        tiny = torch.finfo(torch.float32).tiny
        low, high = least / max(bend, back.bend, tiny), most / max(min(bend, back.bend), tiny)
        factor, is_whole = 1.0, bend > abs(slope) / 2  # and not just cut short by the check
        if low > SUSPECT and least > abs(slope) and (is_whole or not self.bound[0]):
            # What was seen to be right is not given up for what may be chance, as of a batch with an outlier.
            excess = math.inf if self.is_repeated else least - SUSPECT * max(bend, back.bend)
            factor = 1.0 if self._is_trusted and excess < CERTAIN * self.local.spread(_reversed(step)) else low
        elif high < 1 / SUSPECT and is_whole:
            factor = max(high, SHRINK)
        stands = not self._is_trusted or (factor == 1 and self._lets_stand(step, back))
        self._set(self.loss * factor, self.scaler)
        self._promise = self._promise._replace(is_trusted=factor == 1 and bend > 0)
        return factor <= 1 and stands

    def _lets_stand(self, step: dict[str, Tensor], back: Change) -> bool:
        return self.trust.lets_stand(self.promised, self._rise(step, back, self.promised))

    def risen_by(self, step: dict[str, Tensor], promised: float) -> float:
        """By how much the previous step has raised the loss of this batch, as far as that is a matter of its length.

        A batch that was against the step from the start, as one with an event that is rare, has a gradient that is good
        at either end of it. It would be lost if the step were undone, and refutes no rate.

        Args:
            step: The previous one, by parameter name.
            promised: Change of the loss that it promised.
        """
        return self._rise(step, self._back(step), promised)

    def _rise(self, step: dict[str, Tensor], back: Change, promised: float) -> float:
        end, rise = -back.slope, -back.total
        if end > 0 and self.trust.refutes(promised, rise):
            steepening = self.local.steepening(_reversed(step))
            if 0 < steepening < UNCHANGED * end:
                return 0.0
        return rise

    def _is_steady(self, growth: float) -> bool:
        """Whether there is a gradient scaler as before, after S s was seen to become so many times larger.

        Where only steps tell s, a scaler shows in nothing else; but there was none.
        """
        is_seen = "multiplier" in self.state and (self.bound[1] or (self._is_trusted and self.scaler == 1))
        return is_seen and 1 / NOISE < growth < NOISE and float(self.state["step"]) % EVERY != 0

    @property
    def promised(self) -> float:
        """Change of the loss that the previous step promised; 0 without a previous step."""
        slope, bend, error, _ = self._promise
        return slope + bend / 2 if error >= 0 else 0.0

    def promise(self, slope: float, bend: float, evident: bool = True) -> None:
        """Remember what the loss is expected to do along the step that is taken.

        Args:
            slope: Its derivative at the start.
            bend: By how much that rises.
            evident: Whether that is more than the noise of the next batch, so that an error that grew tells something.
        """
        error = self.error() if evident else torch.finfo(torch.float32).max
        self._promise = Promise(slope, bend, error, self._promise.is_trusted)

    def confirm(self, change: float, promised: float) -> None:
        """Compare what the previous step promised with its change of the loss as the current batch sees it.

        A promise that was made with a wrong s is no evidence.
        """
        if self._is_trusted and promised < 0 and math.isfinite(change):
            self.trust.confirm(change / promised)

    def look_back(self, step: dict[str, Tensor], promised: float) -> None:
        """Let what the previous step did to the loss, on the very batch that it was made for, be what is confirmed.

        The quadratic model that looked back so far holds as little there as where it was made, if steps are long. What
        falls short for that is no noise; other draws of dropout are, and they are looked at.

        Args:
            step: The previous one, by parameter name.
            promised: Change of the loss that it promised.
        """
        if self.is_repeated and self._is_trusted and promised < 0:
            change = self.changed_by(step)
            if math.isfinite(change):
                self.trust.witness(change / promised)

    def changed_by(self, step: dict[str, Tensor]) -> float:
        """By how much the previous step, by parameter name, has changed the loss of this batch."""
        return -self._back(step).total

    def _back(self, step: dict[str, Tensor]) -> Change:
        return self.local.change(_reversed(step))

    def reject(self) -> None:
        """No step was short enough to lower the loss: if s was never seen to be right, it is too small.

        Or else the loss has terms that were not declared: where these are found, or s would be implausible, it is 1.
        """
        self.forget()
        if self._is_trusted:
            return
        larger = self.loss * 2.0**HALVINGS
        explains = not self.undeclared.is_found and larger < IMPLAUSIBLE
        self._set(larger if explains else 1.0, self.scaler)
        if larger >= IMPLAUSIBLE:  # and is not tried again
            self._promise = self._promise._replace(is_trusted=True)

    def forget(self) -> None:
        """There is no previous step to look back at."""
        self._promise = Promise(is_trusted=self._promise.is_trusted)

    @property
    def _is_trusted(self) -> bool:
        """Whether s was seen to be right."""
        return bool(self._promise.is_trusted) or self.bound[1]

    @cached_property
    def _finite_output(self) -> bool:
        return self.ranks.all(bool(self.forward.output.isfinite().all()))

    def error(self) -> float:
        """Mean squared gradient at the output, of the declared loss's criterion."""
        R = self.likelihood.scale(self.terms)
        return self._squared / (R * self.loss * self.scaler) ** 2

    @cached_property
    def _squared(self) -> float:
        """Mean square of the gradient at the output, which every rank is asked for but once a step."""
        assert self.forward.gradient is not None
        size = float(torch.linalg.vector_norm(self.forward.gradient))
        return float(self.ranks.mean([size**2 / self.forward.gradient.numel()]))

    def _set(self, loss: float, scaler: float) -> None:
        self._multiplier = Multiplier(loss, scaler)
        if "local" in self.__dict__:  # made before: what it has evaluated still holds
            self._tell(self.local)


def _reversed(step: dict[str, Tensor]) -> dict[str, Tensor]:
    """What takes a step back."""
    return {name: -s for name, s in step.items()}
