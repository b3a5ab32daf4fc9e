"""Stage 3 in a network that differentiates itself: its own backward passes are watched, too.

Where the network's forward calls ``torch.autograd.grad`` with ``create_graph``, the gradient z̄ at a layer's output
becomes x̄ = Wᵀ z̄ at its input, and W takes part once more (:mod:`natgrad.layers.derivative`). Two hooks see that, at z
and at x. The pass has a graph, in which z̄ → x̄ is a linear map like x → z, so that the same two hooks are put there as
well, and derivatives of any order are found. Others may add to what arrives at x; the loss's gradient at the sum is
that at each of its terms.
"""

from collections.abc import Callable

from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from natgrad.calls import Call
from natgrad.layers import DerivativeUse, Layer


class OwnDerivatives:
    """Hooks on the tensors of one forward pass of the model.

    Args:
        note: Takes each use as a call, and the tensor that came of it.
    """

    def __init__(self, note: Callable[[Call, Tensor], None]) -> None:
        self.note = note
        self._kinds: dict[tuple[Layer, bool], DerivativeUse] = {}
        self._handles: list[RemovableHandle] = []

    def follow(self, call: Call, x: Tensor, z: Tensor) -> None:
        """Watch for gradients on their way from z, a matrix times x and no more, to x."""
        if not (x.requires_grad and z.requires_grad):
            return
        on_its_way: list[Tensor] = []

        def arrive(gradient: Tensor) -> None:
            on_its_way[:] = [gradient]

        def leave(gradient: Tensor) -> None:
            if on_its_way and gradient.requires_grad:  # or nobody will differentiate this pass
                self._use(call, on_its_way.pop(), gradient)

        self._handles += [z.register_hook(arrive), x.register_hook(leave)]

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _use(self, call: Call, entered: Tensor, left: Tensor) -> None:
        """The matrix of a call was used the other way round."""
        use = call.layer
        first, transposed = (use.inner, not use.transposed) if isinstance(use, DerivativeUse) else (use, True)
        kind = self._kinds.setdefault((first, transposed), DerivativeUse(first, transposed))
        x = entered.detach()[call.data]
        again = Call(kind, call.owner, x, get_gradient_edge(left), call.data, call.upscale, call.blocks)
        self.note(again, left)
        self.follow(again, entered, left)
