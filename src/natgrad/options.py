"""What :class:`~natgrad.Preconditioner` and :class:`~natgrad.KFAC` both understand, and what is refused."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, TypeGuard, get_args

import torch
from torch import Tensor, nn

from natgrad.batch import Fisher
from natgrad.distributed import Distributed
from natgrad.inverses import INVERSES
from natgrad.layers import Sharing
from natgrad.likelihoods import Likelihood
from natgrad.schedule import Period


class CurvatureOptions(TypedDict, total=False):
    """The keywords; documented at :class:`~natgrad.Preconditioner`."""

    fisher: Fisher
    mc_samples: int
    inverse: str
    factor_decay: float | Literal["auto"]
    curvature_period: Period
    inverse_period: Period
    batch_fraction: float | Literal["auto"]
    sharing: Sharing | dict[str, Sharing]
    output: Callable[[Any], Any] | None
    seed: int


def module_of(given: object) -> nn.Module:
    """What is called in the training loop; a ``TypeError`` for what is no module, or shows none of its layers."""
    model = given.model if isinstance(given, Distributed) else given
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be the model itself, a torch.nn.Module, not a {type(model).__name__}: natgrad watches its "
            "layers. To train only some of its parameters, pass them as `params=` besides."
        )
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise TypeError(
            "`model` is a torch.nn.DataParallel of several devices, whose replicas run in threads and cannot be "
            "watched: use torch.nn.parallel.DistributedDataParallel, as torch itself recommends, or one device."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "`model` was scripted or traced, and its layers cannot be watched any more: give natgrad the module that "
            "it was made from, and script that once the optimizer is gone (`del optimizer`)."
        )
    return model


def check_names(given: Mapping[str, object]) -> None:
    """Raise a ``TypeError`` for an option that :class:`~natgrad.KFAC` does not have."""
    known = CurvatureOptions.__annotations__
    for name in given.keys() - known.keys():
        raise TypeError(
            f"natgrad.KFAC has no option {name!r}; of the curvature it has {', '.join(known)}. AdamW's, for parameters "
            'without a layer, belong in a group of these among the `params`, {"params": …, "fallback": True}.'
        )


def check_fisher(fisher: str, likelihood: Likelihood | None) -> None:
    """Raise a ``ValueError`` for an unknown Fisher, or one that needs a loss and has none."""
    if fisher not in get_args(Fisher):
        raise ValueError(f"`fisher` must be one of {get_args(Fisher)}, not {fisher!r}.")
    if likelihood is None and fisher in ("mc", "exact"):
        raise ValueError(
            f'`fisher="{fisher}"` needs to know the loss: pass `loss="cross_entropy"`, a torch loss module or a '
            '`natgrad.likelihoods.Likelihood`, or use `fisher="empirical"`, which needs none.'
        )


def check_inverse(inverse: str, fisher: Fisher) -> None:
    """Raise a ``ValueError`` for an unknown inverse, or one that has nothing to work with."""
    if inverse not in INVERSES:
        raise ValueError(f"`inverse` must be one of {tuple(INVERSES)}, not {inverse!r}.")
    if inverse == "ekfac" and fisher == "forward":
        raise ValueError('`inverse="ekfac"` needs gradients, and `fisher="forward"` has none: use another of the two.')


def check_numbers(kl_clip: object, factor_decay: object, batch_fraction: object, seed: object) -> None:
    """Raise a ``ValueError`` for a number out of its range."""
    if not isinstance(seed, int):
        raise ValueError(f"`seed` must be a whole number, not {seed!r}.")
    if factor_decay != "auto" and not (is_number(factor_decay) and 0 <= factor_decay < 1):
        raise ValueError(f'`factor_decay` must be in [0, 1) or "auto", not {factor_decay!r}.')
    if batch_fraction != "auto" and not (is_number(batch_fraction) and 0 < batch_fraction <= 1):
        raise ValueError(f'`batch_fraction` must be in (0, 1] or "auto", not {batch_fraction!r}.')
    if kl_clip is not None and not (is_number(kl_clip) and kl_clip > 0):
        raise ValueError(f"`kl_clip` must be positive or None, not {kl_clip!r}.")


def check_positive(**given: int) -> None:
    """Raise a ``ValueError`` for a keyword that is not a whole number from one on."""
    for name, number in given.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, not {number!r}.")


def check_periods(**periods: Period) -> None:
    """Raise a ``ValueError`` for a keyword that is neither a number of steps nor ``"auto"``."""
    check_positive(**{name: period for name, period in periods.items() if period != "auto"})


def is_number(value: object) -> TypeGuard[float]:
    """Whether a keyword, which may also be a word or a switch, is a number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_rate(name: str, value: object, word: str | None = None, below: float = math.inf) -> None:
    """Raise a ``ValueError`` for a rate that is neither ``word`` nor in [0, below), perhaps as a tensor."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not (number == word if isinstance(number, str) else is_number(number) and 0 <= number < below):
        what = "a non-negative number" + (f" less than {below:g}" if below < math.inf else "")
        raise ValueError(f"`{name}` must be {what}{f' or {word!r}' if word else ''}, not {value!r}.")
