"""What a network keeps of its batches is what the loop's own passes have left, and steps that stand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import natgrad

pytestmark = pytest.mark.usefixtures("float64")
DATA = 256


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)]
    return nn.Sequential(*layers)


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(DATA, 4)
    return x, x[:, :2].sin()


@pytest.mark.parametrize("multiplier", [0.01, 10.0, 100.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_multipliers_are_found_though_few_data_have_other_statistics(multiplier: float, seed: int) -> None:
    """They were not, on some seeds: the loss stayed where it was, or rose to thousands, and nothing was undone."""
    model = network(seed)
    optimizer, losses = natgrad.KFAC(model, "mse"), []
    for _ in range(30):
        x, y = batch()
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        (multiplier * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05
    found = optimizer.diagnostics(per_layer=False)["loss_multiplier"]
    assert 1 / 10 < found / multiplier < 10


def test_steps_that_are_undone_leave_no_statistics() -> None:
    """Of a batch that the network saw there variances were a million times too large, and stayed so for long."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    norm = model[1]
    optimizer, undone = natgrad.KFAC(model, "mse"), []
    for _ in range(8):
        x, y = batch()
        before, steps = [buffer.clone() for buffer in norm.buffers()], optimizer.undone_steps
        optimizer.zero_grad()
        (1e6 * mse_loss(model(x), y)).backward()
        optimizer.step()
        if optimizer.undone_steps > steps:
            undone.append(all(map(torch.equal, norm.buffers(), before)))
    assert undone
    assert all(undone)
    assert float(norm.running_var.max()) < 10


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("anew", [True, False])
def test_a_step_that_is_undone_after_a_checkpoint_leaves_none_either(anew: bool, model_first: bool) -> None:
    """Nobody remembered those of before. It is loaded by others, or by the same ones after steps too many."""

    def begin() -> tuple[nn.Sequential, natgrad.KFAC]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
        return model, natgrad.KFAC(model, "mse")

    def step(model: nn.Module, optimizer: natgrad.KFAC, number: int) -> None:
        torch.manual_seed(number)
        x, y = batch()
        optimizer.zero_grad()
        (1e6 * mse_loss(model(x), y)).backward()
        optimizer.step()
        with torch.no_grad():
            model.eval()(x)
        model.train()

    def run(saved_after: int) -> tuple[list[Tensor], int]:
        model, optimizer = begin()
        for number in range(6):
            if number == saved_after:
                saved = [copy.deepcopy(part.state_dict()) for part in (model, optimizer)]
                if anew:
                    model, optimizer = begin()
                else:
                    for more in range(2):
                        step(model, optimizer, number + more)
                    model(batch()[0])
                for part, state in list(zip((model, optimizer), saved, strict=True))[:: 1 if model_first else -1]:
                    part.load_state_dict(state)
            step(model, optimizer, number)
        return [*model.parameters(), *model.buffers()], optimizer.undone_steps

    expected, undone = run(-1)
    assert undone
    for saved_after in range(1, 6):
        found, _ = run(saved_after)
        assert all(map(torch.equal, found, expected)), saved_after


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = network()[:4], nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))


@pytest.mark.parametrize("options", [{}, {"fisher": "exact"}, {"mc_samples": 3}], ids=str)
def test_what_runs_again_for_natgrad_counts_no_batch(options: dict[str, Any]) -> None:
    """A checkpointed part runs once more for each of natgrad's backward passes, and for the loop's own."""
    counts = []
    for make in (
        lambda model: torch.optim.SGD(model.parameters()),
        lambda model: natgrad.KFAC(model, "mse", **options),
    ):
        model = Checkpointed()
        optimizer = make(model)
        x, y = torch.ones(6, 4), torch.ones(6, 2)
        mse_loss(model(x), y).backward()
        optimizer.step()
        counts.append(int(model.inner[3].num_batches_tracked))
    assert counts == [2, 2]


@pytest.mark.parametrize("look", [natgrad.curvature, natgrad.verify])
def test_who_only_looks_leaves_statistics_alone(look: Callable[..., Any]) -> None:
    model = network()
    before = [buffer.clone() for buffer in model.buffers()]
    look(model, *batch(), "mse")
    assert all(map(torch.equal, model.buffers(), before))
