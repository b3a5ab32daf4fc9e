"""Beside stage 8: how an optimizer's state comes back from a checkpoint, bitwise, whatever torch makes of it.

Torch's ``load_state_dict`` casts tensors to the dtype of their parameter, or else shares their memory, and takes over
every group as it was. Two hooks around it see to the rest: the one looks at what arrives before anything is loaded, the
other puts it where it belongs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from natgrad import state as states
from natgrad.preconditioner import Preconditioner

# Of each group: whether its ``lr`` multiplies a rate that is chosen for the step.
AUTOMATIC = "automatic_lr"


@contextmanager
def bitwise(optimizer: torch.optim.Optimizer, pre: Preconditioner) -> Iterator[None]:
    """In here the optimizer's ``load_state_dict`` loads every tensor in its own dtype, and nothing that does not fit.

    Args:
        optimizer: Whose groups are natgrad's.
        pre: Its preconditioner.
    """
    arrived = dict[Tensor, dict[str, Tensor]]()

    def look(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
        _check_groups(optimizer.param_groups, given["param_groups"])
        saved = [index for group in given["param_groups"] for index in group["params"]]
        ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, ours, strict=False):
            arrived[parameter] = states.known(given["state"].get(index, {}))
        states.check(pre.layers, {layer.name: arrived.get(layer.parameters[0], {}) for layer in pre.layers})

    def keep(_: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if group["fallback"]:  # AdamW wants the dtype of the parameter, and says itself what is on its device
                    optimizer.state[p] = {name: optimizer.state[p][name].clone() for name in arrived[p]}
                else:
                    optimizer.state[p] = states.copied(arrived[p], p)
        pre.resume()

    # The user's hooks may change what is loaded, and may see what was.
    handles = [
        optimizer.register_load_state_dict_pre_hook(look),
        optimizer.register_load_state_dict_post_hook(keep, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_groups(ours: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Raise a ``ValueError`` for groups of another optimizer, or whose ``lr`` meant something else."""
    if any("fallback" not in group for group in saved):
        raise ValueError(
            "the state was saved by another optimizer than natgrad.KFAC: load the model alone; natgrad starts anew."
        )
    for mine, group in zip(ours, saved, strict=False):
        if group.get(AUTOMATIC, mine[AUTOMATIC]) != mine[AUTOMATIC]:
            there, here = ("chosen", "given") if group[AUTOMATIC] else ("given", "chosen")
            raise ValueError(
                f"the state was saved with a rate that was {there}, and `lr` of this optimizer is {here}: construct it "
                f"with `lr={'auto' if group[AUTOMATIC] else group['lr']!r}`, or load the model alone."
            )
