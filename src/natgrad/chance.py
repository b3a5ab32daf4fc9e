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
        self._states, self._others = self._read(), self._read_others()

    def if_drawn(self) -> "Chance | None":
        """Itself if the streams have moved on since."""
        stayed = all(map(torch.equal, self._states, self._read())) and self._others == self._read_others()
        return None if stayed else self

    def restore(self) -> None:
        """Put the streams back."""
        of_devices, of_torch = self._states[1 : 1 + len(self._devices)], self._states[1 + len(self._devices) :]
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, of_devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        for generator, state in zip(self._own.of_torch, of_torch, strict=True):
            generator.set_state(state)
        (of_python, of_numpy), *others = self._others
        for generator, state in zip(self._own.others, others, strict=True):
            _write(generator, state)
        random.setstate(of_python)
        if of_numpy is not None:
            sys.modules["numpy"].random.set_state(_unpacked(of_numpy))

    def _read(self) -> list[Tensor]:
        own = [generator.get_state() for generator in self._own.of_torch]
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices), *own]

    def _read_others(self) -> list[Any]:
        return [_other_streams(), *map(_state_of, self._own.others)]


@contextmanager
def streams_left_alone(model: nn.Module) -> Iterator[None]:
    """What is drawn in here moves none of the streams that a model may draw from."""
    before = Chance(model)
    try:
        yield
    finally:
        before.restore()


class Generators(NamedTuple):
    """What the modules of a model draw from, besides the streams of the process.

    Attributes:
        of_torch: Of torch.
        others: Of Python and of numpy.
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
    own = [one for one in held if isinstance(one, torch.Generator)]
    return Generators(own, [one for one in held if not isinstance(one, torch.Generator)])


def _draws(value: object) -> bool:
    if isinstance(value, torch.Generator | random.Random):
        return not isinstance(value, random.SystemRandom)  # which has no state
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


def _state_of(generator: Any) -> bytes:
    # Numpy's may hold arrays, which cannot be compared as they are.
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    return pickle.dumps(generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state())


def _write(generator: Any, state: bytes) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(pickle.loads(state))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = pickle.loads(state)
    else:
        generator.set_state(pickle.loads(state))


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
