"""Events that few batches show: what the others say of them with certainty is not believed."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, poisson_nll_loss

import natgrad
from oracle import relative_error

BATCH, DATA = 128, 20_480


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs))


def train(model: nn.Module, optimizer: natgrad.KFAC, loss: Any, x: Tensor, y: Tensor) -> Iterable[dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(160):
        some = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(model(x[some]), y[some]).backward()
        optimizer.step()
        yield optimizer.diagnostics(per_layer=False)


def inputs() -> Tensor:
    return torch.randn(DATA, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("binary", [True, False])
def test_one_label_in_a_thousand_is_learnt(binary: bool) -> None:
    """Training stood at five and nine times the loss of the constant base rate.

    There was no curvature left, and each batch with such a label undid the step before, and was thrown away.
    """
    torch.manual_seed(0)
    x = inputs()
    score = x[:, 0] + x[:, 1] / 2
    labels = (score > score.quantile(0.999)).long()
    loss: Callable[[Tensor, Tensor], Tensor] = binary_cross_entropy_with_logits if binary else cross_entropy
    y = labels[:, None].float() if binary else labels
    model = network(12, 1 if binary else 2)
    optimizer = natgrad.KFAC(model, "bce_with_logits" if binary else "cross_entropy")
    *_, told = train(model, optimizer, loss, x, y)
    rate = labels.float().mean()
    base = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    assert loss(model(x), y) < 1.1 * base
    assert told["undone_steps"] < 8


def test_counts_that_are_mostly_zero_are_learnt() -> None:
    """Training stood at sixty times what the base rate misses."""
    torch.manual_seed(0)
    x = inputs()
    rate = (x[:, :1] + x[:, 1:2] / 2).exp()
    rate = 1e-3 * rate / rate.mean()
    y = torch.poisson(rate, generator=torch.Generator().manual_seed(3))
    model = network(12, 1)
    for _ in train(model, natgrad.KFAC(model, nn.PoissonNLLLoss()), nn.PoissonNLLLoss(), x, y):
        pass
    assert poisson_nll_loss(model(x), y) - poisson_nll_loss(rate.log(), y) < 0.003


def test_targets_that_are_mostly_zero_are_no_multiplied_loss() -> None:
    """Each batch with another made the multiplier larger, up to 10⁸, until nothing moved."""
    torch.manual_seed(2)
    x = inputs()
    score = x[:, 0] + x[:, 1] / 2
    y = torch.where(score > score.quantile(0.999), 10.0, 0.0)[:, None]
    model = network(12, 1)
    multipliers = [
        told.get("loss_multiplier", 1.0) for told in train(model, natgrad.KFAC(model, "mse"), mse_loss, x, y)
    ]
    assert max(multipliers) == 1


# Whose curvature it is.


def exact_factor(x: Tensor, y: Tensor, parts: int = 1, steps: int = 1, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the latest step of a linear network, its A and its G."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    optimizer = natgrad.KFAC(model, "cross_entropy", fisher="exact", batch_fraction=1.0, factor_decay=0.0, **options)
    for _ in range(steps):
        logits = model(x).detach()
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (cross_entropy(model(a), b) / parts).backward()
        optimizer.step()
    return logits, optimizer.preconditioner.factors()["0"][1]


def expected(logits: Tensor, share: float) -> Tensor:
    p = (1 - share) * logits.softmax(1) + share / 4
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)


@pytest.mark.usefixtures("float64")
def test_curvature_is_smoothed_where_damping_and_steps_are_automatic() -> None:
    """And nowhere else: factors are exact for whoever gives numbers."""
    x, y = torch.randn(8, 3), torch.arange(8) % 4
    logits, G = exact_factor(5 * x, y)
    assert relative_error(G, expected(logits, 1 / 9)) < 1e-12
    for options in ({"damping": 0.1}, {"lr": 0.1, "momentum": 0.9}):
        logits, G = exact_factor(5 * x, y, **options)
        assert relative_error(G, expected(logits, 0.0)) < 1e-12


@pytest.mark.usefixtures("float64")
def test_micro_batches_smooth_by_all_their_data() -> None:
    """From the second step on, as the first does not know yet how many there will be."""
    x, y = torch.randn(8, 3), torch.arange(8) % 4
    for steps, share in ((1, 1 / 3), (2, 1 / 9)):
        logits, G = exact_factor(5 * x, y, parts=4, steps=steps)
        assert relative_error(G, expected(logits, share)) < 1e-12
