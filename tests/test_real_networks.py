"""Networks as people have them, with natgrad's defaults: they learn; and where data are bad, nothing breaks."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad
from natgrad.inverses import invert
from natgrad.layers.convolution import ConvolutionLayer
from networks import TASKS

STEPS = 20


def train(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, steps: int = STEPS, **options: Any) -> list[float]:
    """Losses, before each step and after the last."""
    optimizer, losses = natgrad.KFAC(model, loss, **options), []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return [*losses, float(loss(model(x), y).detach())]


def finite(model: nn.Module) -> bool:
    return all(bool(t.isfinite().all()) for t in model.state_dict().values())


@pytest.mark.parametrize("name", TASKS)
def test_real_networks_learn(name: str) -> None:
    torch.manual_seed(0)
    model, loss, x, y = TASKS[name]()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(model, loss, x, y)
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0], losses
    assert finite(model)
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


@pytest.mark.parametrize("name", TASKS)
def test_every_row_of_the_description_has_a_reason(name: str) -> None:
    """A kind with factors or a reason; and every parameter is in one row."""
    model = TASKS[name]().model
    rows = natgrad.describe(model).rows
    assert [row.name for row in rows if not row.kind or bool(row.factors) == bool(row.reason)] == []
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    without = {row.name for row in rows if not row.factors}
    assert without == ({"token", "position"} if name == "ViT" else set())


# Bad data.


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))


may_be_singular = pytest.mark.filterwarnings("ignore:natgrad. a factor . is singular at its damping:RuntimeWarning")


@may_be_singular
@pytest.mark.parametrize("options", [{}, {"damping": 0.0}, {"damping": 0.0, "lr": 0.1, "momentum": 0.9}], ids=str)
@pytest.mark.parametrize("name", ["one datum", "constant", "zeros", "dead", "one class"])
def test_bad_data_leave_the_parameters_finite(name: str, options: dict[str, Any]) -> None:
    """Factors of rank one and zero, no damping to help."""
    torch.manual_seed(0)
    model, x, y = conv_net(), torch.randn(8, 1, 4, 4), torch.randint(3, (8,))
    if name == "one datum":
        x, y = x[:1], y[:1]
    elif name == "constant":
        x = torch.ones_like(x)
    elif name == "zeros":
        x = torch.zeros_like(x)
    elif name == "dead":
        nn.init.constant_(model[0].bias, -100.0)
    else:
        y = torch.zeros_like(y)
    losses = train(model, nn.CrossEntropyLoss(), x, y, 6, **options)
    assert finite(model)
    assert torch.tensor(losses).isfinite().all()


@may_be_singular
def test_a_factor_that_is_zero_moves_nothing() -> None:
    """As behind a saturated softmax, whose sampled gradients vanish while the user's own do not."""
    zero, one = torch.zeros(3, 3), torch.eye(2)
    assert torch.equal(invert(zero, 0.0, "G"), zero)
    inverse = invert(torch.stack([one, 0 * one]), 0.0, "G")  # one block of a grouped layer
    assert torch.allclose(inverse, torch.stack([one, 0 * one]), rtol=1e-4)


# Memory.


def test_an_embedding_of_many_rows_has_a_diagonal_factor() -> None:
    """Dense it would take 10 GB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50_000, 4), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randint(50_000, (16, 3)), torch.randint(3, (16,))
    optimizer = natgrad.KFAC(model, "cross_entropy")
    cross_entropy(model(x), y).backward()
    optimizer.step()
    sizes = {key: t.numel() for key, t in optimizer.state[model[0].weight].items() if isinstance(t, Tensor)}
    assert max(sizes.values()) <= 50_000 * 4, sizes
    assert optimizer.preconditioner.factors()["0"][0].shape == (50_000, 1)


def test_patches_of_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows of A, which are the largest tensors of a convolution, none is kept while the next is made."""
    alive, most = weakref.WeakSet[Tensor](), []
    original = ConvolutionLayer.inputs

    def counted(self: ConvolutionLayer, x: Tensor) -> Tensor:
        most.append(len(alive))
        rows = original(self, x)
        alive.add(rows)
        return rows

    monkeypatch.setattr(ConvolutionLayer, "inputs", counted)
    model = nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=1) for _ in range(4)], nn.Flatten(), nn.Linear(32, 3))
    optimizer = natgrad.KFAC(model, "cross_entropy")
    cross_entropy(model(torch.randn(8, 2, 4, 4)), torch.randint(3, (8,))).backward()
    assert len(most) == 4
    assert max(most) <= 1, most
    assert len(alive) <= 1
    optimizer.step()
