"""What a layer kind is, and the registry of them.

A layer computes z = W x + b at one or more shared positions. Its parameters are one matrix [W b] of shape (out, in +
1), with x extended by a 1; its curvature block is kron(G, A) over the row-major entries of that matrix. Letters: N
data, S positions per datum, ``in`` and ``out`` the sizes of one row.

==================== ================ ===========================
what                 shape            made by
==================== ================ ===========================
rows of A            (N, S, in)       ``inputs`` from the module's input; the 1 is appended later, as a formula
rows of G            (N, S, out)      ``gradients`` from the gradient at the module's output
matrix               (out, in [+ 1])  ``to_matrix`` from tensors shaped like the parameters
==================== ================ ===========================
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn


class Layer(ABC):
    """One module of a registered kind, under its name in the model.

    Attributes:
        name: The module's name in ``model.named_modules()``.
        module: The module.
        parameters: Its trainable parameters, in the order of ``to_matrix``.
        has_bias: Whether the matrix has the bias as its last column.
    """

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    has_bias: bool

    @abstractmethod
    def __init__(self, name: str, module: nn.Module) -> None: ...

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this kind cannot represent ``module`` exactly, or None."""
        return None

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """The module's input as rows: (N, S, in)."""

    @abstractmethod
    def gradients(self, g: Tensor) -> Tensor:
        """A gradient at the module's output as rows: (N, S, out)."""

    @abstractmethod
    def to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like ``parameters`` as one matrix [W b]: (out, in [+ 1])."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of ``to_matrix``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in [+ 1]): the sizes of G and A."""


_REGISTRY: dict[type[nn.Module], type[Layer]] = {}
KindT = TypeVar("KindT", bound=type[Layer])


def register(*modules: type[nn.Module]) -> Callable[[KindT], KindT]:
    """Class decorator: handle ``modules`` (these exact types) by the decorated layer kind."""

    def decorate(kind: KindT) -> KindT:
        _REGISTRY.update(dict.fromkeys(modules, kind))
        return kind

    return decorate


def registered(module: nn.Module) -> type[Layer] | None:
    """The kind registered for the module's type, or None."""
    return _REGISTRY.get(type(module))


def registered_names() -> str:
    """The registered module types, for messages."""
    return ", ".join(sorted(module.__name__ for module in _REGISTRY))
