"""Stage 7, second half: what the loss does along a few directions, and over a step.

Along directions V = [d₁ d₂ …] the loss is modelled as L(θ + Vc) ≈ L + bᵀc + ½ cᵀMc with b = Vᵀg and M = VᵀFV, where F
is the Gauss-Newton matrix of the *whole* network, not its Kronecker approximation:

    M_ij = R Σ_n (J_n d_i)ᵀ ∇²c (J_n d_j)

so two Jacobian-vector products, on some of the batch, are all it takes (:mod:`natgrad.derivatives`); nothing is
backpropagated.

In these sums a few data may outweigh all others: the direction is made for those that are not learnt yet, and changes
their outputs most. So half of the chosen data are those of the longest gradients at the output; the other half stand
for the rest.

The model holds near θ only. What a step s does in fact is seen by a forward pass before and after it, without the
targets: with f and f′ the outputs, and g_f the gradient that the user's loss sent to f,

    L(θ + s) − L(θ) = g_f · (f′ − f) + R Σ KL(f ‖ f′)

because in nearly every loss the targets enter linearly; in the others g_f tells them. Dropout or batch statistics may
make f another than the user's f₀; then g_f is the user's gradient plus R (∇c(f) − ∇c(f₀)).

Source: Martens and Grosse (2015), arXiv:1503.05671, sections 6.4 and 7.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natgrad.calls import shuffled
from natgrad.derivatives import (
    Agreement,
    ForwardMode,
    Jumps,
    Outputs,
    along,
    directional_derivative,
    length,
    pulled_back,
    without_graph,
)
from natgrad.distributed import Ranks, is_sharded, whole
from natgrad.forward import Forward
from natgrad.layers import at_least_float32, uses_batch_statistics
from natgrad.likelihoods import Likelihood
from natgrad.losses import Weights
from natgrad.memory import State
from natgrad.outputs import Selection, rearrangement
from natgrad.rerun import REFUSALS, in_modes, rerun, stratified, subsample, wants_gradients, widened

# The model is evaluated on this share of a batch, but on no fewer data if the batch has them.
SHARE, MIN_DATA = 1 / 40, 128
# Outputs further from those of the whole pass, relative to their size, are another's: half precision is closer.
APART = 0.1
# The loop's own pass is repeated by natgrad's if outputs differ by no more than rounding, relative to their size.
REPEATED = 1e-6
# Sums of terms that nearly cancel are off by so many times the rounding of the terms at most.
ROUNDING = 16.0


class Change(NamedTuple):
    """By how much a step changes the loss.

    Attributes:
        slope: The part by the gradient at the output.
        bend: Twice the rest, what the output's curvature adds.
        rounding: How far the sum may be off, by the rounding of outputs and sums in single precision.
    """

    slope: float
    bend: float
    rounding: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.slope + self.bend / 2


class LocalModel:
    """The loss near the current parameters, from some of one forward pass's data.

    Args:
        model: The module; its buffers and the random stream stay as they are.
        likelihood: Of the loss.
        select: From the model's return value to the tensor that the loss sees.
        forward: A forward pass whose backward pass is done.
        terms: What the reduction divides by, over the whole batch: more than that forward's when it was split.
        ranks: Of a data-parallel run; the model is that of the mean of their losses, the same on all of them.
        more: So many times as many data as usual.
        state: Of the first layer's first parameter, with what was seen of the network before; see
            :class:`~natgrad.derivatives.Agreement`. Without it nothing is taken for granted.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        select: Callable[[Any], Tensor],
        forward: Forward,
        terms: float,
        ranks: Ranks | None = None,
        more: float = 1.0,
        state: State | None = None,
    ) -> None:
        self.model, self.likelihood, self.select = model, likelihood, select
        self.ranks = ranks or Ranks()
        self.forward, self.total_terms = forward, terms
        self.rearrange = forward.rearrange or rearrangement(forward.seen, forward.output)
        # The user's loss is so many times the declared one, and its gradient at the output so many times longer still.
        self.multiplier, self.scaler = 1.0, 1.0
        self._products = list[Tensor]()  # J d of the latest `curvature`
        self._differentiates, self._state = False, state
        self.jumps = None if state is None else Jumps(state)
        self._forward_mode = ForwardMode(state, draws=forward.chance is not None)
        self._ruled_out: Tensor | None = None  # where the user's output is −∞
        self._gathered = {name: whole(p.detach()) for name, p in model.named_parameters() if is_sharded(p)}
        enough = round(min(more * max(MIN_DATA * self.ranks.part, SHARE * forward.data), forward.data))
        # Only all data together draw the dropout that they drew before.
        apart = forward.chance is None and not forward.lengths
        if not (enough < forward.data and apart and self._take_some(enough)):
            self._take_all()
        impossible = self._take(forward.output).isneginf()
        self._ruled_out = impossible if impossible.any() else None
        self.weights = None if forward.weights is None else Weights(*map(self._take, forward.weights))
        # Of the user's loss: of one micro-batch among several, the gradient is that of a part.
        self.share = self.size / forward.data * (forward.terms(likelihood) / terms if terms else 1.0)

    def _take_all(self) -> None:
        """Be of all data of the pass."""
        self.size, self.repeats = self.forward.data, self._repeats("repeats")
        self.chosen: slice | Tensor = slice(None)
        self.emphasis = torch.ones(self.size, device=self.forward.output.device)
        self.args, self.kwargs = widened((self.forward.args, self.forward.kwargs), self.model)
        self._before: Outputs | None = None

    def _take_some(self, size: int) -> bool:
        """Be of so many data; False if the network cannot be run on them alone, or makes something else of them then.

        Batch statistics are others among fewer data, and no reason to take all.
        """
        forward = self.forward
        assert forward.gradient is not None
        order = shuffled(forward.data, forward.seed, forward.output.device)
        self.size, self._before = size, None
        self.repeats = None if self.has_other_statistics else self._repeats("parts")
        self.chosen, self.emphasis = stratified(order, size, forward.gradient.reshape(forward.data, -1))
        try:
            arguments = subsample(forward, self.chosen)
            if arguments is None:
                return False
            self.args, self.kwargs = widened(arguments, self.model)
            if self.repeats is not None and self.repeats.is_sure:
                return True
            self._before = self._run({})
        except torch.OutOfMemoryError:
            raise
        except REFUSALS:
            return False
        (returned, output), expected = self._before, self._take(forward.output)
        if (returned.shape, output.shape) != (self._take(forward.gradient).shape, expected.shape):
            return False
        if self.repeats is not None and self.repeats.is_due:
            self._compare(expected)
        apart = torch.linalg.vector_norm(output - expected) > APART * torch.linalg.vector_norm(expected)
        return not apart or self.has_other_statistics

    @property
    def has_all(self) -> bool:
        """Whether it is of all data of the pass."""
        return self.size == self.forward.data

    @property
    def has_other_statistics(self) -> bool:
        """Whether the network computes statistics of its batch, and these are of fewer data than the pass had."""
        return not self.has_all and any(map(uses_batch_statistics, self.model.modules()))

    def differentiates(self) -> bool:
        """Whether the network was seen to differentiate itself."""
        return self._differentiates

    def curvature(self, directions: Sequence[dict[str, Tensor]], is_first: bool = False) -> Tensor:
        """M, of shape (k, k) in float64, for k directions by parameter name; other parameters do not move.

        The last of several directions is the previous step, whose length says how far differences may look, unless the
        coming one is the first.
        """
        parameters = self._parameters(directions[0])
        tangents = [{name: d[name].to(p.dtype) for name, p in parameters.items()} for d in directions]
        previous = tangents[-1] if len(tangents) > 1 and not is_first else None
        known, data = self._known(), self.forward.data / (self.ranks.part or 1.0)
        self._before, self._products = along(
            self._run, parameters, tangents, previous, data, known, self.differentiates, self.jumps, self._forward_mode
        )
        _, at = self._before
        root = self._weigh(at).sqrt()
        J = torch.stack([(product * root).flatten() for product in self._products])
        HJ = torch.stack(
            [(root * self.likelihood.hessian_product(at, product)).flatten() for product in self._products]
        )
        return self.ranks.mean(self._scale(at) * (J @ HJ.mT))

    def slopes(self, directions: Sequence[dict[str, Tensor]]) -> Tensor | None:
        """Of the declared loss along the directions of the latest ``curvature``; None unless they are exact.

        Returns:
            (2, k): the slopes, and what they would be if all their terms had one sign, by which rounding is measured.
        """
        # Together, as all of them take part in the mean or none.
        is_all = self.has_all and self.ranks.is_alone(self.forward.terms(self.likelihood), self.total_terms)
        is_exact = not (self._forward_mode.fails or (self.jumps is not None and self.jumps.are_crossed))
        if not self.ranks.all(is_all and self.forward.find is None and (is_exact or not self._differentiates)):
            return None
        arrived = self._arrived() / self.scaler
        if is_exact:
            terms = [(arrived * product).double() for product in self._products]
        else:
            pulled = pulled_back(self._run, self._parameters(directions[0]), arrived)
            terms = [torch.cat([(g * d[name]).flatten().double() for name, g in pulled.items()]) for d in directions]
        return self.ranks.mean(torch.stack([torch.stack([t.sum(), t.abs().sum()]) for t in terms], dim=1))

    def slope(self, direction: dict[str, Tensor]) -> float:
        """Derivative along the direction of what the user differentiated, by its gradient at the output."""
        parameters = self._parameters(direction)
        tangent = {name: direction[name].to(parameter.dtype) for name, parameter in parameters.items()}
        self._before, (product, _) = directional_derivative(
            self._run, parameters, tangent, self._before, self._forward_mode
        )
        return float(self.ranks.mean(torch.sum(self._arrived() * product)))

    def change(self, step: dict[str, Tensor]) -> Change:
        """Of the loss if the parameters moved by ``step``, on the model's data and with its dropout in both places."""
        (returned, before), (returned_after, after) = self._ends(step)
        scale = self._scale(before) * self._weigh(before)
        remainder = scale * self._remainder(before, after)
        users = at_least_float32(self._take(self.forward.output))
        shift = scale * self.likelihood.gradient_change(users, before)
        arrived = self._arrived() / self.scaler
        linear = torch.sum(arrived * (returned_after - returned)) + torch.sum(shift * (after - before))
        sizes = torch.stack([torch.linalg.vector_norm(t) for t in (arrived * returned_after, remainder)])
        rounding = ROUNDING * torch.finfo(sizes.dtype).eps * sizes.sum()
        slope, rise, off = self.ranks.mean(torch.stack([linear, remainder.sum(), rounding])).tolist()
        return Change(slope, 2 * rise, off)

    def steepening(self, step: dict[str, Tensor]) -> float:
        """By how much the slope of the loss, along the way that the output goes, rises over a step."""
        (_, before), (_, after) = self._ends(step)
        steeper = self._weigh(before) * self.likelihood.steepening(before, after)
        return float(self.ranks.mean(self._scale(before) * torch.sum(steeper)))

    def spread(self, step: dict[str, Tensor]) -> float:
        """Standard error of the slope of ``change``: how far those of other batches are from it, as data differ."""
        (returned, _), (returned_after, _) = self._ends(step)
        terms = self._arrived() / self.scaler * (returned_after - returned)
        own = terms.reshape(self.size, -1).sum(1).double()
        variance = math.inf if self.size else 0.0
        if self.size > 1:
            squares = self.size * torch.sum(own.square() / self.emphasis) - own.sum() ** 2
            variance = max(float(squares), 0.0) / (self.size - 1)
        return math.sqrt(float(self.ranks.mean([self.ranks.part * variance])))

    def _remainder(self, before: Tensor, after: Tensor) -> Tensor:
        """Of each criterion, what the user's gradient at the output leaves of its change."""
        if self.forward.find is not None:  # that gradient is another
            return self.likelihood.divergence(before, after)
        return self.likelihood.remainder(before, after, self._gradient())

    def _gradient(self) -> Tensor:
        """∇c of the chosen data, as the user's loss tells."""
        assert self.forward.gradient is not None
        gradient = self._take(self.forward.gradient)
        gradient = gradient / (self.multiplier * self.scaler * self.likelihood.scale(self.total_terms))
        if self.weights is not None:
            gradient = gradient / self.weights.curvature.where(self.weights.curvature != 0, 1.0)
        return gradient

    def size_of(self, direction: dict[str, Tensor]) -> float:
        """Length of the parameters that a direction moves."""
        return float(length(self._parameters(direction).values()))

    def is_finite(self, step: dict[str, Tensor]) -> bool:
        """Whether the output would be finite if the parameters moved by ``step``."""
        return self.ranks.all(bool(self._run(self._parameters(step), step)[1].isfinite().all()))

    def _ends(self, step: dict[str, Tensor]) -> tuple[Outputs, Outputs]:
        """The outputs before and after a step."""
        parameters = self._parameters(step)
        self._before = self._known() or self._run(parameters)
        return self._before, self._run(parameters, step)

    def _known(self) -> Outputs | None:
        """The outputs here if they are known, be it from the loop's own pass."""
        if self._before is None and self.repeats is not None and self._ruled_out is None:
            users = at_least_float32(self._take(self.forward.output))
            if self.repeats.is_due:
                self._before = self._run({})
                self._compare(users)
            elif self.repeats.is_sure:
                self._before = users, users
        return self._before

    def _repeats(self, name: str) -> Agreement | None:
        """Whether the loop's own pass is repeated to rounding; None where the two are not to be compared."""
        if self._state is None or self.forward.find is not None:
            return None
        return Agreement(self._state, name, REPEATED)

    def _compare(self, users: Tensor) -> None:
        """Learn of the pass that was just made whether it repeats the loop's own."""
        assert self.repeats is not None
        assert self._before is not None
        if self._differentiates:  # that is seen by a pass, and says how far differences look
            self.repeats.refute()
        elif users.isfinite().all():
            self.repeats.learn(at_least_float32(users), self._before[-1])

    def _parameters(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            return {name: self._gathered.get(name, self.model.get_parameter(name).detach()) for name in like}
        except AttributeError as error:
            raise RuntimeError(
                f"a parameter is no longer there, as after pruning ({error}): make a new optimizer for the model."
            ) from error

    def _run(self, parameters: dict[str, Tensor], step: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The tensor whose gradient was noted, and the one that the loss sees; after a step, if one is given."""
        moved = {name: p + step[name].to(p.dtype) for name, p in parameters.items()} if step else parameters
        raw = self._rerun({**self._gathered, **moved})
        rearrange = self.rearrange.of(self.chosen) if isinstance(self.rearrange, Selection) else self.rearrange
        output = at_least_float32(rearrange(self.select(raw)))
        if self._ruled_out is not None:  # masked logits, whose difference would not be a number
            output = output.masked_fill(self._ruled_out, torch.finfo(output.dtype).min / 4)
        outputs = output if self.forward.find is None else at_least_float32(self.forward.find(raw)), output
        self._differentiates |= output.requires_grad and not torch.is_grad_enabled()  # it enables gradients
        return without_graph(outputs) if self._differentiates else outputs

    def _rerun(self, parameters: dict[str, Tensor]) -> Any:
        with in_modes(self.model, self.forward.modes):
            try:
                return self._rerun_as_it_ran(parameters)
            except RuntimeError:
                raise
            except Exception as error:
                raise RuntimeError(
                    "natgrad evaluated the model once more on the arguments of the loop's call, to judge a step, and "
                    f"it failed: {error!r}. If `forward` uses up an argument, such as an iterator, give it a list; "
                    "numbers as `lr` and `momentum` need no such evaluation."
                ) from error

    def _rerun_as_it_ran(self, parameters: dict[str, Tensor]) -> Any:
        once_more = partial(rerun, self.model, parameters, self.args, self.kwargs, self.forward.chance)
        if not self._differentiates:
            try:
                return once_more()
            except RuntimeError as error:
                if torch.is_grad_enabled() or not wants_gradients(error):
                    raise
        self._differentiates = True  # an energy, to get forces, or a solution, to get residuals
        with torch.enable_grad():
            try:
                return once_more()
            except RuntimeError as error:
                if not wants_gradients(error):
                    raise
            # By its own parameters, as in meta-learning.
            leaves = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in parameters.items()}
            return rerun(self.model, leaves, self.args, self.kwargs, self.forward.chance)

    def _scale(self, output: Tensor) -> float:
        """R for these data, as if they were the whole batch."""
        own: float = self.likelihood.terms(output)
        if self.weights is not None and self.likelihood.reduction == "mean":
            counted = self.weights.terms * self._emphasis(self.weights.terms)
            own = float(counted.sum()) or 1.0  # all ignored: nothing is left to be scaled
        return self.multiplier * self.likelihood.scale(self.total_terms) * self.total_terms / own

    def _weigh(self, output: Tensor) -> Tensor:
        """What each criterion counts, for a sum that stands for all of the chosen data's."""
        rows = self._emphasis(output)
        return rows if self.weights is None else self.weights.curvature * rows

    def _arrived(self) -> Tensor:
        """The gradient of the user's loss at the chosen data's outputs, as if they were the whole batch."""
        assert self.forward.gradient is not None
        taken = self._take(self.forward.gradient)
        return taken * self._emphasis(taken) / self.share

    def _emphasis(self, like: Tensor) -> Tensor:
        """Of each row of a tensor that has one or several for each chosen datum."""
        each = self.emphasis.to(like.dtype).repeat_interleave(len(like) // len(self.emphasis))
        return each.reshape(-1, *[1] * (like.ndim - 1))

    def _take(self, rows: Tensor) -> Tensor:
        """The chosen data's rows, of a tensor that has one or several for each datum."""
        chosen: Tensor = rows.unflatten(0, (self.forward.data, -1))[self.chosen].flatten(0, 1)
        return chosen
