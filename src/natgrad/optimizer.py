"""Stage 8: everything together as a ``torch.optim.Optimizer``.

One step moves the layers' parameters by

    v ← α (−Δ) + μ v,    θ ← exp(−rate · weight_decay) θ + v

with Δ the natural gradient (:mod:`natgrad.preconditioner`) and v the previous step. α and μ are either numbers or
chosen for the step (:mod:`natgrad.rates`); where batches are mostly noise, Δ is that of an average of gradients, and μ
is 0. Parameter groups multiply α, and an automatic μ, by their rates. The parameters without a layer are trained by
AdamW, in groups of their own (:mod:`natgrad.groups`).
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from natgrad import diagnostics, stiffness
from natgrad import state as states
from natgrad.averaging import Averages
from natgrad.batch import full_precision
from natgrad.clipping import clip_scale, dot
from natgrad.distributed import Distributed, like, whole
from natgrad.groups import relative_rates, split, tell_of_untrained
from natgrad.layers import partition
from natgrad.loading import AUTOMATIC, bitwise
from natgrad.losses import Declared
from natgrad.multiplier import LossMultiplier
from natgrad.options import CurvatureOptions, check_names, check_rate
from natgrad.preconditioner import Preconditioner
from natgrad.rates import Course, Direction, Refusals, by_average, by_model
from natgrad.torch_internals import not_compiled

if TYPE_CHECKING:
    from typing_extensions import Unpack


class KFAC(torch.optim.Optimizer):
    """K-FAC as a whole optimizer.

    Args:
        model: As for :class:`~natgrad.Preconditioner`.
        loss: As for :class:`~natgrad.Preconditioner`.
        params: What is trained, as for every torch optimizer: parameters, named ones, or groups of them with their own
            ``lr`` and ``weight_decay``; all that require gradients, if left out. In each group AdamW trains those
            without a layer, or all with ``"fallback": True``: with ``"lr"`` if it holds no others, else 1e-2.
        lr: A number, or ``"auto"``: the minimizer of the exact quadratic model. ``group["lr"]`` is then a factor that
            multiplies it, 1 to begin with, so that schedulers work in both cases.
        momentum: A number below 1, or ``"auto"``: as for ``lr``. If both are automatic and batches turn out to be
            mostly noise, gradients are averaged over them instead (:mod:`natgrad.averaging`).
        damping: As for :class:`~natgrad.Preconditioner`.
        weight_decay: Decoupled: θ ← exp(−rate · weight_decay) θ at every step; an automatic rate may be as large as 1.
        kl_clip: Upper bound on lr² gᵀΔ; for a numeric ``lr`` only.
        **curvature: ``fisher``, ``mc_samples``, ``inverse``, ``factor_decay``, ``curvature_period``,
            ``inverse_period``, ``batch_fraction``, ``sharing``, ``output``, ``seed``: see
            :class:`~natgrad.Preconditioner`.

    Raises:
        ValueError: as :class:`~natgrad.Preconditioner`, and for an automatic rate without a loss.

    Example:
        >>> import natgrad
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = natgrad.KFAC(model, loss="mse")
        >>> x, y = torch.randn(8, 3), torch.randn(8, 2)
        >>> optimizer.zero_grad()
        >>> torch.nn.functional.mse_loss(model(x), y).backward()
        >>> optimizer.step()

    Source: Martens and Grosse (2015), arXiv:1503.05671, sections 6.4 and 7, for automatic rate and momentum.
    """

    def __init__(
        self,
        model: nn.Module | Distributed,
        loss: Declared = None,
        *,
        params: ParamsT | None = None,
        lr: float | Literal["auto"] = "auto",
        momentum: float | Literal["auto"] = "auto",
        damping: float | tuple[float, float] | Literal["auto"] = "auto",
        weight_decay: float = 0.0,
        kl_clip: float | None = None,
        **curvature: "Unpack[CurvatureOptions]",
    ) -> None:
        check_names(curvature)
        check_rate("lr", lr, "auto")
        check_rate("momentum", momentum, "auto", below=1.0)
        check_rate("weight_decay", weight_decay)
        if "auto" in (lr, momentum) and loss is None:
            raise ValueError('`lr="auto"` and `momentum="auto"` need to know the loss: pass `loss=`, or give numbers.')
        if kl_clip is not None and lr == "auto":
            raise ValueError("`kl_clip` bounds a given rate: pass a number as `lr`, or leave `kl_clip` out.")
        self.preconditioner = Preconditioner(model, loss, damping=damping, kl_clip=kl_clip, **curvature)
        self.automatic_lr, self.momentum = lr == "auto", momentum
        self.preconditioner.capture.sampling = damping == "auto" and self._evaluates
        self.preconditioner.may_average = lr == momentum == "auto"
        self._diagnostics: dict[str, float] = {}
        self._latest_step: dict[nn.Parameter, Tensor] = {}
        self._refusals = Refusals()
        self.undone_steps, self._constructed = 0, False
        every = list(self.preconditioner.model.parameters())
        self._trains_all = params is None
        defaults = {"lr": 1.0 if lr == "auto" else lr, "weight_decay": weight_decay, AUTOMATIC: self.automatic_lr}
        super().__init__([p for p in every if p.requires_grad] if params is None else params, defaults)
        self.register_state_dict_post_hook(_complete)
        self._choose_layers()
        self._constructed = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more of the model's parameters, such as layers that were frozen or left out before.

        Args:
            param_group: As for ``params``; a frozen layer must be unfrozen before.

        Raises:
            TypeError: for what is no group of parameters.
            ValueError: for a parameter that is not the model's or is trained already, or for a part of a layer.
        """
        self._names = {p: name for name, p in self.preconditioner.model.named_parameters()}
        before = list(self.param_groups)
        try:
            for group in split(param_group, partition(self.preconditioner.model), self._names):
                super().add_param_group(group)
            if self._constructed:
                self._choose_layers()
        except ValueError:
            self.param_groups = before
            raise

    def _tell_of_untrained(self) -> None:
        """Where all parameters were to be trained: of those that were frozen, or not there, and have a gradient now."""
        trained = self.preconditioner.trained or ()
        named = self.preconditioner.model.named_parameters() if self._trains_all else ()
        if names := [name for name, p in named if p.requires_grad and p.grad is not None and p not in trained]:
            self._trains_all = False
            tell_of_untrained(names)

    @property
    def _evaluates(self) -> bool:  # the model, to choose the step
        return self.automatic_lr or self.momentum == "auto"

    def _choose_layers(self) -> None:
        self.preconditioner.select(p for group in self.param_groups if not group["fallback"] for p in group["params"])
        self.preconditioner.trained = {p for group in self.param_groups for p in group["params"]}
        self._share()

    def _share(self) -> None:
        """Let preconditioner and AdamW work on the same state, and AdamW on our groups themselves."""
        self.preconditioner.state = self.state
        rest = [group for group in self.param_groups if group["fallback"]]
        self._adamw = torch.optim.AdamW(rest) if rest else None
        if self._adamw is not None:
            self._adamw.state = self.state

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a step with a gradient or statistic that is not finite is skipped and counted.

        Args:
            closure: Recomputes and returns the loss, as for every torch optimizer.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: when there is no gradient, or a layer has one and was never seen running.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._tell_of_untrained()
        if not self.preconditioner.steps:
            self.state.update({p: states.known(kept) for p, kept in self.state.items()})
        with self.preconditioner.capture.aside(), full_precision(self.preconditioner.device):
            is_taken = self.preconditioner.update(self._stands if self._evaluates else None) and self._step_layers()
        if is_taken and self._adamw is not None:
            self._adamw.step()
        if not self.preconditioner.steps + self.preconditioner.skipped_steps:
            # No step, but the way in which torch's tools make an optimizer create its state.
            self.state.update(self._completed())
        self.preconditioner.release()
        return loss

    def _completed(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state of every parameter as it is saved, see :mod:`natgrad.state`."""
        pre = self.preconditioner
        layers = {layer.parameters[0]: kept for layer, kept in zip(pre.layers, pre.saved().values(), strict=True)}
        moves = self.automatic_lr or self.momentum != 0.0
        complete = {}
        for group in self.param_groups:
            averages = ["average"] if self.preconditioner.may_average else []
            names = states.of_adamw(group) if group["fallback"] else ["velocity", *averages] if moves else []
            for p in group["params"]:
                known = {**self.state.get(p, {}), **layers.get(p, {})}
                complete[p] = states.completed(known, names, partial(states.of_parameter, p, group))
        return complete

    def _stands(self, multiplier: LossMultiplier, finite: bool) -> bool:
        """Whether the previous step is left as it was; where new data show that it went much too far, it is undone."""
        # It may be on several ranks, so that it is looked at only where it is asked for.
        step = cache(lambda: {p: whole(self.state[p]["velocity"]) for p in self._names if self._has_moved(p)})
        if not self.automatic_lr or not multiplier.in_doubt(finite, lambda: dot(step(), self.preconditioner.gradient)):
            return True
        if not step() or multiplier.accepts({self._names[p]: v for p, v in step().items()}):
            return True
        for parameter, velocity in step().items():
            parameter.sub_(like(velocity.to(parameter.dtype), parameter))
            del self.state[parameter]["velocity"]
        if (running := self.preconditioner.capture.running) is not None:
            running.restore()  # which have seen what the network makes of a batch there
        multiplier.forget()
        self.undone_steps += 1
        return False

    def _step_layers(self) -> bool:
        averaged = self._averages().take(self.preconditioner.gradient) if self.preconditioner.averages else None
        gradient = self.preconditioner.gradient if averaged is None else averaged.get
        # Contiguous, as a loaded step is: sums over another layout are rounded differently.
        natural = {p: direction.contiguous() for p, direction in self.preconditioner.directions(gradient).items()}
        if not natural:
            return True
        if not (self.automatic_lr or self.preconditioner.is_finite(natural)):  # else slopes tell
            return False
        lr, shares = relative_rates(self.param_groups, natural)
        if self.preconditioner.kl_clip is not None:
            bound = self.preconditioner.kl_clip / max(lr, 1e-30) ** 2
            scale = clip_scale(natural, self.preconditioner.gradient, bound, shares)
            torch._foreach_mul_(list(natural.values()), scale)
        previous = {p: whole(self.state[p]["velocity"]) for p in natural if self._has_moved(p)}
        if 0 < len(previous) < len(natural):  # what is new has not moved
            previous = {p: torch.zeros_like(direction) for p, direction in natural.items()} | previous
        onward, is_even = previous, min(shares.values()) == 1
        if not is_even:  # steps are chosen among those that are so related
            natural = {p: direction * shares[p] for p, direction in natural.items()}
            if previous and self.automatic_lr and averaged is None:
                onward = {p: velocity * shares[p] for p, velocity in previous.items()}
        looks, own = self.preconditioner.capture.sampling, self.preconditioner.gradient  # the damping is automatic
        course = Course(self._names, natural, previous, onward, own, lr if self.automatic_lr else 1.0, looks)
        if averaged is None and looks and self.preconditioner.may_average and is_even:
            stiffness.search(self.preconditioner, self._require_pass(), course)
        alpha, mu = self._coefficients(course, averaged, lr)
        self._diagnostics.update(lr=alpha, momentum=mu)
        self._move(course.natural, onward, shares, alpha, mu)
        if self.automatic_lr:  # what it does to running statistics may have to be undone
            self.preconditioner.capture.running = None
        if self.preconditioner.may_average and averaged is None:
            self._averages().rest()
        return True

    def _move(
        self, natural: Direction, onward: Direction, shares: dict[nn.Parameter, float], alpha: float, mu: float
    ) -> None:
        """θ ← exp(−rate · weight_decay) θ + v; the tensors of ``natural`` become v."""
        self._latest_step = natural
        decays = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
        for parameter, direction in natural.items():
            if decays[parameter]:
                parameter.mul_(math.exp(-alpha * shares[parameter] * decays[parameter]))
            velocity = direction.mul_(-alpha) if alpha else direction.zero_()  # it may have overflowed
            if self.momentum != 0.0 or self.automatic_lr:
                if onward and mu:
                    velocity.add_(onward[parameter], alpha=mu)
                self.state[parameter]["velocity"] = like(velocity, parameter)
            parameter.add_(like(velocity.to(parameter.dtype), parameter))
        for parameter in self._names.keys() - natural.keys():
            if self._evaluates and self._has_moved(parameter):  # of a layer that was not used, and so rested
                self.state[parameter]["velocity"].zero_()

    def _has_moved(self, parameter: nn.Parameter) -> bool:
        return "velocity" in self.state.get(parameter, {})  # a look at what is not there would put it there

    def _averages(self) -> Averages:
        return Averages(self.state, [p for layer in self.preconditioner.layers for p in layer.parameters])

    def _coefficients(self, course: Course, averaged: Direction | None, lr: float) -> tuple[float, float]:
        """α and μ, given or chosen; with an automatic rate, ``lr`` multiplies both.

        Args:
            course: Where to go.
            averaged: The averages of gradients that the course follows, if it does.
            lr: Of the group with the largest.
        """
        given_momentum = None if self.momentum == "auto" else float(self.momentum)
        if not self.automatic_lr and (given_momentum is not None or not course.previous):
            return lr, given_momentum or 0.0
        multiplier = self._require_pass()
        multiplier.forward.tell_of_changed_arguments()
        self._diagnostics.update(loss_multiplier=multiplier.loss, averaging=float(averaged is not None), shortening=1.0)
        if self.automatic_lr and multiplier.loss != 1.0:
            torch._foreach_div_(list(course.natural.values()), multiplier.loss)  # the curvature is so much larger
        if averaged is None:
            given = [None if self.automatic_lr else lr, given_momentum]
            alpha, mu, told = by_model(multiplier, course, given)
        else:
            mu, (alpha, told) = 0.0, by_average(multiplier, course, averaged.get, self.preconditioner.metric.renewed)
        self._diagnostics.update(told)
        if course.looks:
            self._refusals.note(alpha, told, multiplier.error())
        if averaged is not None and not alpha:
            self._averages().start_anew()
        return course.times * alpha, course.times * mu

    def _require_pass(self) -> LossMultiplier:
        forward, multiplier = self.preconditioner.batch.latest, self.preconditioner.multiplier
        if forward is None:
            raise RuntimeError(
                "`step()` with an automatic rate found no forward pass of the model since the last step."
            )
        if multiplier is None:
            raise RuntimeError(
                "`step()` with an automatic rate: the model's latest forward pass since the last step had no backward "
                "pass. Call the model under `torch.no_grad()` where its output is not trained on; if `output=` takes "
                "something else than what the model returns, let the model return that."
            )
        return multiplier

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, bitwise: each tensor keeps its own dtype, whatever the parameter's.

        Raises:
            ValueError: when the groups, layers or their sizes are not this model's, or ``lr`` was automatic and is not,
                or the other way round; nothing is loaded then.
        """
        with bitwise(self, self.preconditioner):
            super().load_state_dict(state_dict)
        self._diagnostics, self._latest_step = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, to be made between two steps; the model comes along."""
        ours = ("preconditioner", "automatic_lr", "momentum", "undone_steps", "_names", "_trains_all", "_constructed")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in ours}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, and of torch's ``load_state_dict``."""
        super().__setstate__(state)
        if "preconditioner" in state:
            self._diagnostics, self._latest_step, self._refusals = {}, {}, Refusals()
            self.register_state_dict_post_hook(_complete)
        self._share()

    @torch.no_grad()
    def diagnostics(self, per_layer: bool = True) -> dict[str, float]:
        """Plain numbers about the latest step, for any logger; computed here, so that ``step`` takes no time for them.

        Args:
            per_layer: Tell of each layer too, and whatever takes products with the factors, condition numbers and
                ``kl_kfac``: with dense layers that costs less than a tenth of a step.

        Returns:
            By key. What :meth:`natgrad.Preconditioner.diagnostics` tells, and about the latest step that was not
            skipped, without weight decay and without the parameters that AdamW trains:

            - ``lr``, ``momentum``: as they were applied to the natural gradient and to the previous step.
            - ``averaging``: 1 where batches are mostly noise and gradients are averaged over them, see
              :mod:`natgrad.averaging`, else 0.
            - ``step_norm``: Euclidean length of the step, in units of the parameters.
            - ``relative_step``: the same over the length of the parameters after the step.
            - ``kl_kfac``: ½ sᵀFs of the step s, with F the curvature as the blocks see it, undamped, in units of the
              loss: to second order the KL divergence of the outputs after the step from those before.
            - ``step_norm/<layer>``, ``relative_step/<layer>``, ``kl_kfac/<layer>``: of a layer.

            Where the quadratic model chose rate or momentum, of the step before ``group["lr"]`` multiplies it, or with
            averaged gradients of the latest step that was tried on the model's data:

            - ``predicted_change``, ``actual_change``: of the loss, on the model's data; by the model, and in fact.
            - ``previous_change``: of the loss over the step before, by the model on the batch that came after it.
            - ``kl``: ½ sᵀFs with F the whole network's Gauss-Newton matrix on the model's data, in units of the loss;
              the ratio of ``kl_kfac`` to it says how well the blocks know the curvature along the step.
            - ``confirmed``: of the fall of the loss that steps promised, the share that later batches confirmed.
            - ``caution``: what rates are multiplied by, as batches refuted steps made for others.
            - ``ease``: what the automatic damping is multiplied by, see :mod:`natgrad.trust`.
            - ``stiffening``: what λ_G is multiplied by besides, see :mod:`natgrad.stiffness`.
            - ``shortening``: with averaging, what steps are multiplied by since there is no more progress.
            - ``loss_multiplier``: what the loop multiplies the declared loss by, as far as that can be known; see
              :mod:`natgrad.multiplier`.
            - ``undone_steps``: steps taken back because data that came later showed that they went much too far, since
              construction; not their weight decay, nor AdamW's steps.
            - ``halvings``: how often the step was halved before the loss fell by enough.
        """
        values: diagnostics.Values = {"undone_steps": float(self.undone_steps), **self._diagnostics}
        if step := self._latest_step:
            values |= diagnostics.norms(step, list(step))
        if per_layer:
            values |= diagnostics.of_step(self.preconditioner.layers, self.preconditioner.states(), step)
        return {**diagnostics.numbers(values), **self.preconditioner.diagnostics(per_layer)}


def _complete(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Let what is saved hold the state of every parameter, see :mod:`natgrad.state`."""
    assert isinstance(optimizer, KFAC)
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    complete = optimizer._completed()
    state_dict["state"].update({index: complete[p] for index, p in zip(indices, parameters, strict=True)})
