"""Where a forward pass drew its dropout from, so that natgrad can look at the same function again."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Chance:
    """The random streams that a model may draw from, as they are now: of torch and its devices, of Python and of numpy.

    Args:
        model: The module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._devices = _accelerators(model)
        self._states, self._others = self._read(), _other_streams()

    def if_drawn(self) -> "Chance | None":
        """Itself if the streams have moved on since."""
        stayed = all(map(torch.equal, self._states, self._read())) and self._others == _other_streams()
        return None if stayed else self

    def restore(self) -> None:
        """Put the streams back."""
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, self._states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        of_python, of_numpy = self._others
        random.setstate(of_python)
        if of_numpy is not None:
            sys.modules["numpy"].random.set_state(_unpacked(of_numpy))

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]


@contextmanager
def streams_left_alone(model: nn.Module) -> Iterator[None]:
    """What is drawn in here moves none of the streams that a model may draw from."""
    before = Chance(model)
    try:
        yield
    finally:
        before.restore()


def _accelerators(model: nn.Module) -> list[torch.device]:
    """Those that a model is on and that have a random stream of their own."""
    if not torch.cuda.is_initialized():
        return []
    here = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    return sorted(here, key=str)


def _other_streams() -> tuple[Any, tuple[Any, ...] | None]:
    """The global ones of Python and of numpy; None if nobody has imported that."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate(), None
    kind, keys, *rest = numpy.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest)


def _unpacked(state: tuple[Any, ...]) -> tuple[Any, ...]:
    kind, keys, *rest = state
    return (kind, sys.modules["numpy"].frombuffer(keys, dtype="uint32"), *rest)
