"""The change of the loss by a step, from outputs and the gradient alone, against the loss that the user computes."""

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    gaussian_nll_loss,
    mse_loss,
    nll_loss,
    poisson_nll_loss,
)

import natgrad
from cases import Loss, data_for, every_loss
from natgrad import local_model
from natgrad.calls import shuffled
from natgrad.chance import Chance
from natgrad.likelihoods import MeanVariance, Poisson
from quadratic_cases import Direction, directions_of, network

pytestmark = pytest.mark.usefixtures("float64")


def step_of(model: nn.Module, size: float = 0.3) -> Direction:
    (direction,) = directions_of(model, 1)
    return {name: size * d for name, d in direction.items()}


def stepped(model: nn.Module, step: Direction) -> nn.Module:
    moved = copy.deepcopy(model)
    for name, parameter in moved.named_parameters():
        parameter.data.add_(step.get(name, 0.0))
    return moved


def with_dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def change_by_mask(
    model: nn.Module, user: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, seed: int
) -> float:
    """Of the user's loss, with the mask that a seed draws."""
    losses = []
    for one in (model, stepped(model, step_of(model))):
        torch.manual_seed(seed)
        losses.append(user(one(x), y).item())
    return losses[1] - losses[0]


def change_by_natgrad(
    model: nn.Module, told: Any, user: Callable[[nn.Module], Tensor], chance: Chance | None = None, **options: Any
) -> float:
    """Of the loss, after a forward and backward pass of the user's with an optimizer's hooks.

    Args:
        model: What has hooks.
        told: The loss, as natgrad is told.
        user: The loss of the model.
        chance: Where the dropout is drawn from, if not from where the user's was.
        **options: Of the optimizer.
    """
    optimizer = natgrad.KFAC(model, told, **options)
    user(model).backward()
    optimizer.preconditioner.update()
    if chance is not None:
        optimizer.preconditioner.multiplier.forward.chance = chance
    with torch.no_grad():
        return optimizer.preconditioner.multiplier.local.change(step_of(model)).total


@every_loss
def test_change_is_that_of_the_users_loss(loss: Loss) -> None:
    """No target is ever seen: it must come out of the gradient at the output and the divergence, with its scale."""
    model = network().eval()
    x, y = data_for(model, loss, torch.randn(6, 3))
    clean = copy.deepcopy(model)
    actual = change_by_natgrad(model, loss.told, lambda m: loss.loss_fn(m(x), y))
    expected = loss.loss_fn(stepped(clean, step_of(clean))(x), y) - loss.loss_fn(clean(x), y)
    assert actual == pytest.approx(expected.item(), rel=1e-9)


def rates() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2), nn.Softplus())


class MeanAndVariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = rates()

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.net(x).unbind(1)
        return torch.stack([mean - 0.3, variance + 0.1], 1)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize(
    ("build", "told", "user"),
    [
        (rates, Poisson(log_input=False), lambda f, y: poisson_nll_loss(f, y[:, :2], log_input=False, eps=0.0)),
        (MeanAndVariance, MeanVariance(), lambda f, y: gaussian_nll_loss(f[:, 0], y[:, 2], f[:, 1])),
        (
            MeanAndVariance,
            MeanVariance("sum"),
            lambda f, y: gaussian_nll_loss(f[:, 0], y[:, 2], f[:, 1], reduction="sum"),
        ),
    ],
    ids=["rate", "mean and variance", "their sum"],
)
def test_change_is_exact_where_targets_do_not_enter_linearly(
    build: Callable[[], nn.Module], told: Any, user: Callable[[Tensor, Tensor], Tensor], factor: float
) -> None:
    """The gradient tells them; catches the divergence from the model's own distribution in the place of the data's."""
    model, x = build(), torch.randn(6, 3)
    y = torch.cat([torch.poisson(torch.full((6, 2), 2.0)), torch.randn(6, 1)], 1)
    clean = copy.deepcopy(model)
    optimizer = natgrad.KFAC(model, told)
    (factor * user(model(x), y)).backward()
    optimizer.preconditioner.update()
    with torch.no_grad():
        local = optimizer.preconditioner.multiplier.local
        local.multiplier = factor
        actual = local.change(step_of(model)).total
    expected = factor * (user(stepped(clean, step_of(clean))(x), y) - user(clean(x), y))
    assert actual == pytest.approx(expected.item(), rel=1e-9)


CRITERION = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), ignore_index=1)


