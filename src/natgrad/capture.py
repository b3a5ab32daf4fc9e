"""Stage 3: a forward pass goes in, the statistics of every layer come out.

Hooks on the layers remember, for each call, the input and the *gradient edge* of the output: the place in the autograd
graph where its gradient arrives. A hook on the root module then takes the model's output, asks the likelihood for
vectors and sends them back to the edges by ``torch.autograd.grad``. No parameter gradient is computed, ``.grad`` is
untouched, and the graph stays for the user's own ``backward()``. Where few data enter the factors, the vectors go
through a second pass of these alone (:mod:`natgrad.rerun`). An edge, unlike the output tensor, still means the
same place after an in-place activation has overwritten the output. Inside compiled code there are no edges: a forward
whose statistics are due runs uncompiled, and in the others our hooks leave no trace in the compiled graph.

The empirical Fisher needs the user's own gradients: there the hooks sit on the output tensors, and the statistics
arrive during the user's ``backward()``. So do, at the edges, the samples that tell the noise of the gradients.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from natgrad.batch import Batch, Fisher, full_precision
from natgrad.calls import Call, choose, group, kept
from natgrad.chance import Chance
from natgrad.distributed import World
from natgrad.forward import Ear, Forward, versions
from natgrad.joint import differing_lengths
from natgrad.layers import Bases, Layer, Sharing, at_least_float32, uncompiled, unwrap
from natgrad.layers.normalization import RunningStatistics, statistics_left_alone
from natgrad.likelihoods import Likelihood
from natgrad.losses import Loss, Weights
from natgrad.outputs import Origin, Selection, View, rearrangement
from natgrad.own_derivatives import OwnDerivatives
from natgrad.passes import Passes
from natgrad.rerun import Arguments, again, few, in_other_containers, is_watched, modes, stands_for
from natgrad.torch_internals import is_recorded, is_transformed
from natgrad.vectors import vectors
from natgrad.waiting import Waiting, given, tell_of_forgotten

# Criteria of a step, before the first one has shown how many there are: many, as nothing was learnt by heart yet.
UNKNOWN = 1e6


class Capture:
    """Hooks on ``model`` that fill a :class:`Batch`.

    Statistics are gathered of the layers that ``due`` names, and the noise of gradients where ``whole`` says that an
    interval begins. Where ``bases`` knows a basis for a layer, squares of the data's gradients in it are gathered, too.
    Where no gradient of ``parameters`` is left, as after an overflow that a gradient scaler saw, all is thrown away.

    A model that is copied or pickled takes its hooks along, idle; ``settings`` and ``attach`` make them work again.

    Args:
        model: The root module, or what it was compiled to; its forward must be what the user calls.
        layers: All layers; ``watch`` chooses.
        loss: What to backpropagate, for the Fishers that need it.
        fisher: Which curvature.
        mc_samples: Vectors drawn per forward for ``fisher="mc"``.
        batch_fraction: Share of the data whose rows enter the factors, or ``"auto"``.
        sharing: Weight sharing, by name of each layer to watch.
        output: From the model's return value to the tensor that the loss sees.
        seed: With the number of the step it seeds every draw, so that a resumed run repeats them.
        world: The ranks that share the data; each draws for its own.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        loss: Loss,
        *,
        fisher: Fisher,
        mc_samples: int,
        batch_fraction: float | Literal["auto"],
        sharing: dict[str, Sharing],
        output: Callable[[Any], Any] | None,
        seed: int,
        world: World | None = None,
    ) -> None:
        self.loss, self.fisher, self.mc_samples = loss, fisher, mc_samples
        self.batch_fraction, self.view, self.seed = batch_fraction, View(output, loss), seed
        self.world = world or World()
        # Whether gradients of the user's loss are kept as well, and curvature is smoothed, see `Likelihood.smoothed`;
        # and for how many criteria.
        self.sampling, self.criteria = False, UNKNOWN
        self.attached = self.whole = True
        self._has_parts = None if fisher in ("mc", "exact") else False  # None until one was seen to stand for its pass
        self.step = self._forward_seed = 0
        self._model, self._handles = model, list[RemovableHandle]()
        self._start_anew()
        self.watch(layers, sharing)

    def _start_anew(self, hears: bool = False) -> None:
        """As if nothing was captured yet, for nobody; what is set here is no setting."""
        self.bases: Callable[[Layer], Bases | None] | None = None
        self._passes = Passes(lambda: Batch(self.loss, self.fisher), self._finish, hears)
        self.running: RunningStatistics | None = None  # before the first pass that changed them since it was None
        self._waiting = Waiting()  # for the loss module to be called
        self._missed = False  # whether a backward pass began before it was
        self._own_derivatives, self._uncompiled = OwnDerivatives(self._note), ExitStack()
        self._end()

    def _end(self) -> None:
        """No forward pass of the root module runs."""
        self._uncompiled.close()
        self._own_derivatives.stop()
        self._calls: list[Call] | None = None  # a list only while one does
        self._chance: Chance | None = None  # likewise
        self._arguments: tuple[Arguments, tuple[int, ...]] = ((), {}), ()  # likewise
        self._nested = 0  # calls of the model inside its own forward

    def watch(self, layers: list[Layer], sharing: dict[str, Sharing]) -> None:
        """Watch those of ``layers`` that ``sharing`` names, and no others."""
        self.sharing, self.due = sharing, set(sharing)
        self.parameters = [p for layer in layers if layer.name in sharing for p in layer.parameters]
        self.close()
        self.attached = True
        # Of the layers of one module, one may report for all.
        modules = {id(layer.module) for layer in layers if layer.name in sharing}
        self._handles = [h for layer in layers if id(layer.module) in modules for h in layer.watch(self)]
        self._handles += [
            self._model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self._model.register_forward_hook(self._after_model, with_kwargs=True),
            self._model.register_forward_hook(self._clean_up, always_call=True),
        ]
        if self.loss.module is not None:
            self._handles.append(self.loss.module.register_forward_hook(self._after_loss, with_kwargs=True))
        if isinstance(self.loss.function, nn.Module):
            self._handles.append(self.loss.function.register_forward_hook(self._watch_value, with_kwargs=True))

    def close(self) -> None:
        """Take the hooks off the model."""
        self.attached = False
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Passes of the model in here are natgrad's own, and not looked at, even where they need gradients."""
        attached, self.attached = self.attached, False
        try:
            yield
        finally:
            self.attached = attached

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: in a model copied alone the hooks are nobody's."""
        return {"attached": False, "_calls": None}

    def settings(self) -> dict[str, Any]:
        """For ``attach``: everything but what was captured."""
        nothing = Capture.__new__(Capture)
        nothing._start_anew()
        return {k: v for k, v in vars(self).items() if k not in vars(nothing)} | {"hears": self._passes.hears}

    def attach(self, settings: dict[str, Any]) -> None:
        """Let the hooks of a copied model work for its owner's copy."""
        self.__dict__.update(settings)
        self._start_anew(self.__dict__.pop("hears"))

    @property
    def ahead(self) -> Sequence[Batch]:
        """Of each forward pass whose backward pass may still come."""
        return self._passes.ahead

    def wants(self, layers: Iterable[Layer]) -> bool:
        """Whether some of these should report their calls: the model is running, with gradients, and they are due."""
        if torch.compiler.is_compiling() or self._calls is None or not torch.is_grad_enabled():
            return False
        return any(layer.owner.name in self.due for layer in layers)

    def take(self) -> Batch:
        """Hand over what was captured and start anew.

        Raises:
            RuntimeError: when the loss module that natgrad was given was not called after the model.
        """
        missed, self._missed = self._missed, False
        self._end()  # what a pass has left that was interrupted, by which no hook is called
        self._waiting.clear()
        if missed:
            raise RuntimeError(
                f"the loss module given to natgrad, {self.loss.module!r}, was not called with the model's output: call "
                "that very module in the training loop, as natgrad learns from it which targets count and how much; "
                'or declare the loss by name, such as "cross_entropy".'
            )
        return self._passes.take()

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_recorded() or not self.attached:
            return
        if self._calls is not None:
            self._nested += 1
            return
        if not (self.running or is_transformed()):
            self.running = RunningStatistics(module)
        self._passes.begin(self.parameters)
        looks = torch.is_grad_enabled() and not is_transformed()
        self._calls, self._chance = ([], Chance(module)) if looks else (None, None)
        if looks:
            self.world.check_wrapper(module)
        self._forward_seed = self._draw()
        self._arguments = in_other_containers((args, kwargs)), versions(args, kwargs)
        if looks and self.due:
            self._uncompiled.enter_context(uncompiled(module))

    def _clean_up(self, module: nn.Module, args: tuple[Any, ...], raw: Any) -> None:
        """The last hook of every call; after an exception it is the only one."""
        if self.attached and self._nested:
            self._nested -= 1
        elif self.attached:
            self._end()

    def record(
        self, layer: Layer, x: Tensor, z: Tensor, blocks: slice = slice(None), source: Tensor | None = None
    ) -> None:
        """Remember one call of a layer; see :class:`~natgrad.layers.Recorder`."""
        if self._calls is None or not (z.requires_grad and z.numel()) or layer.owner.name not in self.due:
            return
        fraction = self.batch_fraction if self.attached else 1.0  # of natgrad's own passes all
        data, upscale, more = choose(layer, z, blocks, fraction, self.world.size, self._forward_seed)
        call = Call(layer, layer.owner, kept(x, data), get_gradient_edge(z), data, upscale, blocks)
        if more is not None:
            call.more, call.x = (inputs := x[more]), inputs[: len(call.x)]  # which shares its memory
        self._note(call, z)
        if source is not None and self.fisher != "forward":
            self._own_derivatives.follow(call, source, z)

    def _note(self, call: Call, z: Tensor) -> None:
        assert self._calls is not None
        self._calls.append(call)
        if self.fisher == "empirical":
            z.register_hook(partial(self._add_empirical, weakref.ref(call)))

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], raw: Any) -> None:
        if not self.attached or self._nested:
            return
        calls, chance, ((args, kwargs), before) = self._calls, self._chance, self._arguments
        self._end()  # before natgrad's own backward passes
        if calls is None or chance is None:
            return
        if not (output := self.view.join(heads := self.view.heads(raw))).requires_grad:
            return
        forward = Forward(args, kwargs, output, self._uses(calls), seed=self._forward_seed, chance=chance.if_drawn())
        forward.lengths, forward.trained, forward.versions = differing_lengths(heads), self.parameters, before
        forward.likelihood, forward.modes = copy(self.loss.likelihood), modes(unwrap(module))
        origins, forward.find = self.view.origins(raw, heads)
        if self.loss.module is None:
            self._gather(forward, origins)
            return
        self._waiting.add(forward, origins)
        # A hook that held the pass would hold the graph that holds the hook.
        hook = partial(self._without_loss, weakref.ref(forward), forward.ear, origins[0].order)
        origins[0].tensor.register_hook(hook)

    def _after_loss(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        """The loss module has seen the model's output, perhaps rearranged, and the targets."""
        seen, others = given(args, kwargs)
        if not (self.attached and self._waiting and seen.requires_grad) or self.loss.likelihood is None:
            return
        if (forward := self._waiting.made(seen)) is None:  # it is of another network
            return
        try:
            forward.rearrange = rearrangement(None if seen is forward.output else forward.output, seen)
        except ValueError:
            if not self.loss.indispensable:  # the gradient will tell which targets count
                return
        self._waiting.take(forward)
        forward.rearrange = forward.rearrange or Selection.between(forward.output, seen)
        assert self.loss.weigh is not None
        self.loss.likelihood.check(seen)
        with torch.no_grad():
            forward.weights = self.loss.weigh(module, at_least_float32(seen.detach()), others)
        forward.seen, forward.output, forward.find = forward.output, seen, None
        self._gather(forward, [Origin(seen)])

    def _watch_value(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> None:
        """What the training loop multiplies the loss by arrives as the gradient of its value."""
        if not (self.attached and value.requires_grad):
            return
        seen, _ = given(args, kwargs)
        for forward in (batch.latest for batch in self.ahead):
            if forward is not None and forward.is_input(seen):
                value.register_hook(forward.add_multiplier)

    def _without_loss(
        self, waiting: weakref.ref[Forward], ear: Ear, order: Callable[[Tensor], Tensor], gradient: Tensor
    ) -> None:
        """The backward pass begins, and the module was not called, or saw what cannot be traced to the output."""
        if ear.is_forgotten:
            tell_of_forgotten()
        forward = waiting()
        if forward is None or self.loss.likelihood is None or not self._waiting.take(forward):
            return
        if self.loss.indispensable or forward.find is not None:
            self._missed = True
            return
        self.loss.likelihood.check(forward.output)
        forward.note(g := order(gradient))
        counted = self.loss.likelihood.counted(at_least_float32(forward.output), g)
        assert counted is not None  # of cross-entropies, which alone may ignore targets
        forward.weights = Weights(counted, counted)
        self._gather(forward, [])

    def _gather(self, forward: Forward, origins: Sequence[Origin]) -> None:
        batch = Batch(self.loss, self.fisher)
        likelihood = self.loss.likelihood
        if self.sampling and likelihood is not None:
            likelihood = forward.likelihood = likelihood.smoothed(forward.output.detach(), self.criteria)
        if (part := self._part(forward)).uses:
            # The user's autocast would round the products of rows to half precision.
            with torch.no_grad(), full_precision(forward.output.device.type):
                for use in forward.uses:
                    batch.add_inputs(use, self.sharing)
                if self.fisher in ("mc", "exact"):
                    with statistics_left_alone(self._model):  # of what is checkpointed, and runs again
                        self._backpropagate(part, likelihood, batch)
            if self.sampling and self.whole:
                for use in forward.uses:
                    if use[0].rows in (forward.data, *forward.lengths):
                        batch.sample(use, self.world.size)
        if forward.gradient is None:
            if self._passes.follows:
                look = partial(self._passes.drop_what_lost_its_gradient, self.parameters)
                for tensor in (origin.tensor for origin in origins if origin.tensor.requires_grad):
                    tensor.register_hook(look)
            forward.listen(origins)
        if self.fisher == "empirical":
            batch.open = forward.uses
            for call in (call for use in batch.open for call in use):
                call.edge = None  # or the graph would stay with the batch
        forward.release()
        batch.count(forward)
        self._passes.end(batch)

    def _part(self, forward: Forward) -> Forward:
        """A pass of the data alone that enter the factors, where that is cheaper and comes to the same; else all."""
        chosen = None if self._has_parts is False else few(forward, self.fisher == "mc")
        if chosen is None or is_watched(unwrap(self._model), {handle.id for handle in self._handles}):
            return forward
        with self.aside():
            self._calls = []  # the hooks on the layers work alone, and for us
            try:
                part, calls = again(unwrap(self._model), forward, chosen, self.view), self._calls
            finally:
                self._calls = None
                self._own_derivatives.stop()
        part = part if part is not None and stands_for(part, self._uses(calls), forward, chosen) else None
        if part is not None or forward.output.isfinite().all():  # an overflow tells nothing
            self._has_parts = self._has_parts or part is not None
        return part or forward

    def _uses(self, calls: list[Call]) -> list[list[Call]]:
        """Each call by itself, or together with ``"reduce"``, and where a datum's gradient is wanted, their sum."""
        whole = self.sampling or self.bases is not None
        return group(calls, lambda owner: whole or self.sharing[owner.name] == "reduce")

    def _backpropagate(self, forward: Forward, likelihood: Likelihood | None, batch: Batch) -> None:
        calls = [call for use in forward.uses for call in use]
        edges = [call.edge for call in calls if call.edge is not None]
        assert likelihood is not None
        samples = None if self.fisher == "exact" else self.mc_samples
        for vector, weight in vectors(forward, likelihood, samples, self._draw()):
            grads = torch.autograd.grad(
                forward.output, edges, vector.to(forward.output.dtype), retain_graph=True, allow_unused=True
            )
            for call, g in zip(calls, grads, strict=True):
                call.g = None if g is None else call.chosen(g)
            for use in forward.uses:
                batch.add_gradients(use, weight, self.sharing, self.bases)

    def _add_empirical(self, captured: weakref.ref[Call], g: Tensor) -> None:
        call = captured()
        if call is None or self._calls is not None:  # thrown away; or the network's own pass
            return
        g = call.chosen(g.detach())
        call.g = g if call.g is None else call.g + g

    def _finish(self, batch: Batch) -> None:
        """Add the gradients of the user's backward pass, or of several."""
        for use in batch.open:
            with torch.no_grad(), full_precision(use[0].x.device.type):
                batch.add_gradients(use, 1.0, self.sharing, self.bases)
        batch.open = []

    def _draw(self) -> int:
        """The seed of this forward's draws, different for every step, micro-batch and rank."""
        draw = (self.seed * 1_000_003 + self.step) * 1009 + self._passes.forwards
        return (draw + self.world.rank * 2_654_435_761) % 2**63  # generators look at the lower 32 bits only

    def drop(self) -> None:
        """Forget what was captured."""
        self.running = None
        self._passes.drop()
