"""Spaces of settings, and the trials drawn from them.

Trial 0 is the contestant's defaults, so that tuning never loses to them. The others are points of a scrambled Sobol
sequence (fixed seed), which covers a space more evenly than independent draws: each list of trials is the beginning of
every longer one, and nobody has seen results before it was fixed.

Every space has one more setting, ``decay``: whether the learning rate falls linearly to zero over the run's time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Log:
    """A positive number, its logarithm uniform between two bounds."""

    low: float
    high: float

    def at(self, u: float) -> float:
        """The value at quantile ``u``, to three digits, so that a record shows what was run."""
        return float(f"{math.exp(math.log(self.low) + u * math.log(self.high / self.low)):.3g}")

    def __str__(self) -> str:
        return f"log-uniform in [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True, init=False)
class Choice:
    """One of several values, each as likely."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def at(self, u: float) -> Any:
        """The value at quantile ``u``."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.values))


Space = Mapping[str, Log | Choice]
DECAY = Choice(False, True)


def trials(space: Space, count: int) -> list[dict[str, Any]]:
    """The first ``count`` settings: the defaults, which are {}, and then draws from the space and ``decay``."""
    dimensions = {**space, "decay": DECAY}
    points = torch.quasirandom.SobolEngine(len(dimensions), scramble=True, seed=0).draw(max(count - 1, 1)).tolist()
    draws = [{name: kind.at(u) for (name, kind), u in zip(dimensions.items(), point, strict=True)} for point in points]
    return [{}, *draws][:count]
