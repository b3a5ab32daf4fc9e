"""What is gathered between two steps: forward passes, and the sums that become factors.

:class:`~natgrad.capture.Capture` fills a :class:`Batch`, which knows how its sums, its loss and its number of data
make A and G in units of the loss.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.calls import Call, Sample, alike, positions
from natgrad.factors import Factors, Statistics, grown, join
from natgrad.forward import ALIKE, Ear, Forward
from natgrad.layers import Bases, Layer, Sharing
from natgrad.losses import Loss
from natgrad.targets import emphasis

_logger = logging.getLogger("natgrad")

Fisher = Literal["mc", "exact", "empirical", "forward"]


@dataclass
class Batch:
    """What was captured of one forward pass, or of all since the last step.

    Attributes:
        loss: Of the user.
        fisher: Which curvature the statistics are of.
        statistics: Per layer name, and whether rows of A and G change places.
        forwards: Number of forward passes.
        data: Number of data, summed over the forwards.
        terms: What the loss's reduction divides by, summed over the forwards.
        criteria: How many criteria count, of all forwards and ranks.
        emphasis: What the loop's loss multiplies a criterion by, on average over several forwards; NaN if unknown.
        latest: The latest forward, or one before it that was of more data.
        ears: Of all forwards.
        open: Uses that wait for the gradients of the user's backward pass, which is over when they are added.
        spectra: Per layer name with a basis, the sum over data of the squared gradients in it.
        samples: Per layer name, data with the gradients of the user's loss.
        multiplier: What the user's gradients at the output are divided by, to be those of the declared loss.
        scaler: What they are divided by, to fit the gradients of the parameters.
        part: Of the latest forward pass among those of all ranks, by what the reduction divides by.
    """

    loss: Loss
    fisher: Fisher
    statistics: dict[tuple[str, bool], Statistics] = field(default_factory=dict)
    forwards: int = 0
    data: int = 0
    terms: float = 0.0
    criteria: float = 0.0
    emphasis: float = math.nan
    latest: Forward | None = None
    ears: list[Ear] = field(default_factory=list)
    open: list[list[Call]] = field(default_factory=list)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    multiplier: float = 1.0
    scaler: float = 1.0
    part: float = 1.0

    @property
    def is_heard(self) -> bool:
        """Whether a gradient of the user's loss has arrived."""
        return any(ear.heard for ear in self.ears)

    @property
    def is_deaf(self) -> bool:
        """Whether none has, and none can any more."""
        return all(ear.is_deaf for ear in self.ears)

    def count(self, forward: Forward) -> None:
        """Let this be the batch of a forward pass."""
        self.latest, self.ears, self.forwards, self.data = forward, [forward.ear], 1, forward.data
        self.terms, self.criteria = forward.terms(self.loss.likelihood), forward.criteria(self.loss.likelihood)

    def see_what_was_called(self) -> None:
        """Let the likelihood of the latest forward be that of the loss that was called."""
        if self.latest is not None:
            self.latest.see_what_was_called()

    def follow(self, earlier: "Batch") -> None:
        """Add what was gathered before."""
        for key, sums in earlier.statistics.items():
            if key in self.statistics:
                sums.add(self.statistics[key])
            self.statistics[key] = sums
        for name, total in earlier.spectra.items():
            self.spectra[name] = total + self.spectra[name] if name in self.spectra else total
        for name, samples in earlier.samples.items():
            self.samples[name] = samples + self.samples.get(name, [])
        self.ears, self.open = earlier.ears + self.ears, earlier.open + self.open
        self.forwards += earlier.forwards
        self.data += earlier.data
        self.terms += earlier.terms
        self.criteria += earlier.criteria
        if self.latest is None or self.latest.is_outweighed(earlier.latest):
            self.latest = earlier.latest

    def balance(self, earlier: "Batch") -> None:
        """Let each pass of a step count in the curvature by what the loop's loss multiplies its criteria by.

        Means over micro-batches of unequal size, each divided by their number, count the data of a small one for more.
        """
        both = [one for one in (self, earlier) if one.latest is not None]
        for one in both:
            if one.forwards == 1 and one.latest is not None:
                one.emphasis = one.latest.emphasis = emphasis(one.latest)
        total = sum(one.terms for one in both)
        mean = sum(one.terms * one.emphasis for one in both) / total if total else math.nan
        for one in both:
            share = one.emphasis / mean if mean else math.nan
            if abs(share - 1) > ALIKE:
                # The user's own gradients have it squared already.
                one.weigh(1 / share if self.fisher == "empirical" else share)
        self.emphasis = mean

    def settle(self) -> None:
        """Let the latest forward stand for all: its gradient becomes that of a loss multiplied as theirs on average."""
        latest = self.latest
        if latest is None or latest.gradient is None:
            return
        share = self.emphasis / latest.emphasis
        if abs(share - 1) > ALIKE:
            latest.gradient = latest.gradient * share
            latest.multiplier = None if latest.multiplier is None else latest.multiplier * share

    def tensors(self) -> Iterator[Tensor]:
        """All sums, for a look at whether they are finite."""
        yield from (tensor for statistics in self.statistics.values() for tensor in statistics.tensors())
        yield from self.spectra.values()

    def tell_what_is_not_finite(self, step: int, skipped: int, gradients: Mapping[str, Tensor]) -> None:
        """Log why a step is skipped.

        Args:
            step: Number of steps taken.
            skipped: Of those skipped, with this one.
            gradients: Of the parameters, by name.
        """
        if self.latest is not None and not all_finite([self.latest.output]):
            culprit = "the model's output"
        else:
            culprits = (f"the gradient of {name}" for name, g in gradients.items() if not all_finite([g]))
            culprit = next(culprits, "a statistic")
        tell_of_skipped(step, skipped, culprit)

    def rows(self, name: str) -> tuple[int, float]:
        """Number of rows in A of the layer called ``name``, and of those that they stand for."""
        own = [sums for (owner, _), sums in self.statistics.items() if owner == name]
        return sum(sums.rows for sums in own), sum(sums.of for sums in own)

    def sums(self, call: Call) -> Statistics:
        """Those that a call's rows enter."""
        return self.statistics.setdefault(call.key, Statistics(call.layer.blocks))

    def add_inputs(self, use: list[Call], sharing: Mapping[str, Sharing]) -> None:
        """Add the inputs of one use, by how the positions of each layer share its weights."""
        for pairs in alike([(call, call.inputs[0]) for call in use]):
            first, rows = pairs[0][0], torch.cat([call.layer.inputs(x) for call, x in pairs], dim=-2)
            moment = first.layer.input_moment(rows, sharing[first.owner.name])
            self.sums(first).add_inputs(moment, first.blocks, first.inputs[1])

    def add_gradients(
        self,
        use: list[Call],
        weight: float,
        sharing: Mapping[str, Sharing],
        bases: Callable[[Layer], Bases | None] | None,
    ) -> None:
        """Add the gradients ``g`` of one use, squared and ``weight`` times; in a basis, too, if its layer has one."""
        came = [(call, call.layer.gradients(call.g, call.x)) for call in use if call.g is not None]
        for call in use:
            call.g = None
        for pairs in alike(came):
            first, rows = pairs[0][0], torch.cat([g for _, g in pairs], dim=-2)
            total = first.layer.gradient_moment(rows, sharing[first.owner.name])
            self.sums(first).add_gradients(total, first.blocks, weight * first.upscale)
        basis = bases(use[0].owner) if bases is not None and use[0].owner.per_datum else None
        if came and basis is not None:
            first = came[0][0]
            basis = basis if first.layer.blocks is None else (basis[0][first.blocks], basis[1][first.blocks])
            x, g = positions(first.owner, [(call.layer, call.layer.inputs(call.x), g) for call, g in came])
            total = first.layer.squared_gradients(x, g, basis)
            self._add_squares(first.owner, total, first.blocks, weight * first.upscale)

    def sample(self, use: list[Call], ranks: int) -> None:
        """Note the gradients that the user's backward pass brings to some of the data; our own passes must be over."""
        sample = Sample.of(use, ranks)
        if sample is not None:
            self.samples.setdefault(sample.owner.name, []).append(sample)

    def check(
        self,
        layers: Sequence[Layer],
        states: Mapping[str, Mapping[str, Any]],
        step: int,
        gradient: Callable[[nn.Parameter], Tensor | None],
    ) -> None:
        """A gradient without factors means that the hooks missed the layer, if they watched and it is not zero.

        Args:
            layers: Those that are preconditioned.
            states: What is kept of each, by name.
            step: Number of steps taken.
            gradient: Of each parameter.

        Raises:
            RuntimeError: for such a layer.
            ValueError: at the first step, for a gradient at the output that is not that of the declared loss.
        """
        latest = None if step else self.latest
        if latest is not None and latest.gradient is not None and latest.find is None and latest.likelihood:
            latest.likelihood.check_gradient(latest.gradient)
        if step and not self.statistics:
            return  # the layer is used for the first time between two updates of the curvature
        captured, resting = {name for name, _ in self.statistics}, list[str]()
        for layer in layers:
            gradients = [g for p in layer.parameters if (g := gradient(p)) is not None]
            seen = layer.name in captured or "A" in states[layer.name]
            if not seen and any(g.any() for g in gradients):
                raise RuntimeError(
                    f"layer {layer.name!r} has a gradient but natgrad saw no data pass through it. Call the model that "
                    "was given to natgrad itself, not its parts, with gradients enabled. Of a compiled model give it "
                    "what `torch.compile` returned (not `model.compile()`), before the first call, and compile no "
                    "training loop. Checkpoint activations with `use_reentrant=False`. If its parameters are used and "
                    f"the layer is never called, leave them to AdamW: own = set(model.get_submodule({layer.name!r})"
                    '.parameters()); natgrad.KFAC(model, loss, params=[{"params": [p for p in model.parameters() if p '
                    'not in own]}, {"params": list(own), "fallback": True}]).'
                )
            if not seen and not gradients and step == 0:
                resting.append(repr(layer.name))
        if resting:
            warnings.warn(
                f"natgrad: layer {', '.join(resting)} received no data and no gradient, and rests until it does.",
                stacklevel=4,
            )

    @property
    def R(self) -> float:  # noqa: N802  # as in the formulas
        """What the loss's reduction multiplies the sum of the criteria by."""
        likelihood = self.loss.likelihood
        return 1.0 / self.terms if likelihood is None else likelihood.scale(self.terms)

    def scale(self) -> float:
        """What turns sums of outer products into the curvature of the loss."""
        # The user's gradients carry R once, and the empirical Fisher is R Σ ∇c ∇cᵀ.
        return 1.0 / (self.R * self.multiplier**2) if self.fisher == "empirical" else self.R

    def weigh(self, number: float) -> None:
        """Multiply what gradients were gathered, squared, by a number."""
        for tensor in (*(sums.G for sums in self.statistics.values()), *self.spectra.values()):
            if tensor is not None:
                tensor.mul_(number)

    def factors(self, layer: Layer) -> Factors | None:
        """A and G of one layer, in units of the loss; None if no call was captured.

        Those of a tied layer have the shapes of all its uses together, whichever ran.
        """
        joined: Factors | None = None
        for swapped in (False, True):
            statistics = self.statistics.get((layer.name, swapped))
            if statistics is not None:
                A, G = statistics.factors(self.scale(), self._without_gradient(layer, swapped))
                one = (G, A) if swapped else (A, G)
                joined = one if joined is None else join(joined, one)
        if joined is None:
            return None
        (out, width), (G_diagonal, A_diagonal) = layer.shape, layer.diagonal
        return grown(joined[0], width, A_diagonal), grown(joined[1], out, G_diagonal)

    def telling(self, layers: Sequence[Layer], known: Callable[[Layer], bool]) -> list[Layer]:
        """The layers without those of hidden states that are known, and that saw none but zeros now.

        So it is where data have one position: that would bury what is known of their weights.
        """
        arrived = {
            layer.name: one.A[..., :-1, : max(one.A.shape[-1] - 1, 1)].any()  # of a diagonal, its column
            for layer in layers
            if layer.sees_states and (one := self.statistics.get((layer.name, False))) and one.A is not None
        }
        here = [any_.to(next(iter(arrived.values())).device) for any_ in arrived.values()]
        told = dict(zip(arrived, torch.stack(here).tolist() if here else [], strict=True))
        return [layer for layer in layers if told.get(layer.name, True) or not known(layer)]

    def _add_squares(self, layer: Layer, total: Tensor, part: slice, weight: float) -> None:
        """Add the squared gradients of one use of the blocks ``part`` of a layer, counted ``weight`` times."""
        if layer.name not in self.spectra:
            shape = total.shape if layer.blocks is None else (layer.blocks, *total.shape[-2:])
            self.spectra[layer.name] = total.new_zeros(shape)
        self.spectra[layer.name][part] += total * weight

    def spectrum(self, layer: Layer) -> Tensor | None:
        """Second moments of the data's gradients in the layer's basis, in units of the loss; None if none came."""
        sums = self.spectra.get(layer.name)
        return None if sums is None else sums * self.scale()

    def _without_gradient(self, layer: Layer, swapped: bool) -> Tensor:
        """G of a layer to which no gradient came: the identity by definition for ``"forward"``, else zero."""
        parameter = layer.parameters[0]
        size, diagonal = layer.shape[int(swapped)], layer.diagonal[int(swapped)]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        fill = torch.ones if self.fisher == "forward" else torch.zeros
        column = fill(size, 1, dtype=dtype, device=parameter.device)
        one = column if diagonal else column.squeeze(-1).diag()
        return one if layer.blocks is None else one.expand(layer.blocks, *one.shape).clone()


