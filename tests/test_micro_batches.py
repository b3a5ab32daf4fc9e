"""Gradients accumulated over several passes, with the loss told by name or as the module that the loop calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from linear_cases import stack

pytestmark = pytest.mark.usefixtures("float64")
DATA = 60


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


# Name, module and targets.
LOSSES: dict[str, tuple[str, nn.Module, Tensor]] = {
    "squared error": ("mse", nn.MSELoss(), random(DATA, 3, seed=1)),
    "classes": ("cross_entropy", nn.CrossEntropyLoss(), labels(3, DATA)),
    "bits": ("bce_with_logits", nn.BCEWithLogitsLoss(), labels(2, DATA, 3).double()),
}


def trained(
    loss: str | nn.Module, value: nn.Module, target: Tensor, parts: int, weigh: Callable[[Tensor], Tensor]
) -> tuple[natgrad.KFAC, list[Tensor]]:
    """After five steps on all data in so many micro-batches, each with a weighted loss."""
    torch.manual_seed(0)
    model = stack([4, 5, 3])
    optimizer = natgrad.KFAC(model, loss, fisher="exact", batch_fraction=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        for x, y in zip(random(DATA, 4).chunk(parts), target.chunk(parts), strict=True):
            weigh(value(model(x), y) * len(x) / DATA).backward()
        optimizer.step()
    return optimizer, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("parts", [1, 4, 7])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_a_module_says_what_its_name_says(name: str, parts: int, factor: float) -> None:
    """The module's value is of one pass, the declared loss of all: steps were as many times too long as passes."""
    named, module, target = LOSSES[name]
    (_, mine), (_, theirs) = (trained(loss, module, target, parts, lambda v: factor * v) for loss in (module, named))
    # Where targets are no labels, the name alone does not tell the factor at once.
    if factor == 1 or name != "squared error":
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_of_one_size_say_what_the_batch_says(name: str) -> None:
    """But for what is looked at in a quarter of the data: what is declared is the loss of all of them."""
    _, module, target = LOSSES[name]
    for parts in (1, 4):
        optimizer, _ = trained(module, module, target, parts, lambda v: v)
        assert optimizer.diagnostics(per_layer=False)["loss_multiplier"] == 1


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("sizes", [(40, 20), (20, 40), (10, 30, 20)])
@pytest.mark.parametrize("told", ["cross_entropy", nn.CrossEntropyLoss()], ids=["by name", "as a module"])
def test_micro_batches_of_unequal_size_count_as_the_loop_weighs_them(
    fisher: Any, sizes: tuple[int, ...], told: Any
) -> None:
    """Each mean over the number P of them: G = Σ_p 1/(P n_p) Σ_n. Catches steps that learn a small one by heart.

    They are judged by the pass whose data count for most, with the gradient that these had in the loss of all.
    """
    torch.manual_seed(0)
    model, value, x, y = nn.Linear(4, 3), nn.CrossEntropyLoss(), random(DATA, 4), labels(3, DATA)
    value = told if isinstance(told, nn.Module) else value
    optimizer = natgrad.KFAC(model, told, fisher=fisher, batch_fraction=1.0, damping=0.1)
    expected, errors = torch.zeros(3, 3), []
    for some, targets in zip(x.split(sizes), y.split(sizes), strict=True):
        (value(z := model(some), targets) / len(sizes)).backward()
        p = z.detach().softmax(1)
        errors.append(p - nn.functional.one_hot(targets, 3))
        each = errors[-1].unsqueeze(2) * errors[-1].unsqueeze(1)
        if fisher == "exact":
            each = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
        expected += each.mean(0) / len(sizes)
    batch = optimizer.preconditioner.capture.take()
    factors, latest = batch.factors(optimizer.preconditioner.layers[0]), batch.latest
    assert factors is not None
    assert latest is not None
    torch.testing.assert_close(factors[1], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(latest.gradient, errors[sizes.index(min(sizes))] / DATA, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["classes", "bits"])
@pytest.mark.parametrize("by_name", [True, False])
def test_their_weights_are_no_multiplier(name: str, by_name: bool) -> None:
    """Of 40 data of 60 a half of the loss was taken for 0.75 of it."""
    named, module, target = LOSSES[name]
    torch.manual_seed(0)
    model = stack([4, 5, 3])
    optimizer = natgrad.KFAC(model, named if by_name else module)
    for x, y in zip(random(DATA, 4).split([40, 20]), target.split([40, 20]), strict=True):
        (module(model(x), y) / 2).backward()
    optimizer.step()
    assert optimizer.diagnostics(per_layer=False)["loss_multiplier"] == 1


def test_two_values_of_one_step_are_a_sum() -> None:
    """The mean over each of two halves, not divided by two, is twice the loss of all."""
    _, module, target = LOSSES["classes"]
    optimizer, _ = trained(module, module, target, 2, lambda v: 2 * v)
    assert optimizer.diagnostics(per_layer=False)["loss_multiplier"] == pytest.approx(2)


def test_the_module_may_be_called_after_all_passes() -> None:
    """What its value is multiplied by is that of the pass whose output it got."""
    torch.manual_seed(0)
    model, loss, target = stack([4, 5, 3]), nn.MSELoss(), random(DATA, 3, seed=1)
    optimizer = natgrad.KFAC(model, loss, fisher="exact")
    large, small = model(random(40, 4)), model(random(20, 4))
    (100 * (loss(large, target[:40]) * 40 + loss(small, target[40:]) * 20) / DATA).backward()
    optimizer.step()
    assert optimizer.diagnostics(per_layer=False)["loss_multiplier"] == pytest.approx(100)


def test_a_loss_that_counts_nothing_yet_is_no_division_by_zero() -> None:
    """As at the start of a schedule of weights, beside another loss."""
    torch.manual_seed(0)
    model, loss = stack([4, 5, 3]), nn.CrossEntropyLoss()
    optimizer = natgrad.KFAC(model, loss)
    for weight in (0.0, 0.0, 0.5, 1.0):
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        (weight * loss(model(random(DATA, 4)), labels(3, DATA)) + 0.01 * decay).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_loss_that_is_maximized_is_refused() -> None:
    model, loss = stack([4, 5, 3]), nn.CrossEntropyLoss()
    optimizer = natgrad.KFAC(model, loss)
    (-2 * loss(model(random(DATA, 4)), labels(3, DATA))).backward()
    with pytest.raises(ValueError, match="times -2, and natgrad minimizes it: change the sign"):
        optimizer.step()
