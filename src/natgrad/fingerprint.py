"""A number by which the inputs of one forward pass are told from those of another."""

import math
import zlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# So many entries of each input are looked at.
ENTRIES = 4096


def fingerprint(arguments: Any) -> float:
    """A number that other inputs hardly have, nor these in another order; NaN if some cannot be read.

    That is what is neither a tensor nor a number nor a word. Of sparse tensors the values are read, not their places.
    """
    total = 0.0
    for place, leaf in enumerate(tree_leaves(arguments), start=1):
        if isinstance(leaf, Tensor):
            if (flat := _numbers(leaf.detach()).reshape(-1)).numel():
                chosen, weights = _entries(flat.numel(), flat.device)
                total += place * float((flat if chosen is None else flat[chosen]).float() @ weights)
        elif leaf is None or isinstance(leaf, int | float | str):
            total += place * zlib.crc32(repr(leaf).encode()) / 2**32
        else:
            return math.nan
    return total


def _numbers(tensor: Tensor) -> Tensor:
    """Those that a tensor holds, real ones."""
    if tensor.layout is not torch.strided:
        tensor = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@lru_cache(maxsize=32)
def _entries(size: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Which entries of so many, None for all, and what each is multiplied by.

    At random, lest a regular pattern meet the black border of images only.
    """
    chosen = None
    if size > ENTRIES:
        chosen = torch.randint(size, (ENTRIES,), generator=torch.Generator().manual_seed(0)).sort().values.to(device)
    return chosen, torch.arange(1.0, min(size, ENTRIES) + 1, dtype=torch.float32).sin().to(device)
