"""Recurrent modules run in the open: what the user sees is what the module would have computed."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import pack_padded_sequence

import natgrad
from layer_modules import Loop
from natgrad.layers import partition, recurrent

pytestmark = pytest.mark.usefixtures("float64")
KINDS = {"lstm": (nn.LSTM, {}), "gru": (nn.GRU, {}), "tanh": (nn.RNN, {}), "relu": (nn.RNN, {"nonlinearity": "relu"})}
CELLS = {
    "lstm": (nn.LSTMCell, {}),
    "gru": (nn.GRUCell, {}),
    "tanh": (nn.RNNCell, {}),
    "relu": (nn.RNNCell, {"nonlinearity": "relu"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Watching:
    """A recorder that throws everything away."""

    def wants(self, layers: Any) -> bool:
        return True

    def record(self, *_: Any) -> None:
        pass


def watched(module: nn.Module) -> nn.Module:
    """A copy whose recurrence runs in the open."""
    module = copy.deepcopy(module)
    for layer in partition(module).layers:
        layer.watch(Watching())
    return module


def tensors(value: Any) -> list[Tensor]:
    """Of outputs and states, however nested."""
    return [value] if isinstance(value, Tensor) else list(itertools.chain.from_iterable(map(tensors, value)))


def assert_same_run(module: nn.Module, *inputs: Any) -> None:
    """Outputs, final states, gradients of inputs and parameters, and the random stream."""
    runs = []
    for each in (module, watched(module)):
        given = [t.clone().requires_grad_() for t in tensors(inputs)]
        nested = given if len(given) < 3 else [given[0], tuple(given[1:])]
        torch.manual_seed(1)
        out = tensors(each(*nested))
        state = torch.get_rng_state()
        sum((t * torch.linspace(-1, 1, t.numel()).reshape(t.shape)).sum() for t in out).backward()
        runs.append((out, [t.grad for t in given], [p.grad for p in each.parameters()], state))
    *expected, expected_state = runs[0]
    *actual, state = runs[1]
    assert torch.equal(state, expected_state)
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    assert_same_layout(actual[0], expected[0])


def assert_same_layout(actual: list[Tensor], expected: list[Tensor]) -> None:
    """A model may view what it may view without natgrad, and add what it may add."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous() or not theirs.is_contiguous()


@every_kind
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"num_layers": 3}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}],
    ids=str,
)
def test_modules_compute_what_they_did(kind: str, given: bool, batch_first: bool, options: dict[str, Any]) -> None:
    """Catches gates in another order, states of another layer or direction, and axes exchanged."""
    torch.manual_seed(0)
    make, own = KINDS[kind]
    module = make(3, 4, batch_first=batch_first, **own, **options)
    x, states = torch.randn(*((2, 5) if batch_first else (5, 2)), 3), []
    if given:
        depth = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        states = [torch.randn(depth, 2, 4) for _ in range(2 if kind == "lstm" else 1)]
    assert_same_run(module, x, *states)


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_drawn_as_the_module_did(kind: str, batch_first: bool, training: bool) -> None:
    """The stream, too, goes on as without natgrad, so that a run differs from its plain twin by curvature alone."""
    torch.manual_seed(0)
    make, own = KINDS[kind]
    module = make(3, 4, num_layers=3, dropout=0.4, bidirectional=True, batch_first=batch_first, **own)
    assert_same_run(module.train(training), torch.randn(5, 5, 3))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [False, True])
def test_cells_compute_what_they_did(kind: str, bias: bool, given: bool) -> None:
    torch.manual_seed(0)
    make, own = CELLS[kind]
    states = [torch.randn(2, 4) for _ in range(2 if kind == "lstm" else 1)] if given else []
    assert_same_run(make(3, 4, bias=bias, **own), torch.randn(2, 3), *states)


