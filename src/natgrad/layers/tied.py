"""One weight used by several modules, such as a token embedding and the output head of a language model.

The gradient of a tied weight is the sum over its uses, and so is its block if the uses do not interact. Uses of the
same kind add rows to the same factors, as a module called several times does. An embedding uses the head's matrix
transposed: there rows of A and G change places, and the sum of two Kronecker products G₁⊗A₁ + G₂⊗A₂ is replaced by the
one with the same partial traces, which is exact where A₁ ∝ A₂ or G₁ ∝ G₂ (``natgrad.factors.join``).
"""

from collections.abc import Sequence

from torch.utils.hooks import RemovableHandle

from natgrad.layers.base import Layer, Recorder
from natgrad.layers.embedding import EmbeddingLayer
from natgrad.layers.linear import LinearLayer
from natgrad.layers.wrapped import WrappedLayer, filed


class TiedLayer(WrappedLayer):
    """Several layers with the same parameter.

    Args:
        uses: The layers. The first linear one, or else the first, says what the matrix is.
    """

    def __init__(self, uses: Sequence[Layer]) -> None:
        super().__init__(next((use for use in uses if not isinstance(use, EmbeddingLayer)), uses[0]))
        self.uses = list(uses)

    def watch(self, recorder: Recorder) -> list[RemovableHandle]:
        """Watch every use."""
        return [handle for use in self.uses for handle in use.watch(filed(self, recorder))]

    def swaps(self, use: Layer) -> bool:
        """An embedding has the matrix of a head transposed."""
        return isinstance(use, EmbeddingLayer) and not isinstance(self.inner, EmbeddingLayer)


def refusal(uses: Sequence[Layer], holders: Sequence[str]) -> str | None:
    """Why these layers cannot share a parameter that the modules ``holders`` hold, or None."""
    if len(uses) < len(holders):
        return "natgrad does not know all of these modules"
    linear = [use for use in uses if not isinstance(use, EmbeddingLayer)]
    if len(linear) < len(uses) and not all(type(use) is LinearLayer for use in linear):
        return "an embedding can be tied to nn.Linear only"
    if any(type(use) is not type(linear[0]) or not _same(use, linear[0]) for use in linear):
        return "tied modules must be of one kind and share weight and bias alike"
    return None


def _same(one: Layer, other: Layer) -> bool:
    return [id(p) for p in one.parameters] == [id(p) for p in other.parameters]
