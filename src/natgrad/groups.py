"""Beside stage 8: which parameters are trained, and at which rate.

A user's parameter group becomes one or two: the parameters that belong to a layer, with a rate of the natural gradient,
and the rest, ``fallback=True``, which AdamW trains with a rate of its own. Each keeps what else its group said.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from natgrad.layers.partition import Partition
from natgrad.options import check_rate

# Ten times AdamW's own default: steps are fewer, and what has no layer is mostly a scale or a table.
FALLBACK_RATE = 1e-2
# Of the whole optimizer, not of a group.
WHOLE = ("momentum", "damping", "kl_clip")

Group = dict[str, Any]


def split(group: Mapping[str, Any], parts: Partition, names: Mapping[nn.Parameter, str]) -> list[Group]:
    """The groups that a user's group means.

    Args:
        group: As for every torch optimizer, and perhaps ``fallback``.
        parts: Which parameters belong to a layer.
        names: Of all parameters of the model.

    Raises:
        TypeError: when it is no group, is not ordered, or holds something else than parameters.
        ValueError: for a parameter that is not the model's or has sparse gradients, or a setting that a group cannot
            have.
    """
    if not isinstance(group, Mapping) or "params" not in group:
        there = f"only {list(group)}" if isinstance(group, Mapping) else f"a {type(group).__name__}"
        raise TypeError(f'a parameter group must be {{"params": …}}, perhaps with settings of its own, not {there}.')
    if group.get("maximize"):
        raise ValueError(
            "`maximize`: natgrad minimizes; give it the negative objective, declared as such, as its loss."
        )
    chosen = _parameters(group["params"], names)
    in_layer = {p for layer in parts.layers for p in layer.parameters}
    fallback = [p for p in chosen if group.get("fallback") or p not in in_layer]
    if sparse := [names[p] for p in fallback if parts.reasons.get(names[p], "").startswith("sparse")]:
        raise ValueError(
            f"{sparse[0]!r} has sparse gradients, which AdamW cannot take: leave `sparse=True` out of its embedding, "
            "or leave it out of `params` and let torch.optim.SparseAdam train it."
        )
    left = set(fallback)
    layers = [p for p in chosen if p not in left]
    both = bool(layers and fallback)
    groups: list[Group] = []
    if layers:
        if given := [name for name in WHOLE if name in group]:
            raise ValueError(f"`{given[0]}` is the same for all layers: pass it to `KFAC` itself, not in a group.")
        if "betas" in group:
            raise ValueError(
                "`betas` are AdamW's: give them in a group of its own parameters, those without a layer, or in one "
                'with "fallback": True.'
            )
        groups.append({**group, "params": [(names[p], p) for p in layers], "fallback": False})
    if fallback or not chosen:
        rate = FALLBACK_RATE if both else group.get("lr", FALLBACK_RATE)
        groups.append({**group, "params": [(names[p], p) for p in fallback], "lr": rate, "fallback": True})
    for one in groups:
        for name in ("lr", "weight_decay"):
            check_rate(name, one.get(name, 0.0))
    return groups


def _parameters(given: Any, names: Mapping[nn.Parameter, str]) -> list[nn.Parameter]:
    if isinstance(given, set):
        raise TypeError("parameters need an order, which sets have not: pass a list.")
    each: list[Any] = [given] if isinstance(given, Tensor) else [p[1] if isinstance(p, tuple) else p for p in given]
    for parameter in each:
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(f"a parameter group holds {type(parameter).__name__}, which is no parameter.")
        if parameter not in names:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is not part of the model that natgrad was given: "
                "register it there, or give it to another optimizer."
            )
    return list(dict.fromkeys(each))


def relative_rates(
    groups: Sequence[Group], natural: Mapping[nn.Parameter, Tensor]
) -> tuple[float, dict[nn.Parameter, float]]:
    """The largest rate among the layers that take a step, and that of each parameter in units of it."""
    rates = {p: float(group["lr"]) for group in groups for p in group["params"] if p in natural}
    top = max(rates.values(), default=0.0)
    return top, {p: rate / top if top else 1.0 for p, rate in rates.items()}


def tell_of_untrained(names: Sequence[str]) -> None:
    """Warn of parameters, by name, that have a gradient and no group."""
    warnings.warn(
        f"natgrad: {', '.join(names[:3])}{' and others' * (len(names) > 3)} got a gradient, and will not be trained, "
        "as they were frozen, or not there, when the optimizer was made: add them by "
        '`optimizer.add_param_group({"params": …})`.',
        UserWarning,
        stacklevel=5,
    )
