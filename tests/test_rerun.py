"""A second pass of some of the data: where it comes to the same it takes the place of the whole, and nowhere else."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from natgrad import rerun
from natgrad.batch import Forward
from natgrad.rerun import subsample

pytestmark = pytest.mark.usefixtures("float64")
DATA, FRACTION, KEPT = 40, 0.2, 8


def test_subsample_takes_the_chosen_data_of_what_has_the_batch_dimension() -> None:
    x, mask, table = torch.arange(10.0), torch.arange(20.0).reshape(10, 2), torch.randn(3, 10)
    forward = Forward((x, table, 0.5), {"mask": mask, "flag": True}, torch.empty(10, 2), [])
    args, kwargs = subsample(forward, torch.tensor([7, 0, 4]))
    assert args[0].tolist() == [7, 0, 4]
    assert args[1] is table
    assert args[2] == 0.5
    assert torch.equal(kwargs["mask"], mask[[7, 0, 4]])
    assert kwargs["flag"] is True


class Twice(nn.Module):
    """A layer that is called twice, and one that sees several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Conv1d(3, 4, 2), nn.Linear(5, 5), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(self.again(self.first(x)).tanh())
        return self.last(h.flatten(1).tanh())


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0], dtype=torch.float64), ignore_index=1, reduction="sum")


def gathered(model: nn.Module, told: Any, user: Callable[[Tensor], Tensor], **options: Any) -> list[Tensor]:
    """The factors of a pass of all data, a fraction of which enter."""
    preconditioner = natgrad.Preconditioner(model, told, batch_fraction=FRACTION, damping=1.0, **options)
    torch.manual_seed(1)
    user(model(torch.randn(DATA, 3, 6))).backward()
    preconditioner.update()
    return [factor for pair in preconditioner.factors().values() for factor in pair]


def sizes_seen(model: nn.Module) -> list[int]:
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("told", "user"),
    [
        ("mse", lambda f: mse_loss(f, torch.ones_like(f))),
        ("cross_entropy", lambda f: cross_entropy(f, torch.arange(DATA) % 2)),
        (WEIGHTED, lambda f: WEIGHTED(f, torch.arange(DATA) % 2)),
    ],
    ids=["mse", "cross-entropy", "class weights, ignored"],
)
def test_factors_of_few_data_are_those_that_the_whole_pass_gives(
    told: Any, user: Callable[[Tensor], Tensor], sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows of other data, their number taken for that of all, and the weights of other targets."""
    torch.manual_seed(0)
    model = Twice()
    seen, other = sizes_seen(model), copy.deepcopy(model)
    few = gathered(model, told, user, fisher="exact", sharing=sharing)
    assert seen == [DATA, KEPT]
    monkeypatch.setattr(rerun, "SHARE", 0.0)
    all_ = gathered(other, told, user, fisher="exact", sharing=sharing)
    assert len(few) == 6
    for one, same in zip(few, all_, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("between", [partial(nn.Dropout, 0.2), partial(nn.BatchNorm1d, 4)], ids=["dropout", "batch"])
def test_where_data_meet_or_chance_decides_the_whole_pass_counts(
    between: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what tried it left no trace: no other mask, no other running statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 2), between(), nn.Flatten(), nn.Linear(20, 2))
    seen, other = sizes_seen(model), copy.deepcopy(model)
    tried = gathered(model, "mse", lambda f: mse_loss(f, torch.ones_like(f)))
    chance = torch.get_rng_state()
    assert seen == [DATA, KEPT]
    monkeypatch.setattr(rerun, "SHARE", 0.0)
    not_tried = gathered(other, "mse", lambda f: mse_loss(f, torch.ones_like(f)))
    assert torch.equal(torch.get_rng_state(), chance)
    for one, same in zip([*tried, *model.buffers()], [*not_tried, *other.buffers()], strict=True):
        assert torch.equal(one, same)


class Positions(nn.Module):
    """Embedded data and, as in a transformer, the same positions for all of them."""

    def __init__(self, flattens: bool = False) -> None:
        super().__init__()
        self.embed, self.position, self.head = nn.Linear(6, 4), nn.Embedding(3, 4), nn.Linear(4, 2)
        self.flattens = flattens

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.position(torch.arange(3))
        out: Tensor = self.head(h.flatten(0, 1) if self.flattens else h).reshape(len(x), 3, 2)
        return out


def test_positions_that_all_data_share_get_from_a_few_of_them_what_all_would_send() -> None:
    """In expectation: vectors of different data are independent, so that squares add up. Catches G of a few alone."""
    torch.manual_seed(0)
    model = Positions()
    seen = sizes_seen(model)
    _, G = gathered(model, "mse", lambda f: mse_loss(f, torch.ones_like(f)), mc_samples=4000)[2:4]
    assert seen == [DATA, KEPT]
    W = model.head.weight.detach()
    torch.testing.assert_close(G, W.mT @ W, rtol=0, atol=0.05 * float(torch.linalg.matrix_norm(W) ** 2))


@pytest.mark.parametrize(
    "build", [partial(Positions, flattens=True), lambda: nn.Sequential(nn.Linear(6, 2), nn.Dropout())]
)
def test_a_part_that_did_not_stand_for_its_pass_is_not_tried_again(build: Callable[[], nn.Module]) -> None:
    """Neither where rows are several of each datum, which no longer tell whose they are, nor where chance decides."""
    model = build()
    seen = sizes_seen(model)
    preconditioner = natgrad.Preconditioner(model, "mse", batch_fraction=FRACTION, damping=1.0, curvature_period=1)
    for _ in range(2):
        model(torch.randn(DATA, 3, 6)).square().mean().backward()
        preconditioner.step()
    assert seen == [DATA, KEPT, DATA]


def test_a_part_that_once_stood_for_its_pass_is_tried_again_after_a_pass_that_overflowed() -> None:
    model = nn.Linear(6, 2)
    seen = sizes_seen(model)
    preconditioner = natgrad.Preconditioner(model, "mse", batch_fraction=FRACTION, damping=1.0, curvature_period=1)
    for scale in (1.0, float("inf"), 1.0):
        model(scale * torch.randn(DATA, 6)).square().mean().backward()
        preconditioner.step()
        model.zero_grad()
    assert seen == 3 * [DATA, KEPT]


def test_a_model_for_one_size_of_batch_and_an_unfit_loss_input_go_through_the_whole_pass() -> None:
    """One would raise, the other would take some rows of the loss's input for data."""
    torch.manual_seed(0)
    fixed = nn.Sequential(nn.Linear(6, 2), nn.Unflatten(0, (DATA,)), nn.Flatten(1), nn.Linear(6, 2))
    assert gathered(fixed, "mse", lambda f: f.square().mean())
    positions = nn.Linear(6, 2)
    seen = sizes_seen(positions)
    assert gathered(positions, WEIGHTED, lambda f: WEIGHTED(f.flatten(0, 1), torch.arange(3 * DATA) % 2))
    assert seen == [DATA]


def test_a_second_pass_neither_takes_the_gradients_nor_counts_as_a_forward() -> None:
    model = Twice()
    preconditioner = natgrad.Preconditioner(model, "mse", batch_fraction=FRACTION)
    loss = mse_loss(model(torch.randn(DATA, 3, 6)), torch.zeros(DATA, 2))
    assert all(p.grad is None for p in model.parameters())
    batch = preconditioner.capture.batch
    assert (batch.forwards, batch.data) == (1, DATA)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert preconditioner.step()
