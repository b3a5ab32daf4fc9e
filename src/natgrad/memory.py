"""Beside stage 7: what controllers remember of the whole network from one step to the next.

Each keeps small records of named numbers, and writes none but its own. In the optimizer's state, that of the first
layer's first parameter, a record is one tensor, so that every tool that copies or saves tensors takes it along.
"""

from collections.abc import Callable, MutableMapping
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor

State = MutableMapping[str, Any]
RecordT = TypeVar("RecordT", bound=tuple[float, ...])


class Controller(Protocol):
    """Whoever remembers something.

    Attributes:
        state: Of the first layer's first parameter.
    """

    state: State


class Kept(Generic[RecordT]):
    """An attribute of a controller that outlives it; until it is set, the record of the defaults.

    Args:
        kind: Of record: a ``NamedTuple`` of numbers that all have defaults. They are float32 once they are kept.
    """

    name: str

    def __init__(self, kind: Callable[..., RecordT]) -> None:
        self.kind = kind

    def __set_name__(self, _: type, attribute: str) -> None:
        self.name = attribute.removeprefix("_")

    @overload
    def __get__(self, controller: None, _: type) -> "Kept[RecordT]": ...
    @overload
    def __get__(self, controller: Controller, _: type) -> RecordT: ...
    def __get__(self, controller: Controller | None, _: type) -> "RecordT | Kept[RecordT]":
        if controller is None:
            return self
        return self.kind(*controller.state[self.name].tolist()) if self.name in controller.state else self.kind()

    def __set__(self, controller: Controller, record: RecordT) -> None:
        controller.state[self.name] = number(*record)


def number(*values: float) -> Tensor:
    """One or several numbers as they are kept, whatever torch's defaults are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def sizes(*controllers: type) -> dict[str, int]:
    """Of the records that such controllers keep, by name."""
    kept = [one for controller in controllers for one in vars(controller).values() if isinstance(one, Kept)]
    return {one.name: len(one.kind()) for one in kept}