def refuse_moved(layers: Sequence[Layer], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse layers whose factors are of another precision, or on another device, than their parameters are now."""
    for layer in layers:
        A, parameter = states[layer.name].get("A"), layer.parameters[0]
        own = torch.promote_types(parameter.dtype, torch.float32), parameter.device
        if A is not None and (A.dtype, A.device) != own:
            raise RuntimeError(
                f"layer {layer.name!r} has become {parameter.dtype} on {parameter.device} after natgrad gathered its "
                f"curvature in {A.dtype} on {A.device}: make the optimizer after `model.to(…)`, and load the "
                "state that it had into that."
            )


def tell_of_skipped(step: int, skipped: int, culprit: str) -> None:
    """Log what is not finite; not every time, if that is so for long."""
    if skipped.bit_count() == 1:
        _logger.warning("natgrad: step %d is skipped, as %s is not finite (%d so far)", step, culprit, skipped)


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every entry is finite, with a single synchronization; both extremes are NaN where an entry is."""
    dense = [t.detach().coalesce().values() if t.is_sparse else t.detach() for t in tensors]
    dense = [torch.view_as_real(t) if t.is_complex() else t for t in dense]
    extremes = [extreme for t in dense if t.numel() for extreme in torch.aminmax(t)]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Without the user's autocast, on a type of device that may know none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
