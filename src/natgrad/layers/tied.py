"""One weight used by several modules, such as a token embedding and the output head of a language model.

The gradient of a tied weight is the sum over its uses, and so is its block if the uses do not interact. Uses of the
same kind add rows to the same factors, as a module called several times does. An embedding uses the head's matrix
transposed: there rows of A and G change places, and the sum of two Kronecker products G₁⊗A₁ + G₂⊗A₂ is replaced by the
one with the same partial traces, which is exact where A₁ ∝ A₂ or G₁ ∝ G₂ (``natgrad.factors.join``).
"""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from natgrad.layers.base import Layer, Recorder
from natgrad.layers.embedding import EmbeddingLayer
from natgrad.layers.linear import LinearLayer
from natgrad.layers.wrapped import WrappedLayer


class TiedLayer(WrappedLayer):
    """Several layers with the same parameter.

    Args:
        uses: The layers. The first linear one, or else the first, says what the matrix is.
    """

    def __init__(self, uses: Sequence[Layer]) -> None:
        super().__init__(next((use for use in uses if not isinstance(use, EmbeddingLayer)), uses[0]))
        self.uses = list(uses)
        for use in uses:
            use.wrapper = self
        self.per_datum = not any(map(self.swaps, uses))

    def watch(self, recorder: Recorder) -> list[RemovableHandle]:
        """Watch every use."""
        return [handle for use in self.uses for handle in use.watch(recorder)]

    def swaps(self, use: Layer) -> bool:
        """An embedding has the matrix of a head transposed."""
        is_table = isinstance(use, EmbeddingLayer) and not isinstance(self.inner, EmbeddingLayer)
        return is_table or use.transposed


def refusal(uses: Sequence[Layer], owners: Mapping[int, Sequence[str]]) -> str | None:
    """Why these layers cannot be one, or None.

    Args:
        uses: All layers with the same first parameter.
        owners: By the id of each parameter, the modules that hold it.
    """
    for parameter in [parameter for use in uses for parameter in use.parameters]:
        names = owners[id(parameter)]
        if sum(_has(use, parameter) for use in uses) < len(names):
            return f"a parameter is shared by {', '.join(names)}, and natgrad knows no layer that they form together"
    linear = [use for use in uses if not isinstance(use, EmbeddingLayer)]
    shared = f"the weight is shared by {', '.join(owners[id(uses[0].parameters[0])])}: "
    if linear and len(linear) < len(uses) and not all(type(use) is LinearLayer for use in linear):
        return shared + "an embedding can be tied to nn.Linear only"
    for one in (linear, [use for use in uses if use not in linear]):
        if any(type(use) is not type(one[0]) or not _alike(use, one[0]) for use in one):
            return shared + "tied modules must be of one kind, share weight and bias alike and have one padding_idx"
    return None


def _has(layer: Layer, parameter: nn.Parameter) -> bool:
    return any(p is parameter for p in layer.parameters)


def _alike(one: Layer, other: Layer) -> bool:
    padding = [getattr(layer.module, "padding_idx", None) for layer in (one, other)]
    return [id(p) for p in one.parameters] == [id(p) for p in other.parameters] and padding[0] == padding[1]
