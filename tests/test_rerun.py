"""A second pass of some of the data: where it comes to the same it takes the place of the whole, and nowhere else."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from natgrad import local_model, rerun
from natgrad.forward import Forward
from natgrad.rerun import subsample


@dataclass
class Pair:
    """Two inputs in an object of the user's own."""

    x: Tensor
    t: Tensor


pytestmark = pytest.mark.usefixtures("float64")
DATA, FRACTION, KEPT = 40, 0.2, 8


def of_ten(*args: Any, **kwargs: Any) -> Forward:
    return Forward(args, kwargs, torch.empty(10, 2), [])


def test_subsample_takes_the_chosen_data_of_what_has_the_batch_dimension() -> None:
    x, mask, table = torch.arange(10.0), torch.arange(20.0).reshape(10, 2), torch.randn(3, 10)
    arguments = subsample(of_ten(x, table, 0.5, mask=mask, flag=True), torch.tensor([7, 0, 4]))
    assert arguments is not None
    args, kwargs = arguments
    assert args[0].tolist() == [7, 0, 4]
    assert args[1] is table
    assert args[2] == 0.5
    assert torch.equal(kwargs["mask"], mask[[7, 0, 4]])
    assert kwargs["flag"] is True


def test_subsample_looks_into_containers() -> None:
    x, table = torch.arange(10.0), torch.randn(3, 10)
    arguments = subsample(of_ten((x, [table, {"deep": 2 * x}]), named={"x": 3 * x}), torch.tensor([7, 0]))
    assert arguments is not None
    (((first, (second, third)),), kwargs) = arguments
    assert (first.tolist(), third["deep"].tolist(), kwargs["named"]["x"].tolist()) == ([7, 0], [14, 0], [21, 0])
    assert second is table


@pytest.mark.parametrize(
    ("others", "is_taken"),
    [
        ([torch.tensor([[0, 1], [9, 2]])], False),  # edges of a graph of ten nodes
        ([torch.tensor([[0, 1], [2, 2]])], True),  # places that are there among three data, too
        ([torch.ones(2, 5, dtype=torch.bool)], True),
        ([torch.full((2,), 99.0)], True),
        ([torch.empty(0, dtype=torch.long)], True),
    ],
)
def test_subsample_refuses_to_renumber_what_may_tell_data_by_their_places(others: list[Tensor], is_taken: bool) -> None:
    taken = subsample(of_ten(torch.randn(10, 2), *others), torch.tensor([7, 0, 4]))
    assert (taken is not None) == is_taken


def test_subsample_refuses_data_that_it_does_not_find() -> None:
    assert subsample(of_ten(Pair(torch.randn(10, 4), torch.randn(10, 3))), torch.tensor([7, 0, 4])) is None


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


@pytest.mark.parametrize(
    ("between", "tries"),
    [(partial(nn.Dropout, 0.2), False), (partial(nn.BatchNorm1d, 4), True)],
    ids=["dropout", "batch"],
)
def test_where_data_meet_or_chance_decides_the_whole_pass_counts(
    between: Callable[[], nn.Module], tries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what tried it left no trace: no other running statistics; of draws it is known that it is in vain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 2), between(), nn.Flatten(), nn.Linear(20, 2))
    seen, other = sizes_seen(model), copy.deepcopy(model)
    tried = gathered(model, "mse", lambda f: mse_loss(f, torch.ones_like(f)))
    chance = torch.get_rng_state()
    assert seen == [DATA, *[KEPT] * tries]
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


class TimeFirst(nn.Module):
    """A layer that sees the positions in the place of the data, as torch's recurrent networks and transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x.transpose(0, 1)).mean(0))
        return out


def test_positions_are_no_data_where_there_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets what all data send: half of them would send half as much. Catches G of the share of a few data."""
    torch.manual_seed(0)
    x, traces = torch.randn(DATA, DATA, 6), []
    for share in (rerun.SHARE, 0.0):
        monkeypatch.setattr(rerun, "SHARE", share)
        torch.manual_seed(0)
        model = TimeFirst()
        preconditioner = natgrad.Preconditioner(model, "mse", batch_fraction=FRACTION, damping=1.0, mc_samples=2000)
        mse_loss(model(x), torch.ones(DATA, 2)).backward()
        preconditioner.update()
        traces.append(float(preconditioner.factors()["embed"][1].trace()))
    assert traces[0] == pytest.approx(traces[1], rel=0.1)


def test_a_part_that_did_not_stand_for_its_pass_is_not_tried_again() -> None:
    """Here rows are several of each datum, and no longer tell whose they are."""
    model = Positions(flattens=True)
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
    batch = preconditioner.capture.ahead[-1]
    assert (batch.forwards, batch.data) == (1, DATA)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert preconditioner.step()


class Sum(nn.Module):
    """A network of two inputs, however they come."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, *inputs: Any) -> Tensor:
        given = inputs if len(inputs) > 1 else inputs[0]
        x, t = given.values() if isinstance(given, dict) else (given.x, given.t) if isinstance(given, Pair) else given
        return self.last((self.first(x) + self.second(t)).tanh())


class Graph(nn.Module):
    """A graph network: every node hears of its neighbours, by a matrix or by a list of edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        def heard(h: Tensor) -> Tensor:
            return edges @ h if edges.is_floating_point() else h.index_add(0, edges[1], h[edges[0]] / 4)

        return self.last(heard(self.first(heard(x)).tanh()))