@pytest.mark.parametrize(
    ("told", "options", "user"),
    [
        (CRITERION, {}, lambda m, x, y: CRITERION(m(x).reshape(-1, 3), y.flatten())),
        (CRITERION, {}, lambda m, x, y: CRITERION(m(x).movedim(-1, 1), y)),
        (
            "cross_entropy",
            {"output": lambda out: out.transpose(1, 2)},
            lambda m, x, y: cross_entropy(m(x).transpose(1, 2), y),
        ),
    ],
    ids=["flattened tokens", "moved classes", "selected output"],
)
def test_change_with_weights_and_rearranged_outputs(told: Any, options: dict[str, Any], user: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(4, 6, 4), torch.randint(3, (4, 6))
    clean = copy.deepcopy(model)
    actual = change_by_natgrad(model, told, lambda m: user(m, x, y), **options)
    expected = user(stepped(clean, step_of(clean)), x, y) - user(clean, x, y)
    assert actual == pytest.approx(expected.item(), rel=1e-9)


def classes_of(n: int) -> Tensor:
    return torch.randint(3, (n,))


def some_ignored(n: int) -> Tensor:
    return torch.where(torch.arange(n) % 3 == 1, -100, classes_of(n))


WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("make", "target"),
    [
        (lambda **r: nn.CrossEntropyLoss(weight=WEIGHT, **r), some_ignored),
        (lambda **r: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2, **r), some_ignored),
        (nn.CrossEntropyLoss, lambda n: torch.rand(n, 3).softmax(1)),
        (lambda **r: nn.BCEWithLogitsLoss(WEIGHT, pos_weight=1 / WEIGHT, **r), lambda n: torch.rand(n, 3)),
        (nn.PoissonNLLLoss, lambda n: classes_of(3 * n).reshape(n, 3).to(WEIGHT)),
    ],
    ids=["class weights, ignored", "smoothing", "soft targets", "positive weights", "Poisson"],
)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "batch statistics"])
def test_change_is_that_of_the_loss_module(
    make: Callable[..., nn.Module], target: Callable[[int], Tensor], reduction: str, train: bool
) -> None:
    """Weights that depend on the target reach the divergence; BatchNorm's batch statistics move with the step."""
    torch.manual_seed(0)
    model, told, x, y = network().train(train), make(reduction=reduction), torch.randn(7, 3), target(7)
    clean = copy.deepcopy(model)
    actual = change_by_natgrad(model, told, lambda m: told(m(x), y))
    expected = told(stepped(clean, step_of(clean))(x), y) - told(clean(x), y)
    assert actual == pytest.approx(expected.item(), rel=1e-9)


