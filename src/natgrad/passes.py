"""Which of the captured forward passes a step is made of: those that were trained on, and whose gradients are there.

A loop may evaluate the model with gradients enabled, and may throw gradients away, as after an overflow that a scaler
saw. Neither is told to anybody, but the graph of the one goes without a gradient, and the others are no longer there.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter

from torch import Tensor, nn

from natgrad.batch import Batch
from natgrad.torch_internals import is_in_backward

# So many passes are told apart until their backward pass; the sums of each take the memory of all factors.
APART = 8


class Passes:
    """The batch of the step to come.

    Args:
        new: Makes an empty one.
        finish: Adds the gradients of the user's backward pass to what was captured of one forward pass.
        hears: Whether a gradient of the user's loss has ever arrived.

    Attributes:
        ahead: Forward passes whose backward pass may still come.
    """

    def __init__(self, new: Callable[[], Batch], finish: Callable[[Batch], None], hears: bool = False) -> None:
        self._new, self._finish, self.hears = new, finish, hears
        self.ahead = list[Batch]()
        self._earlier: Batch | None = None  # of forwards whose backward pass is over

    @property
    def forwards(self) -> int:
        """Number of the passes so far."""
        gathered = self.ahead if self._earlier is None else [self._earlier, *self.ahead]
        return sum(batch.forwards for batch in gathered)

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
        over = [batch for batch in self.ahead if batch.is_heard]
        self.ahead = [batch for batch in self.ahead if not batch.is_heard]
        self._put_aside(over)
        # In a backward pass, where a checkpointed model runs again, gradients are on their way.
        if not is_in_backward():
            self.drop_what_lost_its_gradient(parameters)

    def end(self, batch: Batch) -> None:
        """A forward pass is over, of which this was captured."""
        self.ahead.append(batch)
        if len(self.ahead) > APART:
            first, second, *others = self.ahead
            second.follow(first)
            self.ahead = [second, *others]

    def take(self) -> Batch:
        """Hand over what was captured and start anew."""
        self._drop_what_was_evaluated()
        if self.follows or any(batch.is_heard for batch in self.ahead):
            # Of the others no backward pass can come any more, as the step changes the parameters.
            self.ahead = [batch for batch in self.ahead if batch.is_heard]
        self._put_aside(self.ahead)
        batch, self._earlier, self.ahead = self._earlier or self._new(), None, []
        batch.settle()
        return batch

    def drop_what_lost_its_gradient(self, parameters: Sequence[nn.Parameter], _: Tensor | None = None) -> None:
        """Called before a backward pass: where no gradient is left, earlier ones enter no step, nor may their data."""
        if self._earlier is not None and parameters and not any(is_there(p.grad) for p in parameters):
            self._earlier = None

    def drop(self) -> None:
        """Forget what was captured."""
        self._earlier, self.ahead = None, []

    def _put_aside(self, over: Sequence[Batch]) -> None:
        """The backward pass of these is over; of several in one, the largest gradient tells most of the loss."""
        if not over:
            return
        for batch in over:
            self._finish(batch)
        joined, *others = over
        if others:
            latest = max((batch.latest for batch in over if batch.latest), key=attrgetter("told"))
            for batch in others:
                joined = _together(joined, batch)
            joined.latest = latest
        if self._earlier is not None:
            joined = _together(self._earlier, joined)
        self._earlier = joined

    def _drop_what_was_evaluated(self) -> None:
        """Passes whose graphs are gone without a gradient were not trained on, if gradients are heard of at all."""
        self.hears = self.hears or any(batch.is_heard for batch in self.ahead)
        if self.hears:
            self.ahead = [batch for batch in self.ahead if not batch.is_deaf]


def _together(earlier: Batch, batch: Batch) -> Batch:
    """Of one step, whose gradients have come."""
    batch.balance(earlier)
    batch.follow(earlier)
    return batch


def is_there(gradient: Tensor | None) -> bool:
    """Whether there is a gradient; of one that is spread over processes, only whether there is a tensor."""
    return gradient is not None and (type(gradient) is not Tensor or bool(gradient.any()))
