"""Losses and the call of the product that the tests of all layers share."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import natgrad
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian
from oracle import LossFn, relative_error

TOLERANCE = 1e-8

# Losses: what natgrad is told, what the user computes, and the sum of criteria that the reduction scales.


def half_square(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().flatten(1).sum(1) / 2


def log_loss(output: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(output, y, reduction="none").reshape(output.shape[0], -1).sum(1)


def binary_log_loss(output: Tensor, y: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(output, y, reduction="none").flatten(1).sum(1)


def real(output: Tensor) -> Tensor:
    return torch.randn_like(output)


def classes(output: Tensor) -> Tensor:
    return torch.randint(output.shape[1], (output.shape[0], *output.shape[2:]))


def binary(output: Tensor) -> Tensor:
    return torch.randint(2, output.shape).to(output.dtype)


@dataclass(frozen=True)
class Loss:
    told: Any
    loss_fn: LossFn
    criterion: LossFn  # c of each datum, shape (N,)
    target: Callable[[Tensor], Tensor]

    def scale(self, output: Tensor, y: Tensor) -> float:
        """R of loss = R·Σ c, read off the two values and not from a formula that natgrad may share."""
        return float(self.loss_fn(output.detach(), y) / self.criterion(output.detach(), y).sum())


def batchmean(criterion: LossFn) -> LossFn:
    return lambda output, y: criterion(output, y).mean()


MSE = Loss("mse", mse_loss, half_square, real)
CROSS_ENTROPY = Loss("cross_entropy", cross_entropy, log_loss, classes)
SQUARED = {
    "mse": MSE,
    "mse-sum": Loss(nn.MSELoss(reduction="sum"), nn.MSELoss(reduction="sum"), half_square, real),
    "gaussian-mean": Loss(Gaussian(reduction="mean"), mse_loss, half_square, real),
    "gaussian-batchmean": Loss(Gaussian(reduction="batchmean"), batchmean(half_square), half_square, real),
}
LOSSES = SQUARED | {
    "ce": CROSS_ENTROPY,
    "ce-module": Loss(nn.CrossEntropyLoss(), cross_entropy, log_loss, classes),
    "ce-sum": Loss(nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum"), log_loss, classes),
    "ce-batchmean": Loss(Categorical(reduction="batchmean"), batchmean(log_loss), log_loss, classes),
    "bce": Loss("bce_with_logits", binary_cross_entropy_with_logits, binary_log_loss, binary),
    "bce-sum": Loss(
        nn.BCEWithLogitsLoss(reduction="sum"), nn.BCEWithLogitsLoss(reduction="sum"), binary_log_loss, binary
    ),
    "bce-batchmean": Loss(Bernoulli(reduction="batchmean"), batchmean(binary_log_loss), binary_log_loss, binary),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
every_squared_loss = pytest.mark.parametrize("loss", SQUARED.values(), ids=SQUARED.keys())
every_sharing = pytest.mark.parametrize("sharing", ["expand", "reduce"])


def data_for(model: nn.Module, loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    return x, loss.target(model(x).detach())


# The product.


def product_blocks(
    model: nn.Module, told: Any, loss_fn: LossFn, *batches: tuple[Tensor, Tensor], **options: Any
) -> dict[str, Tensor]:
    """kron(G, A) of every layer after one forward and backward pass for each of the batches, then a step.

    Of a layer with B blocks side by side the result is (B, ·, ·).
    """
    model = copy.deepcopy(model)
    preconditioner = natgrad.Preconditioner(
        model, told, damping=1.0, **{"factor_decay": 0.0, "batch_fraction": 1.0} | options
    )
    total = sum(len(x) for x, _ in batches)
    for x, y in batches:
        loss_value = loss_fn(model(x), y)
        (loss_value if getattr(told, "reduction", "mean") == "sum" else loss_value * len(x) / total).backward()
    preconditioner.step()
    return {name: dense_block(A, G) for name, (A, G) in preconditioner.factors().items()}


def dense_block(A: Tensor, G: Tensor) -> Tensor:
    """kron(G, A), where a diagonal is a column and blocks have a leading dimension."""
    A, G = (F if F.shape[-2] == F.shape[-1] else F.squeeze(-1).diag_embed() for F in (A, G))
    return torch.kron(G, A) if A.ndim == 2 else torch.stack(list(map(torch.kron, G, A)))


def assert_blocks(blocks: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert blocks.keys() == expected.keys()
    errors = {name: relative_error(blocks[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, errors
