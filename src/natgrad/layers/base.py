"""What a layer kind is, and the registry of them.

A layer computes z = W x + b at one or more shared positions. Its parameters are one matrix [W b] of shape (out, in +
1), with x extended by a 1; its curvature block is kron(G, A) over the row-major entries of that matrix. Letters: N
data, S positions per datum, ``in`` and ``out`` the sizes of one row. Some kinds have several such matrices side by
side, one a group of channels or a projection: then everything has a leading dimension B of independent blocks.

==================== ====================== =================================================================
what                 shape                  made by
==================== ====================== =================================================================
calls                                       ``watch``, which reports the module's inputs and outputs
rows of A            ([B,] N, S, in)        ``inputs`` from what was reported; the 1 is appended later, as a formula
rows of G            ([B,] N, S, out)       ``gradients`` from the gradient at the reported output
matrix               ([B,] out, in [+ 1])   ``to_matrix`` from gradients shaped like the parameters
==================== ====================== =================================================================
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from natgrad.distributed import is_fsdp
from natgrad.layers.moments import Moment, Sharing, moment
from natgrad.layers.spectrum import Bases, squared_gradients, squared_length
from natgrad.torch_internals import is_transformed

# A factor of more dimensions than this is kept as a diagonal: on one core a dense one of 5,000, of a vocabulary, makes
# steps ten times as long and no better (`docs/decisions.md`). So is one of more than MAX_UNEVEN, if it is UNEVEN times
# as large as the layer's other factor: its inverse costs its cube, for few parameters.
MAX_DENSE, MAX_UNEVEN, UNEVEN = 4096, 2560, 16


# What a subclass may override and compute the same: what makes or prints a module, and what Python gives every class.
HARMLESS = {"__init__", "reset_parameters", "__repr__", "extra_repr"}
HARMLESS |= {"__class__", "__init_subclass__", "__subclasshook__"}


class Recorder(Protocol):
    """Where a layer reports its calls."""

    def wants(self, layers: "Iterable[Layer]") -> bool:
        """Whether calls of some of these are wanted now."""

    def record(
        self, layer: "Layer", x: Tensor, z: Tensor, blocks: slice = slice(None), source: Tensor | None = None
    ) -> None:
        """Report that ``layer`` made the output z from the input x.

        Args:
            layer: Whose ``inputs`` and ``gradients`` make the rows.
            x: What ``inputs`` takes; data first.
            z: A tensor of the autograd graph, whose gradient ``gradients`` takes.
            blocks: Which of the B blocks took part.
            source: The input in the autograd graph, if z is the matrix times it.
        """


class Layer(ABC):
    """Parameters of one module as one matrix, under the module's name in the model.

    Attributes:
        name: The module's name in ``model.named_modules()``, with a suffix where a module has several layers.
        module: The module.
        parameters: The trainable parameters, in the order of ``to_matrix``.
        has_bias: Whether the matrix has the bias as its last column.
        blocks: B, or None without that dimension.
        wrapper: The layer that this one's rows count for, if it is another one.
        data_dim: Of the data in a reported output; in what is remembered of an input they are first.
        per_datum: Whether rows of x and of the output's gradient make up the gradient of each datum.
        is_linear: Whether the output is the matrix times the input.
        of_derivative: Whether the rows are of a derivative that the network takes of itself.
        transposed: Whether they are rows of a use of the transposed matrix.
        sees_states: Whether what it sees are hidden states, which begin as zeros.
    """

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    has_bias: bool
    blocks: int | None = None
    wrapper: "Layer | None" = None
    data_dim = 0
    per_datum = True
    is_linear = of_derivative = transposed = sees_states = False

    @classmethod
    def split(cls, name: str, module: nn.Module) -> "Sequence[Layer]":
        """The layers of one module; most have one."""
        return [cls(name, module)]  # type: ignore[call-arg]  # subclasses take the name and the module

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this kind cannot represent ``module``, or None."""
        return None

    def watch(self, recorder: Recorder) -> list[RemovableHandle]:
        """Report every call of the module to ``recorder`` until the returned handles are removed."""
        # Before all others: a hook of the user's may return something else than the layer's own output.
        return [self.module.register_forward_hook(partial(self._report, recorder), with_kwargs=True, prepend=True)]

    def _report(
        self, recorder: Recorder, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor
    ) -> None:
        if recorder.wants([self]):
            if is_transformed():
                raise RuntimeError(
                    f"layer {self.name!r} was called inside a transform of torch.func (vmap, grad, jvp, hessian, …), "
                    "where natgrad cannot see its data. Call the module on the whole batch, and take derivatives by "
                    "`torch.autograd.grad(…, create_graph=True)`: these are seen."
                )
            x = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
            recorder.record(self, self.remember(x.detach(), z), z, source=x if self.is_linear else None)

    @property
    def owner(self) -> "Layer":
        """The layer that this one's rows count for: itself, or what it is wrapped in."""
        return self if self.wrapper is None else self.wrapper.owner

    def swaps(self, use: "Layer") -> bool:
        """Whether ``use``, whose rows count for this layer, has its matrix transposed: its A then belongs to G."""
        return use.transposed

    def remember(self, x: Tensor, z: Tensor) -> Tensor:
        """What to keep of an input until the gradient arrives: data first, so that some of them can be selected."""
        return x

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """What was remembered as rows: ([B,] N, S, in)."""

    @abstractmethod
    def gradients(self, g: Tensor, x: Tensor) -> Tensor:
        """The gradient at an output as rows, ([B,] N, S, out), given what was remembered of the input."""

    @abstractmethod
    def to_matrix(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients of ``parameters`` as one matrix: ([B,] out, in [+ 1])."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """A step of the matrix as steps of ``parameters``."""

    def step_to_matrix(self, steps: Sequence[Tensor]) -> Tensor:
        """What steps of ``parameters`` do to the matrix, to first order: undoes ``from_matrix``."""
        return self.to_matrix(steps)

    @property
    def trained(self) -> bool:
        """Whether all parameters are; otherwise they are none of natgrad's."""
        return all(parameter.requires_grad for parameter in self.parameters)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in [+ 1]): the sizes of G and A."""

    @property
    def channels(self) -> int:
        """Number of entries of a reported output for each datum and position."""
        return self.shape[0] * (self.blocks or 1)

    @property
    def diagonal(self) -> tuple[bool, bool]:
        """Whether G and A are kept as diagonals."""
        out, width = self.shape
        return _is_too_large(out, width), _is_too_large(width, out)

    @property
    def dense_dimension(self) -> int:
        """Size of the larger factor that is kept as a matrix; 1 if none is."""
        return max([1, *(size for size, diagonal in zip(self.shape, self.diagonal, strict=True) if not diagonal)])

    @property
    def is_vector(self) -> bool:
        """Whether the matrix is a single column, as scale and shift of a normalization are together."""
        return self.shape[1] == 1

    @property
    def inversion_cost(self) -> int:
        """Of both factors, up to a constant: the sum of their cubed sizes."""
        return (self.blocks or 1) * sum(1 if self.diagonal[side] else self.shape[side] ** 3 for side in (0, 1))

    def input_moment(self, rows: Tensor, sharing: Sharing) -> Moment:
        """What rows made by ``inputs`` add to A."""
        return moment(rows, self.has_bias, sharing, self.diagonal[1])

    def gradient_moment(self, rows: Tensor, sharing: Sharing) -> Tensor:
        """What rows made by ``gradients`` add to G."""
        return moment(rows, False, sharing, self.diagonal[0]).total

    def squared_gradients(self, x: Tensor, g: Tensor, bases: Bases) -> Tensor:
        """Second moments of the data's gradients in a basis, ([B,] out, in [+ 1]), of rows that belong together."""
        return squared_gradients(x, g, bases)

    def squared_length(self, x: Tensor, g: Tensor, metrics: Bases) -> Tensor:
        """Sum over data of the squared lengths of their gradients, in the metric P_A, P_G of the two sides."""
        return squared_length(x, g, metrics)


