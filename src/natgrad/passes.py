"""Which of the captured forward passes a step is made of: those that were trained on, and whose gradients are there.

A loop may evaluate the model with gradients enabled, and may throw gradients away, as after an overflow that a scaler
saw. Neither is told to anybody, but the graph of the one goes without a gradient, and the others are no longer there.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from natgrad.batch import Batch
from natgrad.calls import Call


class Passes:
    """The batch of the step to come.

    Args:
        new: Makes an empty one.
        finish: Adds the gradients of the user's backward pass to one use's statistics.
        hears: Whether a gradient of the user's loss has ever arrived.

    Attributes:
        batch: Of the forward passes whose backward pass may still come.
        open: Uses that wait for gradients of the user's backward pass.
    """

    def __init__(self, new: Callable[[], Batch], finish: Callable[[list[Call]], None], hears: bool = False) -> None:
        self._new, self._finish, self.hears = new, finish, hears
        self.batch, self.open = new(), list[list[Call]]()
        self._earlier: Batch | None = None  # of forwards whose backward pass is over

    @property
    def forwards(self) -> int:
        """Number of the passes so far."""
        return self.batch.forwards + (0 if self._earlier is None else self._earlier.forwards)

    @property
    def follows(self) -> bool:
        """Whether there are passes whose backward pass is over."""
        return self._earlier is not None

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """Another forward pass begins.

        Args:
            parameters: Whose gradients are looked at.
        """
        self._drop_what_was_evaluated()
        if self.batch.latest is not None and self.batch.latest.gradient is not None:
            self._put_aside()
        self.drop_what_lost_its_gradient(parameters)

    def take(self) -> Batch:
        """Hand over what was captured and start anew."""
        self._drop_what_was_evaluated()
        self._put_aside()
        batch, self._earlier = self._earlier, None
        assert batch is not None
        return batch

    def drop_what_lost_its_gradient(self, parameters: Sequence[nn.Parameter], _: Tensor | None = None) -> None:
        """Called before a backward pass: where no gradient is left, earlier ones enter no step, nor may their data."""
        if self._earlier is not None and parameters and not any(is_there(p.grad) for p in parameters):
            self._earlier = None

    def drop(self) -> None:
        """Forget what was captured."""
        self._earlier, self.open, self.batch = None, [], self._new()

    def _put_aside(self) -> None:
        """The backward pass of what was captured is over."""
        for use in self.open:
            self._finish(use)
        self.open = []
        if self._earlier is not None:
            self.batch.follow(self._earlier)
        self._earlier, self.batch = self.batch, self._new()

    def _drop_what_was_evaluated(self) -> None:
        """Passes whose graphs are gone without a gradient were not trained on, if gradients are heard of at all."""
        self.hears = self.hears or any(ear.heard for ear in self.batch.ears)
        if self.hears and all(ear.is_deaf for ear in self.batch.ears):
            self.batch = self._new()


def is_there(gradient: Tensor | None) -> bool:
    """Whether there is a gradient; of one that is spread over processes, only whether there is a tensor."""
    return gradient is not None and (type(gradient) is not Tensor or bool(gradient.any()))
