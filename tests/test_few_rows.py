"""Batches with fewer rows than a layer has dimensions: its factors gather more often, and remember for longer."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from natgrad.layers import recurrent
from natgrad.schedule import LONGEST, OFTEN, starts


def clusters(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of 200 inputs, and 1,000 data of ten classes in a space of sixteen dimensions."""
    torch.manual_seed(seed)
    mix, centers = torch.randn(16, 200), 1.5 * torch.randn(10, 16)
    y = torch.randint(10, (1000,))
    x = (centers[y] + torch.randn(1000, 16)) @ mix / 4
    return nn.Sequential(nn.Linear(200, 64), nn.ReLU(), nn.Linear(64, 10)), x, y


def train(optimizer: natgrad.KFAC, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(optimizer.preconditioner.model(x), y).backward()
    optimizer.step()


def test_layers_with_too_few_rows_gather_at_every_second_step() -> None:
    """And others where an interval starts; a resumed run goes on with the same ones."""
    model, x, y = clusters(0)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    capture = optimizer.preconditioner.capture
    often = int(100 / 201 * LONGEST)
    while (step := capture.step) < 40:
        assert capture.whole is starts(step, "auto")
        assert capture.due == ({"0", "2"} if capture.whole else set() if step % often else {"0"})
        train(optimizer, x[:100], y[:100])  # enough for 65 dimensions, not for 201
    while capture.step < 80:
        train(optimizer, x[:8], y[:8])
        if not capture.whole and capture.step > 60:
            assert capture.due == (set() if capture.step % OFTEN else {"0", "2"})
    resumed = natgrad.KFAC(copy.deepcopy(model), "cross_entropy")
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.preconditioner.capture.due == capture.due
    assert not resumed.preconditioner.capture.whole


def test_normalizations_alone_are_not_worth_a_pass() -> None:
    """Eight sequences are few rows for their 32 numbers, and many for the layers beside them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    optimizer = natgrad.KFAC(model, "mse")
    capture = optimizer.preconditioner.capture
    for _ in range(40):
        assert capture.due == ({"0", "1", "2"} if starts(capture.step, "auto") else set())
        optimizer.zero_grad()
        x = torch.randn(8, 12, 8)
        mse_loss(model(x), x[..., :4]).backward()
        optimizer.step()
    assert float(optimizer.preconditioner.states()["1"]["rows"]) < 32


def test_between_intervals_no_noise_is_measured() -> None:
    """It costs as much as a solution. The samples are dropped, not the statistics."""
    model, x, y = clusters(0)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for _ in range(32):
        train(optimizer, x[:8], y[:8])
    capture = optimizer.preconditioner.capture
    capture.due, capture.whole = {"0"}, False
    cross_entropy(model(x[:8]), y[:8]).backward()
    assert {name for name, _ in capture.ahead[-1].statistics} == {"0"}
    assert not capture.ahead[-1].samples


def test_batches_of_eight_are_enough() -> None:
    """Catches factors of eight rows every sixteen steps: the held-out loss was 0.17 after 200 steps."""
    model, x, y = clusters(3)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for _ in range(200):
        some = torch.randint(900, (8,))
        train(optimizer, x[some], y[some])
    with torch.no_grad():
        assert cross_entropy(model(x[900:]), y[900:]) < 0.1


@pytest.mark.parametrize("seed", [0, 4, 10])
def test_a_step_that_learnt_few_data_by_heart_tells_no_multiplier(seed: int) -> None:
    """On the next ones the loss rises, as if the loop multiplied it by 4 to 6, which was believed."""
    torch.manual_seed(seed)
    layers = [part for width in (20, 96, 96, 96, 96) for part in (nn.Linear(width, 96), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(96, 1))
    teacher = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
    with torch.no_grad():
        torch._foreach_mul_(list(teacher.parameters()), 2)
    optimizer = natgrad.KFAC(model, "mse")
    for _ in range(20):
        x = torch.randn(16, 20)
        y = teacher(x).detach() + 0.1 * torch.randn(16, 1)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    assert optimizer.diagnostics()["loss_multiplier"] == 1


class Reader(nn.Module):
    """A recurrent network that tells a label at the end: as many rows as steps for it, one a datum for its head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.GRU(4, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def test_modules_whose_layers_are_not_due_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a recurrence that runs step by step in the open for the sake of a layer after it."""
    optimizer, steps = natgrad.KFAC(Reader(), "cross_entropy"), []
    monkeypatch.setattr(recurrent, "step", lambda *args, run=recurrent.step: steps.append(1) or run(*args))
    capture, x, y = optimizer.preconditioner.capture, torch.randn(8, 6, 4), torch.randint(3, (8,))
    seen = set()
    while capture.step < 24:
        steps.clear()
        due = frozenset(capture.due)
        train(optimizer, x, y)
        seen.add((due == {"head"}, bool(steps)))
    assert seen >= {(True, False), (False, True)}
    assert (True, True) not in seen


def test_queries_keys_and_values_of_other_tokens_enter_by_as_many_rows() -> None:
    """Counted by the channels of all three, queries by themselves seemed to be a third of what they are."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = Attending(attention)
    preconditioner = natgrad.Preconditioner(model, "mse")
    model(torch.randn(300, 5, 8)).sum().backward()
    statistics = preconditioner.capture.take().statistics
    rows = statistics["attention.in_proj", False].rows
    assert rows == 3 * statistics["attention.out_proj", False].rows  # of three calls


class Attending(nn.Module):
    """Attends to other tokens than those that ask."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x.flip(1), x.flip(1))[0]
        return out
