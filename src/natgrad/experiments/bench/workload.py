"""A workload: what is to be learned, in everything but the optimizer.

Contestants get the model of a seed, the stream of batches of a seed and the loss; nothing in them depends on who
trains. `evaluate` is never timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad.likelihoods import Likelihood

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """One learning problem.

    Attributes:
        name: In the registry, in records and in tables.
        title: In one line, for readers.
        model: From a seed to a new model with its initial parameters.
        batches: From a seed to an endless stream of inputs and targets.
        loss: From the model's output and the targets to a scalar.
        natgrad_loss: The same, as ``natgrad.KFAC`` is told it.
        evaluate: From a model to its held-out ``"loss"``, and whatever else is worth knowing, by name.
        seconds: Training time that each contestant has in a run.
        sequence: Whether the loss is a mean over positions, as well as over the data.
    """

    name: str
    title: str
    model: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[Tensor, Tensor], Tensor]
    natgrad_loss: str | nn.Module | Likelihood
    evaluate: Callable[[nn.Module], dict[str, float]]
    seconds: float
    sequence: bool = False


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """Turn a function that draws parameters from torch's global stream into one of a seed; the stream stays put."""

    def from_seed(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return from_seed


def epochs(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Minibatches of ``size``, in a new order each epoch, no incomplete one; or the full batch at every step."""
    generator = torch.Generator().manual_seed(seed)
    while size >= x.shape[0]:
        yield x, y
    while True:
        order = torch.randperm(x.shape[0], generator=generator)
        for start in range(0, x.shape[0] - size + 1, size):
            chosen = order[start : start + size]
            yield x[chosen], y[chosen]


def evaluating(evaluate: Callable[[nn.Module], dict[str, float]]) -> Callable[[nn.Module], dict[str, float]]:
    """Let an evaluation run without gradients, and with dropout and batch statistics switched off."""

    def wrapped(model: nn.Module) -> dict[str, float]:
        training = model.training
        model.eval()
        with torch.no_grad():
            values = evaluate(model)
        model.train(training)
        return values

    return wrapped
