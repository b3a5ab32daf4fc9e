"""Some of the data stand for all of them in the quadratic model: their choice, and what each counts."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import natgrad
from cases import Loss, data_for, every_loss
from natgrad import local_model
from natgrad.forward import Forward
from natgrad.likelihoods import Gaussian
from natgrad.local_model import LocalModel
from natgrad.rerun import stratified
from oracle import relative_error
from quadratic_cases import directions_of, network

pytestmark = pytest.mark.usefixtures("float64")


def test_data_are_drawn_anew_with_every_seed_and_alike_with_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed part, or one in step with the rows of the factors, makes some directions look flatter than they are."""
    monkeypatch.setattr(local_model, "MIN_DATA", 5)
    model, x = nn.Linear(1, 2), torch.arange(40.0).unsqueeze(1)
    forwards = [Forward((x,), {}, model(x).detach(), [], gradient=torch.zeros(40, 2), seed=seed) for seed in (0, 1, 0)]
    local = [LocalModel(model, Gaussian(), lambda out: out, forward, 80) for forward in forwards]
    chosen = [one.args[0].flatten().tolist() for one in local]
    assert chosen[0] == chosen[2] != chosen[1]
    assert [len(set(data)) for data in chosen] == [5, 5, 5]


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_the_expected_sum_over_the_chosen_is_that_over_all(size: int) -> None:
    """Over all orders of six data. Catches a wrong weight of either half."""
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0])
    sums = []
    for order in itertools.permutations(range(6)):
        chosen, counts = stratified(torch.tensor(order), size, torch.stack([values, values.roll(1)], 1))
        assert len(set(chosen.tolist())) == size
        sums.append(torch.sum(counts * values[chosen]))
    assert torch.stack(sums).mean().item() == pytest.approx(size / 6 * values.sum().item(), rel=1e-12, abs=0)


def test_the_longest_gradients_are_always_chosen_and_others_from_the_end() -> None:
    """Catches a norm over the wrong dimension, and the data of the factors, at the start, taken again."""
    gradients = torch.tensor([[0.0, 3.0], [2.0, 2.0], [0.0, 0.0], [-4.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    chosen, _ = stratified(torch.tensor([4, 3, 0, 5, 1, 2]), 4, gradients)
    assert chosen.tolist() == [3, 0, 1, 2]


@every_loss
def test_model_and_change_weigh_the_chosen(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same quantities of single data. Catches weights that any one of the sums leaves out."""
    counts = torch.tensor([0.5, 2.0, 0.5])
    monkeypatch.setattr(local_model, "MIN_DATA", 3)
    monkeypatch.setattr(local_model, "stratified", lambda order, size, gradients: (torch.tensor([4, 0, 3]), counts))
    model = network().eval()
    x, y = data_for(model, loss, torch.randn(6, 3))
    (direction,) = directions_of(model, 1)
    step = {name: 0.1 * d for name, d in direction.items()}

    def measured(data: Tensor) -> Tensor:
        own = copy.deepcopy(model)
        optimizer = natgrad.KFAC(own, loss.told)
        optimizer.preconditioner.capture.criteria = 6.0  # so that curvature is smoothed as by all of them
        loss.loss_fn(own(x[data]), y[data]).backward()
        optimizer.preconditioner.update()
        with torch.no_grad():
            local = optimizer.preconditioner.multiplier.local
            slope, change = local.slope(direction), local.change(step).total
            return torch.tensor([local.curvature([direction])[0, 0], slope, change])

    alone = torch.stack([measured(torch.tensor([n])) for n in (4, 0, 3)])
    is_sum = loss.scale(model(x), y) == pytest.approx(loss.scale(model(x[:1]), y[:1]))
    expected = counts @ alone * (2.0 if is_sum else 1 / 3)
    assert relative_error(measured(torch.arange(6)), expected) < 1e-9
