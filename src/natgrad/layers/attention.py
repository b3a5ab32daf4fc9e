"""``nn.MultiheadAttention``: its projections, which the module applies as functions, so that hooks on them never fire.

Inside, torch calls ``functional.linear`` with slices of ``in_proj_weight`` and with ``out_proj.weight``. While such a
module runs, a stand-in for that function tells these calls by the memory of their weight, lets torch compute them and
reports them. The packed input projection is one layer of B = 3 blocks, for query, key and value: their outputs meet
different gradients, and in cross-attention different inputs. Separate input projections (``kdim`` or ``vdim``) are a
layer each; the bias that they share is left to the fallback. All tensors inside have the sequence first: (L, N, embed).
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from natgrad.layers.base import Layer, Recorder, register

Linear: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``torch.nn.functional.linear``."""


@register(nn.MultiheadAttention)
class ProjectionLayer(Layer):
    """One weight of the module, (B · out, in), with its bias if it has one of its own."""

    module: nn.MultiheadAttention
    data_dim = 1

    def __init__(
        self, name: str, module: nn.MultiheadAttention, weight: nn.Parameter, bias: Tensor | None, blocks: int
    ):
        self.name, self.module = name, module
        self.has_bias = isinstance(bias, nn.Parameter) and bias.requires_grad
        self.parameters = [weight, bias] if isinstance(bias, nn.Parameter) and self.has_bias else [weight]
        self.blocks = blocks if blocks > 1 else None

    @classmethod
    def split(cls, name: str, module: nn.Module) -> Sequence[Layer]:
        """The input projection, packed or separate, and the output projection."""
        assert isinstance(module, nn.MultiheadAttention)
        if module.in_proj_weight is not None:
            layers = [cls(f"{name}.in_proj", module, module.in_proj_weight, module.in_proj_bias, 3)]
        else:
            separate = {"q": module.q_proj_weight, "k": module.k_proj_weight, "v": module.v_proj_weight}
            layers = [
                cls(f"{name}.{key}_proj", module, cast(nn.Parameter, weight), None, 1)
                for key, weight in separate.items()
            ]
        out = module.out_proj
        layers.append(cls(f"{name}.out_proj", module, cast(nn.Parameter, out.weight), out.bias, 1))
        trained = [layer for layer in layers if layer.trained]
        for watcher in trained[:1]:
            watcher.siblings = trained
        return layers

    siblings: "Sequence[ProjectionLayer]" = ()

    def watch(self, recorder: Recorder) -> list[RemovableHandle]:
        """Stand in for ``functional.linear`` while the module runs; one of its layers does so for all."""
        if not self.siblings:
            return []
        stand_in = _StandIn(self.siblings, recorder)
        return [
            self.module.register_forward_pre_hook(stand_in.enter, with_kwargs=True),
            self.module.register_forward_hook(stand_in.leave, always_call=True),
        ]

    def inputs(self, x: Tensor) -> Tensor:
        """(N, L, in), of one block, as all that take part in a call have the same."""
        return x

    def gradients(self, g: Tensor, x: Tensor) -> Tensor:
        """(L, N, b · out) → ([b,] N, L, out) for the b blocks that took part."""
        rows = g.transpose(0, 1)
        return rows if self.blocks is None else rows.unflatten(-1, (-1, self.shape[0])).movedim(-2, 0)

    def to_matrix(self, gradients: Sequence[Tensor]) -> Tensor:
        """([3,] out, in [+ 1])."""
        matrix = torch.cat([gradients[0], gradients[1].unsqueeze(1)], dim=1) if self.has_bias else gradients[0]
        return matrix if self.blocks is None else matrix.unflatten(0, (self.blocks, -1))

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Weight and bias."""
        flat = matrix if self.blocks is None else matrix.flatten(0, 1)
        return [flat[:, :-1], flat[:, -1]] if self.has_bias else [flat]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in [+ 1])."""
        out, width = self.parameters[0].shape
        return out // (self.blocks or 1), width + int(self.has_bias)

    def blocks_of(self, weight: Tensor) -> slice | None:
        """Which blocks of this layer's weight the tensor is a view of; None if it is another tensor."""
        own = self.parameters[0]
        if weight.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
            return None
        offset = weight.storage_offset() - own.storage_offset()
        if not 0 <= offset < own.numel():  # all parameters may be views of one tensor
            return None
        start = offset // own.stride(0) // self.shape[0]
        return slice(start, start + weight.shape[0] // self.shape[0])


class _StandIn:
    """Looks at the calls of ``torch.nn.functional.linear`` between ``enter`` and ``leave``.

    Several may look at once, at the same module or in other threads, and leave in any order.
    """

    def __init__(self, layers: Sequence[ProjectionLayer], recorder: Recorder) -> None:
        self.layers, self.recorder = layers, recorder
        self.data = 1

    def enter(self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query = args[0] if args else kwargs["query"]
        if self.recorder.wants(self.layers) and self not in _here.looking:
            self.data = 1 if query.ndim == 2 else query.shape[0 if module.batch_first else 1]
            _here.looking.append(self)
            _replacement.hold()

    def leave(self, *_: Any) -> None:
        if self in _here.looking:
            _here.looking.remove(self)
            _replacement.release()

    def linear(self, below: Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for layer in self.layers:
            blocks = layer.blocks_of(weight)
            if blocks is not None:
                rows = x if x.ndim == 3 else x.unflatten(0, (-1, self.data))  # (L · N, embed) at the output projection
                z = below(rows, weight, bias)
                data_first = rows.detach().transpose(0, 1)
                self.recorder.record(layer, data_first, z, blocks if layer.blocks else slice(None))
                return z.reshape(*x.shape[:-1], -1)
        return below(x, weight, bias)


class _Here(threading.local):
    """Those that look at calls in this thread."""

    def __init__(self) -> None:
        self.looking: list[_StandIn] = []


class _Replacement:
    """Of ``torch.nn.functional.linear``, in all threads, as long as somebody looks in one of them."""

    def __init__(self) -> None:
        self._lock, self._holders, self._original = threading.Lock(), 0, cast(Linear, nn.functional.linear)

    def hold(self) -> None:
        with self._lock:
            if not self._holders:
                self._original, nn.functional.linear = nn.functional.linear, self.linear  # type: ignore[assignment]
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                nn.functional.linear = self._original  # type: ignore[assignment]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        function = self._original
        for one in _here.looking:
            function = partial(one.linear, function)
        return function(x, weight, bias)


_here, _replacement = _Here(), _Replacement()