def trained(model: nn.Module, *args: Any) -> list[Tensor]:
    """Parameters after three steps on the same arguments."""
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(*args), torch.arange(DATA) % 2).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.fixture
def with_few(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The quadratic model is made from eight data."""
    monkeypatch.setattr(local_model, "MIN_DATA", KEPT)
    return monkeypatch


@pytest.mark.parametrize("wrapped", [lambda x, t: (x, t), lambda x, t: [x, t], lambda x, t: {"x": x, "t": t}])
@pytest.mark.usefixtures("with_few")
def test_inputs_in_containers_train_as_they_do_by_themselves(wrapped: Callable[[Tensor, Tensor], Any]) -> None:
    model, x, t = Sum(), torch.randn(DATA, 4), torch.randn(DATA, 3)
    same = copy.deepcopy(model)
    torch.testing.assert_close(trained(model, x, t), trained(same, wrapped(x, t)), rtol=0, atol=0)


class Contrast(nn.Module):
    """How much every datum is like every other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(3, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.first(x).tanh() @ self.second(t).tanh().mT


class Ring(nn.Module):
    """Every datum hears of the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + h.roll(1, 0))


@pytest.mark.parametrize("case", ["own object", "adjacency matrix", "edges", "contrast", "ring"])
def test_where_data_cannot_be_parted_the_model_of_the_loss_is_of_all(case: str, with_few: pytest.MonkeyPatch) -> None:
    """Catches a network that is run on some nodes of its graph, or on fewer outputs than were meant."""
    x, t, edges = torch.randn(DATA, 4), torch.randn(DATA, 3), torch.randint(DATA, (2, 4 * DATA))
    matrix = torch.eye(DATA).index_put((edges[1], edges[0]), torch.tensor(0.25), accumulate=True)
    model, args = {
        "own object": (Sum(), [Pair(x, t)]),
        "adjacency matrix": (Graph(), [x, matrix]),
        "edges": (Graph(), [x, edges]),
        "contrast": (Contrast(), [x, t]),
        "ring": (Ring(), [x]),
    }[case]
    same = copy.deepcopy(model)
    steps = trained(model, *args)
    with_few.setattr(local_model, "MIN_DATA", DATA)
    torch.testing.assert_close(steps, trained(same, *args), rtol=0, atol=0)


@pytest.mark.usefixtures("with_few")
def test_batch_statistics_do_not_keep_the_model_of_the_loss_from_few_data() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    seen = sizes_seen(model)
    trained(model, torch.randn(DATA, 4))
    assert set(seen) == {DATA, KEPT}


class Forces(nn.Module):
    """How an energy falls along each of its inputs; these are told to require gradients by the caller, or in here."""

    def __init__(self, is_told: bool) -> None:
        super().__init__()
        self.is_told = is_told
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.is_told else x.requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("kept", [KEPT, DATA])
def test_a_network_that_differentiates_itself(is_told: bool, kept: int, with_few: pytest.MonkeyPatch) -> None:
    """The quadratic model needs no gradients, and the network does; what it says of a step on all data is exact."""
    with_few.setattr(local_model, "MIN_DATA", kept)
    model = Forces(is_told)
    seen = sizes_seen(model)
    optimizer = natgrad.KFAC(model, "mse")
    x = torch.randn(DATA, 3)
    y = -x.sin()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = mse_loss(model(x.clone().requires_grad_(is_told)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if kept == DATA:
            told = optimizer.diagnostics(per_layer=False)["actual_change"]
            after = mse_loss(model(x.clone().requires_grad_(is_told)), y).item()
            assert told == pytest.approx(after - losses[-1], abs=1e-10)
    assert losses[-1] < 0.5 * losses[0]
    assert seen[:5] == [DATA, *[kept] * 4]  # more of them later, as steps had to be halved


def test_a_first_pass_that_overflows_tells_nothing_of_parts() -> None:
    """Catches a session that goes without cheap passes after one bad batch."""
    model = nn.Linear(6, 2)
    seen = sizes_seen(model)
    preconditioner = natgrad.Preconditioner(model, "mse", batch_fraction=FRACTION, damping=1.0, curvature_period=1)
    for scale in (float("inf"), 1.0):
        model(scale * torch.randn(DATA, 6)).square().mean().backward()
        preconditioner.step()
        model.zero_grad()
    assert seen == 2 * [DATA, KEPT]


def test_a_weight_that_is_tied_moves_wherever_it_is() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(5, 4)
    model[2].weight = model[0].weight
    moved = {"0.weight": torch.randn(4, 4), "2.bias": torch.randn(4)}
    with torch.no_grad():
        found = rerun.rerun(model, moved, (x,), {})
        hidden = functional.linear(x, moved["0.weight"], model[0].bias).tanh()
    assert torch.equal(found, functional.linear(hidden, moved["0.weight"], moved["2.bias"]))


class Inner(nn.Module):
    """Takes a step of its own along the gradient of its parameters, as in meta-learning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, x: Tensor) -> Tensor:
        parameters = dict(self.net.named_parameters())
        error = mse_loss(self.net(x), x.sin())
        slopes = torch.autograd.grad(error, list(parameters.values()), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), slopes, strict=True)}
        output: Tensor = torch.func.functional_call(self.net, adapted, x)
        return output


@pytest.mark.filterwarnings("ignore:natgrad. the training loop differentiates:RuntimeWarning")
def test_a_model_may_differentiate_by_its_own_parameters() -> None:
    torch.manual_seed(0)
    model, x = Inner(), torch.randn(60, 1)
    optimizer = natgrad.KFAC(model, "mse")
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = mse_loss(model(x), x.sin())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_after_dropout_few_data_stand_for_all_as_in_a_run_that_begins_there() -> None:
    """Catches a pass of few data that is given up for ever, which a checkpoint does not know."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    preconditioner = natgrad.Preconditioner(model, "mse", batch_fraction=FRACTION, damping=1.0, curvature_period=1)
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        model(torch.randn(80, 3)).square().mean().backward()
        preconditioner.step()
        assert preconditioner.capture._has_parts is (None if training else True)