@every_loss
def test_change_on_a_part_of_identical_data_is_that_on_all(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gradient that is summed over the part and not scaled up."""
    monkeypatch.setattr(local_model, "MIN_DATA", 4)
    model = network().eval()
    x, y = data_for(model, loss, torch.randn(1, 3))
    x, y = x.repeat(12, 1), y.repeat(12, *[1] * (y.ndim - 1))
    clean = copy.deepcopy(model)
    actual = change_by_natgrad(model, loss.told, lambda m: loss.loss_fn(m(x), y))
    expected = loss.loss_fn(stepped(clean, step_of(clean))(x), y) - loss.loss_fn(clean(x), y)
    assert actual == pytest.approx(expected.item(), rel=1e-9)


def test_change_on_a_part_takes_every_token_of_a_datum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and the gradient have a row for each token, where the inputs have one for each datum."""
    monkeypatch.setattr(local_model, "MIN_DATA", 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(1, 6, 4).repeat(8, 1, 1), torch.tensor([0, 1, 2, 2, 0, 1]).repeat(8, 1)
    clean = copy.deepcopy(model)
    actual = change_by_natgrad(model, CRITERION, lambda m: CRITERION(m(x).flatten(0, 1), y.flatten()))
    moved = stepped(clean, step_of(clean))
    expected = CRITERION(moved(x).flatten(0, 1), y.flatten()) - CRITERION(clean(x).flatten(0, 1), y.flatten())
    assert actual == pytest.approx(expected.item(), rel=1e-9)


@every_loss
def test_change_on_the_last_micro_batch_is_that_on_all(loss: Loss) -> None:
    """Its gradient is that of a third of the loss, and its divergence stands for the whole."""
    model = network().eval()
    x, y = data_for(model, loss, torch.randn(4, 3))
    whole = x.repeat(3, 1), y.repeat(3, *[1] * (y.ndim - 1))
    clean = copy.deepcopy(model)
    share = 1.0 if getattr(loss.told, "reduction", "mean") == "sum" else 1 / 3
    optimizer = natgrad.KFAC(model, loss.told)
    for _ in range(3):
        (share * loss.loss_fn(model(x), y)).backward()
    optimizer.preconditioner.update()
    with torch.no_grad():
        actual = optimizer.preconditioner.multiplier.local.change(step_of(model)).total
    moved = stepped(clean, step_of(clean))
    expected = loss.loss_fn(moved(whole[0]), whole[1]) - loss.loss_fn(clean(whole[0]), whole[1])
    assert actual == pytest.approx(expected.item(), rel=1e-9)


def test_a_part_without_a_target_that_counts_tells_of_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero over zero else, when few data have a label."""
    monkeypatch.setattr(local_model, "MIN_DATA", 1)
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 3)), torch.randn(20, 3), torch.full((20,), 1)
    chosen = shuffled(20, 0, torch.device("cpu"))[-1:]  # the first draw of seed 0
    y[[n for n in range(20) if n not in chosen.tolist()][:2]] = 0
    optimizer = natgrad.KFAC(model, CRITERION)
    CRITERION(model(x), y).backward()
    optimizer.preconditioner.update()
    local = optimizer.preconditioner.multiplier.local
    assert not y[local.chosen].eq(0).any()
    with torch.no_grad():
        assert local.change(step_of(model)).total == 0.0
        assert torch.equal(local.curvature(directions_of(model)), torch.zeros(2, 2))


def test_change_leaves_buffers_parameters_and_chance_as_they_were() -> None:
    model, x, y = nn.Sequential(*network(), nn.Dropout(0.5)), torch.randn(6, 3), torch.randn(6, 3)
    optimizer = natgrad.KFAC(model, "mse")
    mse_loss(model(x), y).backward()
    optimizer.preconditioner.update()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        assert optimizer.preconditioner.multiplier.local.change(step_of(model)).total != 0.0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("told", "user", "target"),
    [
        ("cross_entropy", cross_entropy, classes_of),
        (CRITERION, CRITERION, classes_of),
        *[(told, told, lambda n: torch.rand(n, 3)) for told in [nn.BCEWithLogitsLoss(pos_weight=3 * WEIGHT)]],
        *[(told, told, lambda n: 3 * torch.rand(n, 3)) for told in [nn.PoissonNLLLoss(reduction="sum"), nn.MSELoss()]],
    ],
    ids=["cross-entropy", "class weights, ignored", "positive weights", "Poisson", "squared error"],
)
def test_change_with_dropout_is_that_of_one_mask(told: Any, user: Any, target: Callable[[int], Tensor]) -> None:
    """If the mask is not the user's, the gradient must be carried over to the other output."""
    model, x, y = with_dropout(), torch.randn(6, 3), target(6)
    expected = change_by_mask(copy.deepcopy(model), user, x, y, seed=7)
    torch.manual_seed(7)
    elsewhere = Chance(model)
    torch.manual_seed(8)
    actual = change_by_natgrad(model, told, lambda m: user(m(x), y), elsewhere)
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("normalizes", [False, True])
def test_change_with_dropout_is_that_of_the_users_mask(normalizes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient is made for its mask: catches a step that is judged by another, or by some of the data alone.

    Batch statistics would excuse that the output of some is another.
    """
    monkeypatch.setattr(local_model, "MIN_DATA", 4)
    model, x, y = with_dropout(), torch.randn(6, 3), classes_of(6)
    if normalizes:
        model = nn.Sequential(nn.BatchNorm1d(3), model)
    expected = change_by_mask(copy.deepcopy(model), cross_entropy, x, y, seed=7)
    torch.manual_seed(7)
    actual = change_by_natgrad(model, "cross_entropy", lambda m: cross_entropy(m(x), y))
    assert actual == pytest.approx(expected, rel=1e-9)


class Skips(nn.Module):
    """Layers that are left out at random, by Python's stream or by numpy's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.draw = nn.Linear(3, 8), draw
        self.middle = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.middle:
            if self.draw() < 0.5:
                h = h + layer(h).tanh()
        return self.last(h)


@pytest.mark.parametrize("stream", [random.random, np.random.random_sample], ids=["Python", "numpy"])
@pytest.mark.filterwarnings("ignore:natgrad. layer 'middle:UserWarning")
def test_layers_that_are_left_out_at_random_are_left_out_again(stream: Callable[[], float]) -> None:
    """The change of the loss is that of the layers that were drawn; the stream goes on as it would without natgrad."""
    random.seed(1)
    np.random.seed(1)
    x, y = torch.randn(20, 3), classes_of(20)
    model = Skips(stream)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    users: list[float] = []
    for _ in range(4):
        drawn: list[float] = []
        model.draw = lambda drawn=drawn: drawn.append(stream()) or drawn[-1]
        optimizer.zero_grad()
        before = cross_entropy(model(x), y)
        layers = drawn[:8]
        users += layers
        before.backward()
        optimizer.step()
        model.draw = iter(layers).__next__
        with torch.no_grad():
            change = (cross_entropy(model(x), y) - before).item()
        assert optimizer.diagnostics(per_layer=False)["actual_change"] == pytest.approx(change, rel=1e-8)
    random.seed(1)
    np.random.seed(1)
    assert users == [stream() for _ in users]


def test_a_pass_without_chance_needs_some_of_the_data_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a network in `eval` mode, or one without dropout, that pays for it."""
    monkeypatch.setattr(local_model, "MIN_DATA", 4)
    model, x, y = with_dropout().eval(), torch.randn(6, 3), classes_of(6)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    cross_entropy(model(x), y).backward()
    optimizer.preconditioner.update()
    assert not optimizer.preconditioner.multiplier.local.has_all


# Masks, of which natgrad is told nothing.


MODULE = nn.CrossEntropyLoss()


def masked_tokens(output: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return cross_entropy(output.movedim(1, -1)[mask[..., 0]], y.argmax(-1)[mask[..., 0]])


def masked_by_module(output: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return MODULE(output.movedim(1, -1)[mask[..., 0]], y.argmax(-1)[mask[..., 0]])


def masked_entries(output: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    each = binary_cross_entropy_with_logits(output.movedim(1, -1), y, reduction="none")
    return (each * mask).sum() / mask.sum()


def masked_squares(output: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return mse_loss(output.movedim(1, -1)[mask], y[mask])


def weighted_tokens(output: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Few that count for much, some for nothing."""
    each = cross_entropy(output, y.argmax(-1), reduction="none")
    return (each * (1 + 19 * mask[..., 0]) * mask[..., 1]).mean()


@pytest.mark.parametrize(
    ("told", "loss"),
    [
        ("cross_entropy", masked_tokens),
        ("cross_entropy", weighted_tokens),
        (MODULE, masked_by_module),
        ("bce_with_logits", masked_entries),
        ("mse", masked_squares),
    ],
    ids=["tokens", "tokens with weights", "tokens, by a module", "entries", "squares"],
)
def test_what_a_mask_leaves_out_or_weighs_has_its_curvature(
    told: Any, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    """The change of the loss is exact, although nothing but its gradient tells what counts, and how much."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    x, mask = torch.randn(30, 5, 3), torch.rand(30, 5, 4) < 0.3
    y = nn.functional.one_hot(torch.randint(4, (30, 5)), 4).double()
    optimizer = natgrad.KFAC(model, told, output=lambda out: out.movedim(-1, 1))
    for _ in range(5):
        optimizer.zero_grad()
        before = loss(model(x).movedim(-1, 1), y, mask)
        before.backward()
        optimizer.step()
        with torch.no_grad():
            change = loss(model(x).movedim(-1, 1), y, mask) - before
        assert optimizer.diagnostics(per_layer=False)["actual_change"] == pytest.approx(change.item(), rel=1e-8)
        assert change < 0


def test_classes_that_are_ruled_out_change_nothing() -> None:
    """Logits of −∞, as of moves against the rules of a game: the same step as with very small ones."""
    x, y, steps = torch.randn(40, 3), torch.randint(3, (40,)), []
    for least in (-torch.inf, -1e9):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), Masked(least))
        optimizer = natgrad.KFAC(model, "cross_entropy")
        for _ in range(4):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        steps.append(optimizer.diagnostics(per_layer=False))
    assert steps[0]["halvings"] == 0
    assert steps[0] == pytest.approx(steps[1], rel=1e-8)


class Masked(nn.Module):
    """The last two of five classes cannot be."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(torch.arange(5) > 2, self.least)


def test_zeros_that_are_met_where_training_begins_count() -> None:
    """A layer that starts from zero, for targets of which most are zero: the others' step would move these too far."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = torch.randn(30, 3), torch.zeros(30, 4)
    y[::5] = 1.0
    optimizer = natgrad.KFAC(model, "mse")
    loss = mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    change = mse_loss(model(x), y).item() - loss.item()
    assert optimizer.diagnostics(per_layer=False)["actual_change"] == pytest.approx(change, rel=1e-8)


@pytest.mark.parametrize("called", ["cross_entropy", "nll"])
@pytest.mark.parametrize("size", [0.3, 30.0])
def test_steepening_is_the_change_of_the_slope(called: str, size: float) -> None:
    """Of a linear network, between the ends of the step; its KL divergence has a bound where that has none."""
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(3, 4)
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    step = step_of(model, size)
    slopes = []
    for one in (model, stepped(model, step)):
        gradients = torch.autograd.grad(cross_entropy(one(x), y), list(one.parameters()))
        slopes.append(sum((g * s).sum() for g, s in zip(gradients, step.values(), strict=True)))
    if called == "nll":
        model = nn.Sequential(OrderedDict(weight=model, logarithm=nn.LogSoftmax(dim=1)))
        step = {f"weight.{name}": s for name, s in step.items()}
    optimizer = natgrad.KFAC(model, "cross_entropy")
    (cross_entropy if called == "cross_entropy" else nll_loss)(model(x), y).backward()
    optimizer.preconditioner.update()
    with torch.no_grad():
        steepening = optimizer.preconditioner.multiplier.local.steepening(step)
    assert steepening == pytest.approx(float(slopes[1] - slopes[0]), rel=1e-9)
