"""Which parameters get a Kronecker block, and why the others do not."""

from dataclasses import dataclass

from torch import nn

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

    def require_layers(self) -> None:
        """Raise a ``ValueError`` that lists the reasons when no layer is left."""
        if self.layers:
            return
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.reasons.items())[:5])
        raise ValueError(
            f"the model has no layer that natgrad can precondition (it knows {registered_names()}). "
            f"{reasons or 'It has no parameters'}."
        )


def partition(model: nn.Module) -> Partition:
    """Split the parameters of ``model`` into layers and the rest."""
    owners: dict[nn.Parameter, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module_name)

    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        reason = _refusal(module, own, owners)
        if reason is None:
            kind = registered(module)
            assert kind is not None
            layers.append(kind(module_name, module))
        else:
            prefix = f"{module_name}." if module_name else ""
            reasons.update({f"{prefix}{name}": reason for name in own})
    return Partition(layers, reasons)


def _refusal(module: nn.Module, own: dict[str, nn.Parameter], owners: dict[nn.Parameter, list[str]]) -> str | None:
    kind = registered(module)
    if kind is None:
        return f"no layer kind is registered for {type(module).__name__}"
    frozen = [name for name, parameter in own.items() if not parameter.requires_grad]
    if frozen:
        return f"{' and '.join(frozen)} frozen (requires_grad=False)"
    for name, parameter in own.items():
        if len(owners[parameter]) > 1:
            return f"{name} is shared by the modules {', '.join(owners[parameter])}"
    return kind.refuses(module)