@pytest.mark.parametrize("module", [*KINDS.values(), *CELLS.values()], ids=lambda module: module[0].__name__)
def test_under_autocast_the_precision_is_that_of_torch(module: Any) -> None:
    """Of an LSTM another than of a GRU. Catches steps with curvature whose outputs cannot be added to the others'."""
    make, own = module
    plain = make(3, 4, **own).float()
    x = torch.randn(*((5, 2, 3) if issubclass(make, nn.RNNBase) else (2, 3)), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_layout(tensors(watched(plain)(x)), tensors(plain(x)))


def test_states_may_be_given_by_keyword() -> None:
    torch.manual_seed(0)
    module, x, h = nn.GRU(3, 4), torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    expected = module(x, h)
    module = watched(module)
    for called in (module(x, hx=h), module(hx=h, input=x)):
        for actual, out in zip(called, expected, strict=True):
            assert torch.allclose(actual, out, rtol=0, atol=1e-10)


class Classifier(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(4, 2)

    def forward(self, x: Any) -> Tensor:
        out = self.recurrent(x)[0]
        return self.head(out[:, -1] if isinstance(out, Tensor) else out.data)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.randn(5, 3), r"layer 'recurrent' got \(5, 3\): natgrad needs a padded batch"),
        (
            pack_padded_sequence(torch.randn(2, 5, 3), torch.tensor([5, 3]), batch_first=True),
            r"layer 'recurrent' got a packed sequence.*use `pad_packed_sequence`",
        ),
    ],
    ids=["no batch", "packed"],
)
def test_inputs_that_cannot_be_replayed_say_so(x: Any, text: str) -> None:
    model = Classifier(nn.LSTM(3, 4, batch_first=True)).float()
    _kept = natgrad.Preconditioner(model, "mse")
    x = x.float()
    with pytest.raises(ValueError, match=text):
        model(x)
    with torch.no_grad():  # evaluation is torch's own
        model.recurrent(x)


def test_cells_without_a_batch_say_so() -> None:
    model = nn.Sequential(nn.GRUCell(3, 4))
    _kept = natgrad.Preconditioner(model, "mse")
    with pytest.raises(ValueError, match=r"without a batch dimension: use `x.unsqueeze\(0\)`"):
        model(torch.randn(3))


def test_projections_are_left_to_the_fallback() -> None:
    parts = partition(nn.LSTM(3, 4, proj_size=2))
    assert parts.layers == []
    assert set(parts.reasons.values()) == {"proj_size is not supported"}


def test_while_statistics_are_not_due_torch_runs_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel is many times faster than the open recurrence."""
    steps = []
    monkeypatch.setattr(recurrent, "step", lambda *args, step=recurrent.step: steps.append(1) or step(*args))
    model = Classifier(nn.LSTM(3, 4, batch_first=True))
    preconditioner, counts = natgrad.Preconditioner(model, "mse", curvature_period=2), []
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(6, 5, 3)).sum().backward()
        preconditioner.step()
        with torch.no_grad():
            model(torch.randn(6, 5, 3))
        counts.append(len(steps))
    assert counts == [5, 5, 10]


def test_data_of_one_position_tell_nothing_of_the_weight_of_hidden_states() -> None:
    """Of which there is none but zeros; they took the place of what was known, and the next steps were far too long."""
    torch.manual_seed(0)
    model = Classifier(nn.GRU(3, 4, batch_first=True))
    preconditioner = natgrad.Preconditioner(model, "mse", factor_decay=0.0, curvature_period=1)
    known = []
    for length in (1, 5, 1):
        mse_loss(model(torch.randn(6, length, 3)), torch.randn(6, 2)).backward()
        preconditioner.step()
        known.append({name: A.clone() for name, (A, _) in preconditioner.factors().items()})
    assert not known[0]["recurrent.hh_l0"][:-1, :-1].any()
    assert torch.equal(known[2]["recurrent.hh_l0"], known[1]["recurrent.hh_l0"])
    assert not torch.equal(known[2]["recurrent.ih_l0"], known[1]["recurrent.ih_l0"])


def test_a_loop_of_cells_is_weight_sharing() -> None:
    """Every call counts: four steps of five data give twenty rows."""
    model = Loop(nn.GRUCell(3, 4), steps=4)
    preconditioner = natgrad.Preconditioner(model, "mse", batch_fraction=1.0)
    model(torch.randn(5, 4, 3))
    statistics = preconditioner.capture.ahead[-1].statistics
    assert {key: s.rows for key, s in statistics.items()} == {("cell.ih", False): 20, ("cell.hh", False): 20}
