"""Stage 3, its source: the vectors that are sent back through a forward pass, one after the other.

Their outer products sum to ∇²c of each datum: exactly, or on average over what is drawn.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from natgrad.forward import Forward
from natgrad.layers import at_least_float32
from natgrad.likelihoods import Likelihood


def vectors(forward: Forward, likelihood: Likelihood, samples: int | None, seed: int) -> Iterator[tuple[Tensor, float]]:
    """Vectors shaped like the output, and the weight of the outer product of each.

    Args:
        forward: The pass.
        likelihood: Of the loss.
        samples: How many to draw; None for the columns of a square root of ∇²c.
        seed: Of the draws.
    """
    output = at_least_float32(forward.output.detach())
    root = 1.0 if forward.weights is None else forward.weights.curvature.sqrt()
    if samples is None:
        for column in likelihood.columns(output):
            for only in _one_position_each(column, forward.data):
                yield only * root, 1.0
    else:
        generator = torch.Generator(output.device).manual_seed(seed)
        for _ in range(samples):
            yield likelihood.sample(output, generator) * root, 1.0 / samples


def _one_position_each(column: Tensor, data: int) -> Iterator[Tensor]:
    """A vector with one entry on in each row, split where the loss got several rows a datum, positions flattened.

    The positions of a datum may interact, and their vectors would mix if they were switched on together.
    """
    positions = column.shape[0] // data if column.shape[0] % data == 0 else 1
    if positions == 1:
        yield column
        return
    rows = column.unflatten(0, (data, positions))
    for position in range(positions):
        only = torch.zeros_like(rows)
        only[:, position] = rows[:, position]
        yield only.flatten(0, 1)
