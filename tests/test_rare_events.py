"""Events that few batches show: what the others say of them with certainty is not believed."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, poisson_nll_loss

import natgrad
from natgrad.capture import UNKNOWN
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
    x = inputs()
    score = x[:, 0] + x[:, 1] / 2
    labels = (score > score.quantile(0.999)).long()
    loss: Callable[[Tensor, Tensor], Tensor] = binary_cross_entropy_with_logits if binary else cross_entropy
    y = labels[:, None].float() if binary else labels
    logarithms = []
    for seed in range(3):  # single runs are luck: twenty such data, of which few batches have one
        torch.manual_seed(seed)
        model = network(12, 1 if binary else 2)
        optimizer = natgrad.KFAC(model, "bce_with_logits" if binary else "cross_entropy")
        *_, told = train(model, optimizer, loss, x, y)
        assert told["undone_steps"] < 8
        logarithms.append(loss(model(x), y).detach().log())
    rate = labels.float().mean()
    base = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    assert torch.stack(logarithms).mean().exp() < 1.1 * base


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


def exact_factor(
    x: Tensor, y: Tensor, sizes: Sequence[int] = (8,), steps: int = 2, loss: Any = "cross_entropy", **options: Any
) -> tuple[Tensor, Tensor]:
    """Logits before the latest step of a linear network, and its G then, with micro-batches of such sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    optimizer = natgrad.KFAC(model, loss, fisher="exact", batch_fraction=1.0, factor_decay=0.0, **options)
    criterion = cross_entropy if isinstance(loss, str) else loss
    for _ in range(steps):
        logits = model(x).detach()
        optimizer.zero_grad()
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
            (criterion(model(a), b) * (len(a) / len(x))).backward()
        optimizer.step()
    return logits, optimizer.preconditioner.factors()["0"][1]


def expected(logits: Tensor, share: float) -> Tensor:
    p = (1 - share) * logits.softmax(1) + share / 4
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(8,), (2, 2, 2, 2), (5, 2, 1), (1, 7)])
def test_curvature_is_smoothed_by_all_data_of_a_step(sizes: tuple[int, ...]) -> None:
    """At the first step nobody knows how many there will be."""
    x, y = 5 * torch.randn(8, 3), torch.arange(8) % 4
    for steps, share in ((1, 1 / (UNKNOWN + 1)), (2, 1 / 9)):
        logits, G = exact_factor(x, y, sizes, steps)
        assert relative_error(G, expected(logits, share)) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [{"damping": 0.1}, {"lr": 0.1, "momentum": 0.9}])
def test_factors_are_exact_for_whoever_gives_numbers(options: dict[str, Any]) -> None:
    logits, G = exact_factor(5 * torch.randn(8, 3), torch.arange(8) % 4, **options)
    assert relative_error(G, expected(logits, 0.0)) < 1e-12


@pytest.mark.usefixtures("float64")
def test_targets_that_are_ignored_are_no_observations() -> None:
    x, y = 5 * torch.randn(8, 3), torch.arange(8) % 4
    y[5:] = -100
    logits, G = exact_factor(x, y, loss=nn.CrossEntropyLoss())
    assert relative_error(G, expected(logits[:5], 1 / 6)) < 1e-12
