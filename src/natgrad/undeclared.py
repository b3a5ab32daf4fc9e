"""Stage 7, beside the quadratic model: terms of the loop's loss that natgrad was not told of.

A loop may add to the declared loss what does not depend on the outputs, such as a penalty on the parameters. The
gradients of the parameters have it, those at the outputs have not, so that along a direction d

    (slope of the rest) = gᵀd − g_f · (J d),

exactly so on all data of a batch. The curvature of the rest is seen along the previous step v, as its slope there is
not what it was at the start of v; per squared length it is taken to be the same in every direction, which it is for a
squared penalty.

Whether there is a rest is looked for where steps are refused one after the other: they may have to raise the declared
loss. From there on the model is of all data.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad.local_model import LocalModel
from natgrad.memory import Kept, State
from natgrad.quadratic import Rest

# So many steps in a row that are refused are no chance.
PATIENCE = 3
# A rest is one if it has this share of the slope, or more, and this share of the terms that nearly cancel in it.
LEAST_SHARE, ROUNDING = 0.1, 0.01
# Of the running average of its curvature.
DECAY = 0.5
# How long a step is at most, in units of the parameters' own length: before the rest's curvature is known, and where a
# rest has kinks, nothing else bounds it.
REACH = 0.1

Directions = Sequence[dict[str, Tensor]]


class Found(NamedTuple):
    """What steps have shown of the rest.

    Attributes:
        refused: The number of steps that were refused in a row; it stays at ``PATIENCE`` once a rest was found.
        bend: Curvature of the rest per squared length.
        start: Its slope along the latest step where that began; NaN if that is not known.
    """

    refused: float = 0.0
    bend: float = 0.0
    start: float = math.nan


class Undeclared:
    """What is known of the rest.

    Args:
        state: Of the first layer's first parameter, see :mod:`natgrad.memory`.
    """

    _found = Kept(Found)

    def __init__(self, state: State) -> None:
        self.state = state
        self._latest: Rest | None = None  # along the directions of this step

    @property
    def is_found(self) -> bool:
        """Whether there is a rest."""
        return self._found.refused >= PATIENCE

    def along(self, local: LocalModel, directions: Directions, b: Tensor) -> Rest | None:
        """The rest along the directions whose curvature ``local`` has just measured; None if there is none.

        Args:
            local: Of the declared loss, on all data of the batch.
            directions: By parameter name; the last, if there are several, is the latest step.
            b: Slopes of the loop's loss along them.
        """
        own = local.slopes(directions) if self.is_found else None
        if own is None:
            return None
        slopes, squares = b - own[0], _products(directions)
        _, bend, start = self._found
        if not math.isnan(start) and len(b) > 1 and squares[-1, -1] > 0:
            seen = max(float((slopes[-1] - start) / squares[-1, -1]), 0.0)
            bend = DECAY * bend + (1 - DECAY) * seen if bend else seen
        self._found = Found(PATIENCE, bend)
        self._latest = Rest(slopes, squares, bend, REACH * local.size_of(directions[0]))
        return self._latest

    def took(self, c: Tensor) -> None:
        """Note that a step was taken along the directions, by its coefficients."""
        if self.is_found:
            start = math.nan if self._latest is None else float(self._latest.slopes @ c)
            self._found = self._found._replace(start=start)
        elif self._found.refused:
            self._found = Found()

    def parts(self, c: Tensor) -> tuple[float, float]:
        """Slope of the rest along a step, and by how much that rises."""
        one = self._latest
        return (0.0, 0.0) if one is None else (float(one.slopes @ c), float(c @ one.curvature @ c))

    def refused(self, of_all: Callable[[], LocalModel], directions: Directions, b: Tensor) -> None:
        """Note that no step was taken; after several, look for a rest.

        Args:
            of_all: Makes the model of the declared loss, on all data of the batch.
            directions: As for ``along``.
            b: Likewise.
        """
        count, bend, _ = self._found
        if self.is_found or count + 1 < PATIENCE:
            self._found = Found(min(count + 1, PATIENCE), bend)
            return
        local = of_all()
        local.curvature(directions)
        own = local.slopes(directions)
        if own is None:
            self._found = Found()
            return
        (slope, *_), (size, *_) = own.tolist()
        there = abs(float(b[0]) - slope) > max(LEAST_SHARE * abs(float(b[0])), ROUNDING * size)
        self._found = Found(PATIENCE if there else 0)
        if there:
            warnings.warn(
                "natgrad: the loop's loss has terms that `loss` and `output` do not tell of, which makes steps slower. "
                "Declare a sum over several outputs by a dictionary of losses by the keys of the outputs, and use "
                "`weight_decay` in place of a squared penalty. Where there are none, the loop forgets `zero_grad()` "
                "or edits gradients, and rates have to be given: `lr=0.1, momentum=0.9, kl_clip=1e-3`.",
                RuntimeWarning,
                stacklevel=2,
            )

    def forget(self) -> None:
        """The latest step is none of the directions, or nobody looked."""
        if self.is_found:
            self._found = self._found._replace(start=math.nan)


def _products(directions: Directions) -> Tensor:
    """Of each direction with each, (k, k) in float64."""
    flat = [torch.cat([part.flatten() for part in direction.values()]).double() for direction in directions]
    return torch.stack([torch.stack([one @ other for other in flat]) for one in flat]).cpu()
