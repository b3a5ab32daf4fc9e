"""Stage 3, where a loss module is watched: forward passes whose output it has not seen yet."""

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from natgrad.forward import Forward
from natgrad.outputs import Origin, met_first

# They hold their graphs. More were evaluated, most likely.
MOST = 4

# Of torch's loss modules, in this order; and what one of them calls its input.
ARGUMENTS, LOG_INPUT = ("input", "target", "var"), "log_input"


class Waiting:
    """Forward passes in the order in which they were made, the latest ones only."""

    def __init__(self) -> None:
        self._passes = deque[tuple[Forward, list[GradientEdge]]]()

    def add(self, forward: Forward, origins: Sequence[Origin]) -> None:
        """A pass more.

        Args:
            forward: The pass.
            origins: Where the gradient of the user's loss would arrive.
        """
        if len(self._passes) == MOST:
            oldest, _ = self._passes.popleft()
            oldest.ear.is_forgotten = True
        edges = [get_gradient_edge(origin.tensor) for origin in origins if origin.tensor.requires_grad]
        self._passes.append((forward, edges))

    def take(self, forward: Forward) -> bool:
        """Let a pass go; whether it waited."""
        before = len(self._passes)
        self._passes = deque((one, edges) for one, edges in self._passes if one is not forward)
        return len(self._passes) < before

    def clear(self) -> None:
        """Let all go."""
        self._passes.clear()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._passes)

    def made(self, seen: Tensor) -> Forward | None:
        """The pass of whose output a tensor was made; None if it is another network's."""
        edges = [edge for _, edges in self._passes for edge in edges]
        owners = [forward for forward, edges in self._passes for _ in edges]
        met = met_first(get_gradient_edge(seen), edges)
        return owners[max(met)] if met else None


def given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a loss module was called with: its input, and targets and variances."""
    named = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    seen = named[ARGUMENTS[0] if ARGUMENTS[0] in named else LOG_INPUT]
    return seen, tuple(named[name] for name in ARGUMENTS[1:] if name in named)


@cache
def tell_of_forgotten() -> None:
    """Warn of a backward pass through one that did not wait any more."""
    warnings.warn(
        f"natgrad: more than {MOST} forward passes were made before the loss module was called with the output of the "
        "first, so that its curvature is lost: call the loss module after each pass, or declare the loss by name, such "
        'as "cross_entropy".',
        RuntimeWarning,
        stacklevel=3,
    )
