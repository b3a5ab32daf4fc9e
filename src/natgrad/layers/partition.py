"""Which parameters get a Kronecker block, and why the others do not."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from natgrad.layers import tied, weight_norm
from natgrad.layers.base import Layer, registered, registered_names


@dataclass(frozen=True)
class Partition:
    """The parameters of a model, split.

    Attributes:
        layers: The layers with a Kronecker-factored block, in the order of ``named_modules``.
        reasons: For every other parameter, by name, why it has none.
    """

    layers: list[Layer]
    reasons: dict[str, str]

    def require_layers(self) -> list[Layer]:
        """The layers; a ``ValueError`` that lists the reasons when there is none."""
        if self.layers:
            return self.layers
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.reasons.items())[:5])
        raise ValueError(
            f"the model has no layer that natgrad can precondition (it knows {registered_names()}). "
            f"{reasons or 'It has no parameters'}. A layer of your own that computes as one of these can be registered "
            "(`docs/extending.md`); torch.optim.AdamW trains the model as it is."
        )

    def of(self, parameters: Iterable[nn.Parameter]) -> list[Layer]:
        """The layers of these parameters.

        Raises:
            ValueError: when only some parameters of a layer are among them, or when there is no layer.
        """
        wanted = set(parameters)
        layers = [layer for layer in self.layers if wanted & set(layer.parameters)]
        for layer in layers:
            missing = [p for p in layer.parameters if p not in wanted]
            if missing:
                shapes = ", ".join(str(tuple(p.shape)) for p in missing)
                raise ValueError(
                    f"layer {layer.name!r} is trained as a whole, and its parameters of shape {shapes} are missing: "
                    "add them, freeze them with `requires_grad_(False)` before, or leave out the others as well."
                )
        return Partition(layers, self.reasons).require_layers()

    def refuse_fallbacks(self) -> None:
        """Raise a ``ValueError`` that lists every trainable parameter without a layer."""
        reasons = {name: reason for name, reason in self.reasons.items() if reason != FROZEN}
        if reasons:
            listed = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
            raise ValueError(f"these parameters have no Kronecker-factored block:\n{listed}")


FROZEN = "frozen (requires_grad=False)"


def partition(model: nn.Module) -> Partition:
    """Split the parameters of ``model`` into layers and the rest."""
    found: list[Layer] = []
    why: dict[str, str] = {}  # by module name
    for name, module in model.named_modules():
        candidates = _candidates(name, module)
        if isinstance(candidates, str):
            why[name] = candidates
        else:
            found += candidates
    layers = _join_tied(found, _owners(model), why)
    claimed = {id(p) for layer in layers for p in layer.parameters}
    reasons = {
        name: _reason(name, parameter, why)
        for name, parameter in model.named_parameters()
        if id(parameter) not in claimed
    }
    return Partition(layers, reasons)


def _candidates(name: str, module: nn.Module) -> list[Layer] | str:
    """The layers of one module, or why it has none."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(
            f"layer {name!r} does not know its sizes yet: send a batch through the model before natgrad is constructed."
        )
    kind = registered(module)
    parametrized = parametrize.is_parametrized(module)
    if kind is None and getattr(module, "sparse", False) is True:
        return f"sparse gradients of {type(module).__name__}"
    if kind is None:
        return f"no layer kind is registered for {type(module).__name__}"
    reason = kind.refuses(module) or (weight_norm.refusal(module) if parametrized else None)
    if reason is not None:
        return reason
    if not any(p.requires_grad for p in module.parameters()):
        return FROZEN
    shown = ".".join(part for part in name.split(".") if part != "_orig_mod")  # of a compiled part
    layers = [weight_norm.WeightNormLayer(layer) if parametrized else layer for layer in kind.split(shown, module)]
    if any(p.is_complex() for layer in layers for p in layer.parameters):
        return "its weights are complex"
    if not all(isinstance(p, nn.Parameter) for layer in layers for p in layer.parameters):
        return "what it computes with is no parameter, but made from one by a hook, as by torch.nn.utils.prune"
    return [layer for layer in layers if layer.trained]


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter themselves, by its id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _join_tied(found: list[Layer], owners: dict[int, list[str]], why: dict[str, str]) -> list[Layer]:
    """Layers that share their first parameter become one."""
    by_weight: dict[int, list[Layer]] = {}
    for layer in found:
        by_weight.setdefault(id(layer.parameters[0]), []).append(layer)
    layers: list[Layer] = []
    for uses in by_weight.values():
        reason = tied.refusal(uses, owners)
        if reason is None:
            layers.append(uses[0] if len(uses) == 1 else tied.TiedLayer(uses))
        else:
            why.update({name: reason for use in uses for p in use.parameters for name in owners[id(p)]})
    return layers


def _reason(name: str, parameter: nn.Parameter, why: dict[str, str]) -> str:
    if not parameter.requires_grad:
        return FROZEN
    module = name.rpartition(".")[0].partition(".parametrizations")[0]
    return why.get(module, "not part of its layer's matrix")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside data-parallel wrappers and what ``torch.compile`` returned."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    compiled = model._modules.get("_orig_mod")
    return model if compiled is None else unwrap(compiled)


def entry(model: nn.Module) -> nn.Module:
    """Of the wrapped module, the outermost shell in which no code is compiled: there a call can be watched."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return entry(model.module)
    return model


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """As long as this lasts, what ``torch.compile`` made of the model or its parts runs as it was written."""
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
