"""Beside stage 6: the state as checkpoints want it, complete and of the same shapes from the start.

A distributed checkpoint is loaded into tensors that are there already, so those of an optimizer that has not stepped
must be there too. In training a tensor is there once it is known; what is saved has all of them, and NaN, which no
known one holds throughout, stands for those that are not. :func:`completed` and :func:`known` lead there and back.
Before step 1 nothing is known; AdamW's averages are zero then.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.averaging import Pace
from natgrad.distributed import whole
from natgrad.layers import Layer
from natgrad.memory import sizes
from natgrad.multiplier import LossMultiplier
from natgrad.trust import Trust
from natgrad.undeclared import Undeclared

# What belongs to a factor, or to the block of a layer; the rest are numbers: the "age" of the running average of both,
# the "rows" that a batch has for them, the share of "noise" in the gradient, and the "step".
OF_A, OF_G = ("A", "A_inverse", "A_basis"), ("G", "G_inverse", "G_basis")
OF_BLOCK = ("scale", "spectrum", "shift")
# Whether the factors are newer than their inverse.
MOVED = "moved"
# Kept with the first layer, for the whole network; and their sizes.
OF_ALL = {
    **sizes(LossMultiplier, Trust, Pace, Undeclared),
    **dict.fromkeys(("criteria", "smooth", "wide", "repeats", "parts", "differences"), 1),
}


def names(inverse: Sequence[str], sampling: bool) -> list[str]:
    """Of the tensors that are kept of a layer.

    Args:
        inverse: Of those that its inverse keeps.
        sampling: Whether the noise of the gradient is measured.
    """
    return ["step", "A", "G", "age", "rows", *(["noise"] if sampling else []), *inverse, MOVED]


def of_layer(layer: Layer, name: str) -> Tensor:
    """A tensor of a layer that is not known yet: NaN, of the shape that it will have."""
    parameter = layer.parameters[0]
    wide = torch.promote_types(parameter.dtype, torch.float32)
    if name in OF_ALL:
        return torch.full((OF_ALL[name],), torch.nan, dtype=torch.float32, device="cpu")
    if name in ("step", MOVED):
        return torch.zeros((), dtype=torch.float32)
    if name in ("age", "rows", "noise", "spectrum_age"):
        return torch.full((), torch.nan, dtype=torch.float32 if name == "rows" else torch.float64)
    blocks = () if layer.blocks is None else (layer.blocks,)
    (out, width), (g_diagonal, a_diagonal) = layer.shape, layer.diagonal
    shapes = {
        **dict.fromkeys(OF_A, (*blocks, width, 1 if a_diagonal else width)),
        **dict.fromkeys(OF_G, (*blocks, out, 1 if g_diagonal else out)),
        **dict.fromkeys(OF_BLOCK, (*blocks, out, width)),
    }
    return torch.full(shapes[name], torch.nan, dtype=wide, device=parameter.device)


def of_adamw(group: Mapping[str, Any]) -> list[str]:
    """Names of what AdamW keeps of each parameter of a group."""
    return ["step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]


def of_parameter(parameter: nn.Parameter, group: Mapping[str, Any], name: str) -> Tensor:
    """What is kept of each parameter of a group before the first step."""
    if name == "step":
        is_on_device = group.get("capturable") or group.get("fused")  # where AdamW wants it
        return torch.zeros((), device=parameter.device if is_on_device else None)
    if name in ("velocity", "average"):
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return torch.full_like(parameter, torch.nan, dtype=wide, memory_format=torch.contiguous_format)
    return torch.zeros_like(parameter)  # in the layout that AdamW gives it


def completed(
    state: Mapping[str, Tensor], wanted: Sequence[str], unknown: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """What is known, and NaN for what is wanted besides; in the order of their names, so that files are alike."""
    missing = {name: unknown(name) for name in wanted if name not in state}
    return dict(sorted({**state, **missing}.items()))


def known(state: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`completed`."""
    if "step" in state and not state["step"]:
        return {}
    return {name: value for name, value in state.items() if not _is_unknown(value)}


def of_layers(layers: Sequence[Layer], state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is known of each layer, by its name, in what a preconditioner saved; checked as by :func:`check`."""
    if "layers" not in state_dict:
        raise ValueError(
            "the state was not saved by natgrad.Preconditioner; that of a natgrad.KFAC is for a natgrad.KFAC to load."
        )
    given = {name: known(kept) for name, kept in state_dict["layers"].items()}
    check(layers, given)
    return given


def _is_unknown(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(whole(value).isnan().all())


def copied(state: Mapping[str, Tensor], parameter: nn.Parameter) -> dict[str, Tensor]:
    """On the device of the parameter and as precise as it is now; what is read as numbers stays, and on the CPU."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return {
        name: t.to(parameter.device, wide, copy=True) if t.ndim and name not in OF_ALL else t.to("cpu", copy=True)
        for name, t in state.items()
    }


def check(layers: Sequence[Layer], given: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise a ``ValueError`` when state by layer name has other layers or sizes than this model."""
    ours = {layer.name: layer for layer in layers}
    if given.keys() != ours.keys():
        differing = ", ".join(sorted(given.keys() ^ ours.keys()))
        raise ValueError(f"the state belongs to another model: these layers are in only one of them: {differing}.")
    for name, tensors in given.items():
        sizes = tuple(tensors[key].shape[-2] for key in ("G", "A") if key in tensors)  # also of columns
        if sizes and sizes != ours[name].shape:
            raise ValueError(
                f"the state belongs to another model: layer {name!r} has factors G, A of sizes {ours[name].shape}, "
                f"the state {sizes}."
            )
        for key in OF_ALL.keys() & tensors.keys():
            if tensors[key].numel() != OF_ALL[key]:
                raise ValueError(
                    f"the state was saved by another version of natgrad: {key!r} of layer {name!r} holds "
                    f"{tensors[key].numel()} numbers, not {OF_ALL[key]}. Load the model alone; natgrad starts anew."
                )


def carry_over(state: MutableMapping[Tensor, dict[str, Any]], before: Sequence[Layer], after: Sequence[Layer]) -> None:
    """What stays when other layers than before are preconditioned: their own, and what all of them share."""
    first = dict(state.get(before[0].parameters[0], {}))
    kept = {layer.parameters[0] for layer in after}
    for parameter in [layer.parameters[0] for layer in before]:
        for name in OF_ALL if parameter in kept else list(state.get(parameter, {})):
            state.get(parameter, {}).pop(name, None)
    if "step" in first:
        for parameter in kept:
            state.setdefault(parameter, {})["step"] = first["step"].clone()
        shared = {name: first[name] for name in OF_ALL if name in first}
        state[after[0].parameters[0]].update(shared)
