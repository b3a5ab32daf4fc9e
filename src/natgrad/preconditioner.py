"""Stage 6: gradients become natural gradients, by capture, invert, apply.

:class:`Preconditioner` joins the stages below it for one model. Per step: fold the captured statistics into the running
factors, refresh the inverses when they are due, and solve for each layer. Its state is tensors in a mapping from each
layer's first parameter, see :mod:`natgrad.state`.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from natgrad import damping as dampings
from natgrad import diagnostics, exchange, noise, schedule
from natgrad import state as states
from natgrad.batch import Batch, Fisher, all_finite, full_precision, refuse_moved, tell_of_skipped
from natgrad.capture import UNKNOWN, Capture
from natgrad.clipping import Gradient, clip_scale
from natgrad.distributed import Distributed, Ranks, World, is_sharded, like, reshard, whole
from natgrad.factors import resolve_sharing, share_known
from natgrad.inverses import INVERSES
from natgrad.layers import Bases, Layer, Sharing, entry, partition, unwrap
from natgrad.local_model import LocalModel
from natgrad.losses import Declared, resolve
from natgrad.memory import number
from natgrad.metric import Metric
from natgrad.multiplier import LossMultiplier
from natgrad.options import check_fisher, check_inverse, check_numbers, check_periods, check_positive, module_of
from natgrad.trust import Trust

State = MutableMapping[Tensor, dict[str, Any]]


class Preconditioner:
    """Replace gradients by natural gradients, for any optimizer that follows.

    Args:
        model: The model, called as a whole in the training loop; what wrapped or compiled it, if something did, or a
            :class:`~natgrad.Distributed`. Construct after moving it to its device and before its first call.
        loss: ``"mse"``, ``"cross_entropy"``, ``"bce_with_logits"``, a torch loss module, or a
            :class:`~natgrad.likelihoods.Likelihood`. For several outputs a dictionary or tuple of these by the outputs'
            keys; a pair ``(number, loss)`` has what that one is multiplied by in their sum.
        damping: A number (added to the block: split between the factors with ``inverse="cholesky"``, otherwise
            exactly), a pair (added to A, added to G), or ``"auto"``: from the curvature, heavily where steps are given
            and lightly where :class:`~natgrad.KFAC` finds that its own hold on fresh data.
        kl_clip: Upper bound on gᵀΔ, the squared length of the preconditioned gradient Δ in the curvature's norm; twice
            the KL divergence of a step at rate 1. A longer Δ is scaled down.
        fisher: ``"mc"``: the true Fisher by sampling; ``"exact"``: the same by one backward pass per output entry;
            ``"empirical"``: from the gradients of the data's own targets; ``"forward"``: G = I.
        mc_samples: Samples drawn per forward for ``"mc"``.
        inverse: ``"cholesky"``; ``"eigen"``, the same by eigendecompositions; or ``"ekfac"``: between updates of the
            inverses their eigenvalues are second moments of the data's gradients, which follow every batch; with
            ``inverse_period=1`` it is ``"eigen"``. A datum is an entry of the first dimension that the layer sees. An
            embedding that shares its weight with a linear layer keeps the eigenvalues of ``"eigen"``.
        factor_decay: Weight ρ of the running average of the factors; 0 uses the current batch alone, as ``"auto"`` does
            for a layer to which the batch gives a row for each dimension; with fewer it means 0.95 or more.
        curvature_period: Steps between updates of the factors. ``"auto"``: 1 at first, then an eighth of the steps
            taken, at most 16, or down to 2 for a layer with fewer rows; always 1 with ``inverse="ekfac"``.
        inverse_period: Steps between updates of the inverses. ``"auto"``: the same, in the end one layer after another.
        batch_fraction: Share of the data whose rows enter the factors; ``"auto"``: all of a small batch; of a large one
            a row for each dimension, at least 512 or a quarter of the data, half for A where there are no positions.
        sharing: ``"expand"`` or ``"reduce"``, for all layers or by layer name.
        output: From the model's return value to the tensor that the loss sees.
        seed: Of the samples for ``"mc"``.

    Raises:
        ValueError: for arguments out of range, a loss whose curvature is unknown, or a model without a supported layer.

    Example:
        >>> import natgrad
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> preconditioner = natgrad.Preconditioner(model, loss="mse")
        >>> torch.nn.functional.mse_loss(model(torch.randn(8, 3)), torch.randn(8, 2)).backward()
        >>> preconditioner.step()
        True
        >>> optimizer.step()

    Sources: Martens and Grosse (2015), arXiv:1503.05671; Grosse and Martens (2016), arXiv:1602.01407; George et al.
    (2018), arXiv:1806.03884, for ``"ekfac"``.
    """

    def __init__(
        self,
        model: nn.Module | Distributed,
        loss: Declared = None,
        *,
        damping: float | tuple[float, float] | Literal["auto"] = "auto",
        kl_clip: float | None = None,
        fisher: Fisher = "mc",
        mc_samples: int = 1,
        inverse: str = "cholesky",
        factor_decay: float | Literal["auto"] = "auto",
        curvature_period: schedule.Period = "auto",
        inverse_period: schedule.Period = "auto",
        batch_fraction: float | Literal["auto"] = "auto",
        sharing: Sharing | dict[str, Sharing] = "expand",
        output: Callable[[Any], Any] | None = None,
        seed: int = 0,
    ) -> None:
        called, self.loss = module_of(model), resolve(loss)
        check_fisher(fisher, self.loss.likelihood)
        check_numbers(kl_clip, factor_decay, batch_fraction, seed)
        check_positive(mc_samples=mc_samples)
        check_periods(curvature_period=curvature_period, inverse_period=inverse_period)
        check_inverse(inverse, fisher)
        self.world = World.of(model)
        self.model = unwrap(called)
        self.layers = partition(self.model).require_layers()
        self.device = self.layers[0].parameters[0].device.type
        self.fisher, self.kl_clip, self.factor_decay = fisher, kl_clip, factor_decay
        # Between updates of the inverses, EKFAC's eigenvalues follow every batch.
        moving = curvature_period == "auto" and inverse == "ekfac"
        self.curvature_period, self._sharing = 1 if moving else curvature_period, sharing
        self.state: State = defaultdict(dict)
        self.skipped_steps, self.batch = 0, Batch(self.loss, fisher)
        self.trained: Container[nn.Parameter] | None = None  # for a caller that trains some alone
        self.multiplier: LossMultiplier | None = None
        self.may_average = self.averages = False  # for a caller that averages gradients over batches
        rule = dampings.resolve(damping, inverse)
        self.metric = Metric(self.layers, INVERSES[inverse], rule, inverse_period, self.world)
        self._whole: dict[nn.Parameter, Tensor] = {}  # gradients of which each rank has a shard
        self.capture = Capture(
            entry(called),
            self.layers,
            self.loss,
            fisher=fisher,
            mc_samples=mc_samples,
            batch_fraction=batch_fraction,
            sharing=resolve_sharing(sharing, [layer.name for layer in self.layers]),
            output=output,
            seed=seed,
            world=self.world,
        )
        self._own_capture()

    def _own_capture(self) -> None:
        me = weakref.ref(self)  # else hooks on the model would keep alive what they work for

        def bases(layer: Layer) -> Bases | None:
            owner = me()
            return None if owner is None else owner.metric.bases(layer, owner._state(layer), owner.steps)

        self.capture.bases = bases if self.metric.inverse.corrects else None
        weakref.finalize(self, self.capture.close).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, to be made between two steps: with the model, and without what was captured."""
        new: dict[str, Any] = {"batch": Batch(self.loss, self.fisher), "multiplier": None, "_whole": {}}
        return {**self.__dict__, **new, "capture": (self.capture, self.capture.settings())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the hooks that came along with the model."""
        self.__dict__.update(state)
        self.capture, settings = state["capture"]
        self.capture.attach(settings)
        self._own_capture()

    def select(self, parameters: Iterable[nn.Parameter]) -> None:
        """Precondition the layers of these parameters, and leave every other gradient as it is.

        Layers that were frozen before may be among them. Call it between two steps.

        Raises:
            ValueError: when only some parameters of a layer are among them, or when there is no layer.
        """
        parts = partition(self.model)
        chosen = parts.of(parameters)
        states.carry_over(self.state, self.layers, chosen)
        self.layers = chosen
        self.metric.choose(chosen, self.states())
        sharing = resolve_sharing(self._sharing, [layer.name for layer in parts.layers])
        self.capture.watch(parts.layers, {layer.name: sharing[layer.name] for layer in chosen})
        self.capture.drop()

    @property
    def steps(self) -> int:
        """Number of steps taken, without those that were skipped for a gradient or statistic that was not finite."""
        return int(self._state(self.layers[0]).get("step", 0))

    @torch.no_grad()
    def step(self) -> bool:
        """Replace ``.grad`` of every layer's parameters by the natural gradient.

        Returns:
            False when a gradient or a statistic was not finite: then the factors stay as they are; or when the natural
            gradient is not. Every ``.grad`` of the model is set to None then, so that the optimizer's step that follows
            leaves the parameters alone too.

        Raises:
            RuntimeError: when there is no gradient, or a layer has one and was never seen running.
        """
        with full_precision(self.device):
            is_taken = self.update()
            natural = self.directions() if is_taken else {}
            is_taken &= self.is_finite(natural)
            scale = 1.0 if self.kl_clip is None else clip_scale(natural, self.gradient, self.kl_clip)
        for parameter in () if is_taken else self.model.parameters():
            parameter.grad = None
        for parameter, direction in natural.items() if is_taken else ():
            parameter.grad = cast(Tensor, parameter.grad).detach()  # from a graph, of `create_graph=True`
            parameter.grad.copy_(like(direction.mul_(scale), parameter))
        self.release()
        return is_taken

    @torch.no_grad()
    def update(self, stands: Callable[[LossMultiplier, bool], bool] | None = None) -> bool:
        """Fold in what was captured and refresh the inverses that are due.

        Args:
            stands: From what the pass tells of the loss, and whether everything is finite, to whether to go on: not if
                the parameters had better be others. For a caller that evaluates the model.

        Returns:
            False if the step must be skipped: something is not finite or does not stand, or there was no backward pass
            and all gradients are zero. The latter is how checkpoint tools make an optimizer create its state; it is not
            counted as a step.

        Raises:
            RuntimeError: as for ``step``; and for a layer whose precision or device has changed.
        """
        batch = self.capture.take()
        refuse_moved(self.layers, self.states())
        reshard(self.model)
        named = {n: p for n, p in self.model.named_parameters() if self.trained is None or p in self.trained}
        parameters = [p for p in named.values() if p.grad is not None]
        if not parameters and all(p.grad is None for p in self.model.parameters()):
            raise RuntimeError("`step()` found no gradient: call `loss.backward()` before it.")
        self.world.traffic.clear()
        exchange.share_batch(batch, self.layers, self.world)
        self._whole = {p: whole(p.grad) for p in parameters if is_sharded(p.grad)}
        gradients = {n: g for n, p in named.items() if (g := self.gradient(p)) is not None}
        finite = all_finite([*gradients.values(), *batch.tensors()])
        batch.see_what_was_called()
        self.multiplier = self._multiplier(batch, stands is not None)
        if self.multiplier is not None:
            if finite:  # first, as a scaler that has doubled would make the previous step look wrong
                self.multiplier.update(gradients, evaluate=stands is not None)
            if stands is not None and not stands(self.multiplier, finite):
                return False
        if not finite:
            self.skipped_steps += 1
            batch.tell_what_is_not_finite(self.steps, self.skipped_steps, gradients)
            return False
        trains = batch.latest is not None and batch.latest.gradient is not None and batch.data > 0
        if not trains and not any(g.any() for g in gradients.values()):
            return False
        if self.multiplier is not None:
            batch.multiplier, batch.scaler = self.multiplier.at_output, self.multiplier.scaler
        self.batch = batch
        if self.capture.whole:
            batch.check(self.layers, self.states(), self.steps, self.gradient)
        self.averages = self.may_average and Trust(self._state(self.layers[0])).averages
        self.metric.restore(self.states(), self.steps - 1)
        for layer in batch.telling(self.layers, lambda layer: "A" in self._state(layer)):
            self.metric.fold(layer, self._state(layer), batch, self.factor_decay, self.averages)
        self.metric.update(self.states(), batch, partial(self._matrix, self.gradient), self.steps, self.averages)
        self._count_step()
        return True

    def _count_step(self) -> None:
        self._state(self.layers[0])["criteria"] = number(self.batch.criteria)
        for name, state in self.states().items():
            state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
            if "A" in state:
                state[states.MOVED] = torch.tensor(float(name in self.metric.moved), dtype=torch.float32)
        self._look_out()

    def _look_out(self) -> None:
        """Settle what the next batch is to tell."""
        self.capture.step, self.capture.whole = self.steps, schedule.starts(self.steps, self.curvature_period)
        self.capture.criteria = float(self._state(self.layers[0]).get("criteria", UNKNOWN))
        known = {layer: self._state(layer).get("rows", torch.inf) for layer in self.layers}
        shares = {layer.name: share_known(rows, layer.dense_dimension) for layer, rows in known.items()}
        vectors = {layer.name for layer in self.layers if layer.is_vector}
        self.capture.due = schedule.due(self.steps, self.curvature_period, shares, vectors)

    @torch.no_grad()
    def directions(self, gradient: Gradient | None = None) -> dict[nn.Parameter, Tensor]:
        """The natural gradient of every parameter that has factors and a gradient: the batch's, or the one given."""
        solutions = self.metric.solve(self.states(), partial(self._matrix, gradient or self.gradient), self.averages)
        natural: dict[nn.Parameter, Tensor] = {}
        for layer in self.layers:
            if layer.name in solutions:
                steps = zip(layer.parameters, layer.from_matrix(solutions.pop(layer.name)), strict=True)
                natural.update((p, step) for p, step in steps if self.gradient(p) is not None)
        return natural

    def is_finite(self, natural: Mapping[nn.Parameter, Tensor]) -> bool:
        """Whether a natural gradient is; a step along another is skipped, as where curvature has vanished."""
        if all_finite(list(natural.values())):
            return True
        self.skipped_steps += 1
        tell_of_skipped(self.steps, self.skipped_steps, "the natural gradient")
        return False

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """All of a parameter's gradient, of which each rank may have a shard; None if there is none."""
        return self._whole.get(parameter, parameter.grad)

    def release(self) -> None:
        """Let go of everything that was gathered for the step."""
        self._whole, self.batch, self.multiplier = {}, Batch(self.loss, self.fisher), None

    def _matrix(self, gradient: Gradient, layer: Layer) -> Tensor | None:
        """The gradient of a layer as a matrix, zero for what was frozen since; None without any or without factors."""
        state, there = self._state(layer), [gradient(p) for p in layer.parameters]
        if "A" not in state or all(g is None for g in there):
            return None
        gradients = [
            torch.zeros(p.shape, dtype=p.dtype, device=p.device) if g is None else g
            for p, g in zip(layer.parameters, there, strict=True)
        ]
        return layer.to_matrix(gradients).to(state["A"].dtype)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Running A and G by layer name, live: ([B,] d, d), or (d, 1) if diagonal; kron(G, A) is over [W b]."""
        return {name: (state["A"], state["G"]) for name, state in self.states().items() if self.steps and "A" in state}

    def states(self) -> dict[str, dict[str, Any]]:
        """What is kept of each layer, by its name."""
        return {layer.name: self._state(layer) for layer in self.layers}

    @torch.no_grad()
    def diagnostics(self, per_layer: bool = True) -> dict[str, float]:
        """Plain numbers about the latest step, for any logger; computed here, so that ``step`` takes no time for them.

        Args:
            per_layer: Tell of each layer too, and whatever takes products with the factors: the condition numbers.

        Returns:
            By key. Those of an inverse are there once it was computed, since construction or loading.

            - ``skipped_steps``: left out because something was not finite, since construction.
            - ``traffic``: of several ranks, bytes of natgrad's messages that this one took part in.
            - ``inverse_age``, ``inverse_age/<layer>``: steps since the inverse was computed; of all, the oldest's.
            - ``damping_a``, ``damping_a/<layer>``: added to A, in squared units of the layer's input; of all, the mean.
            - ``damping_g``, ``damping_g/<layer>``: added to G, in loss over squared units of the layer's output.
            - ``damping``, ``damping/<layer>``: added to the block besides, in loss over squared units of parameters.
            - ``condition/<layer>``: largest over smallest eigenvalue of the damped block; the worst, if there are
              several. With ``inverse="cholesky"`` a lower bound by power iterations, usually within a tenth.
            - ``condition_a/<layer>``, ``condition_g/<layer>``: the same of the damped factors, whose product is the
              block; not with ``inverse="ekfac"`` nor where ``damping`` is added to the block.
        """
        held = {name: state for name, state in self.states().items() if per_layer and self.world.holds(name)}
        applied, latest = self.metric.applied, self.steps - 1
        values = diagnostics.summary(applied, latest) | diagnostics.of_inverses(held, applied, latest)
        values["skipped_steps"] = self.skipped_steps
        if self.world.size > 1:
            values["traffic"] = self.world.traffic.total()
        return diagnostics.numbers(values)

    def state_dict(self) -> dict[str, Any]:
        """Running factors and inverses by layer name; the same tensors at every step, see :mod:`natgrad.state`."""
        return {"layers": self.saved(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, bitwise.

        Raises:
            ValueError: when the state, its layers or their sizes are not this model's; nothing is loaded then.
        """
        layers = states.of_layers(self.layers, state_dict)
        for layer in self.layers:
            self.state[layer.parameters[0]] = states.copied(layers[layer.name], layer.parameters[0])
        self.skipped_steps = state_dict["skipped_steps"]
        self.resume()

    def saved(self) -> dict[str, dict[str, Tensor]]:
        """What is kept of each layer, by its name, for a checkpoint."""
        kept = {}
        for layer in self.layers:
            of_all = states.OF_ALL if layer is self.layers[0] and self.loss.likelihood is not None else ()
            names = [*states.names(self.metric.inverse.names, self.capture.sampling), *of_all]
            kept[layer.name] = states.completed(self._state(layer), names, partial(states.of_layer, layer))
        return kept

    def resume(self) -> None:
        """Let the capture go on from the step that the state is at."""
        self.metric.forget(self.states())
        self.capture.drop()
        self._look_out()

    def _state(self, layer: Layer) -> dict[str, Any]:
        return self.state[layer.parameters[0]]

    def _multiplier(self, batch: Batch, evaluates: bool = True) -> LossMultiplier | None:
        """For what a batch tells of the number that multiplies the loss; None without a loss, backward pass or use."""
        forward = batch.latest if evaluates or self.fisher == "empirical" or self.capture.sampling else None
        if forward is None or forward.gradient is None or not forward.data or forward.likelihood is None:
            return None
        likelihood = forward.likelihood
        forward.see_what_counts(likelihood)
        ranks, share = Ranks(self.world, batch.part, forward.output), partial(noise.share, self.states().values())
        local = partial(LocalModel, self.model, likelihood, self.capture.view, forward, batch.terms, ranks)
        return LossMultiplier(self._state(self.layers[0]), local, forward, likelihood, batch.terms, ranks, share)
