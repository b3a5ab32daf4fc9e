"""Where a forward pass drew its dropout from, so that natgrad can look at the same function again."""

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Of each module, the attributes that hold a generator: to look at all of them takes time.
_KNOWN = WeakKeyDictionary[nn.Module, list[str]]()


class Chance:
    """The random streams that a model may draw from, as they are now: of torch and its devices, of Python and of numpy.

    Those that its modules hold as attributes are among them.

    Args:
        model: The module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._devices = _accelerators(model)
        self._own = _generators(model)
        self._states, self._others = self._read(), [*map(_state_of, self._own.others)]

    def if_drawn(self) -> "Chance | None":
        """Itself if the streams have moved on since."""
        others = [*map(_state_of, self._own.others)]
        return None if self._others == others and all(map(torch.equal, self._states, self._read())) else self

    def restore(self) -> None:
        """Put the streams back."""
        of_devices, of_torch = self._states[1 : 1 + len(self._devices)], self._states[1 + len(self._devices) :]
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, of_devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        for generator, state in zip(self._own.of_torch, of_torch, strict=True):
            generator.set_state(state)
        for generator, state in zip(self._own.others, self._others, strict=True):
            _write(generator, state)

    def _read(self) -> list[Tensor]:
        own = [generator.get_state() for generator in self._own.of_torch]
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices), *own]


@contextmanager
def streams_left_alone(model: nn.Module) -> Iterator[None]:
    """What is drawn in here moves none of the streams that a model may draw from."""
    before = Chance(model)
    try:
        yield
    finally:
        before.restore()


class Generators(NamedTuple):
    """What a model may draw from, besides torch's streams of the process.

    Attributes:
        of_torch: Of torch, those that modules hold.
        others: Of Python and of numpy: those of the process, which their modules stand for, and those that are held.
    """

    of_torch: list[torch.Generator]
    others: list[Any]


def _generators(model: nn.Module) -> Generators:
    """Those that are in the attributes that held one when the module was first asked; the loop may put others there."""
    held = dict[Any, None]()
    for module in model.modules():
        if (names := _KNOWN.get(module)) is None:
            # What is made in the first pass is None until then.
            names = _KNOWN[module] = [name for name, value in vars(module).items() if value is None or _draws(value)]
        held |= dict.fromkeys(value for name in names if _draws(value := vars(module).get(name)))
    of_torch = [one for one in held if isinstance(one, torch.Generator)]
    of_process = [random, *([numpy.random] if (numpy := sys.modules.get("numpy")) else [])]
    return Generators(of_torch, [*of_process, *(one for one in held if not isinstance(one, torch.Generator))])


def _draws(value: object) -> bool:
    if isinstance(value, torch.Generator | random.Random):
        return not isinstance(value, random.SystemRandom)  # which has no state
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


def _state_of(stream: Any) -> Any:
    """Of one of Python's or of numpy's; these hold arrays, which cannot be compared as they are."""
    if hasattr(stream, "getstate"):
        return stream.getstate()
    return pickle.dumps(stream.get_state() if hasattr(stream, "get_state") else stream.bit_generator.state)


def _write(stream: Any, state: Any) -> None:
    if hasattr(stream, "setstate"):
        stream.setstate(state)
    elif hasattr(stream, "set_state"):
        stream.set_state(pickle.loads(state))
    else:
        stream.bit_generator.state = pickle.loads(state)


def _accelerators(model: nn.Module) -> list[torch.device]:
    """Those that a model is on and that have a random stream of their own."""
    if not torch.cuda.is_initialized():
        return []
    here = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    return sorted(here, key=str)