class WeightLayer(Layer):
    """A layer whose module has a ``weight`` and perhaps a ``bias``, one entry for each row of the matrix."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        weight, bias = module.weight, getattr(module, "bias", None)
        self.has_bias = bias is not None and bias.requires_grad
        self.parameters = [cast(nn.Parameter, p) for p in ([weight, bias] if self.has_bias else [weight])]


_REGISTRY: dict[type[nn.Module] | str, type[Layer]] = {}
KindT = TypeVar("KindT", bound=type[Layer])


def register(*modules: type[nn.Module] | str) -> Callable[[KindT], KindT]:
    """Class decorator: handle ``modules`` by the decorated layer kind.

    Args:
        *modules: Module types, which stand for subclasses that compute as they do; or the name of a class that need
            not be importable.
    """

    def decorate(kind: KindT) -> KindT:
        _REGISTRY.update(dict.fromkeys(modules, kind))
        return kind

    return decorate


def registered(module: nn.Module) -> type[Layer] | None:
    """The kind registered for the module's type, seen through parametrizations, or None."""
    kind = type(module)
    if is_fsdp(module):
        kind = kind.__mro__[2]  # torch derives a class from FSDPModule and the user's
    if parametrize.is_parametrized(module):
        kind = kind.__mro__[1]  # torch derives a class for each parametrized module
    if exact := _REGISTRY.get(kind) or _REGISTRY.get(kind.__name__):
        return exact
    base = next((base for base in kind.__mro__ if base in _REGISTRY), None)
    return None if base is None or not _computes_as(kind, base) else _REGISTRY[base]


def _computes_as(kind: type, base: type) -> bool:
    """Whether a subclass overrides nothing but what makes or prints a module.

    The output projection of ``nn.MultiheadAttention`` is one, and is never called itself.
    """
    names = {name for one in base.__mro__ for name, value in vars(one).items() if callable(value)} - HARMLESS
    own = all(getattr(kind, name) is getattr(base, name) for name in names)
    return own and kind is not NonDynamicallyQuantizableLinear


def registered_names() -> str:
    """The registered module types, for messages."""
    return ", ".join(sorted(kind if isinstance(kind, str) else kind.__name__ for kind in _REGISTRY))


def _is_too_large(size: int, other: int) -> bool:
    """Whether a factor is kept as a diagonal, for its size and that of the other one of the layer."""
    return size > MAX_DENSE or (size > MAX_UNEVEN and size > UNEVEN * other)
