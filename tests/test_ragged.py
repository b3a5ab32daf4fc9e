"""Several outputs of different data, of which there are more or fewer: against autograd, and against repeated data."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

import natgrad
from natgrad.joint import Joint
from natgrad.losses import resolve
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")


def ragged(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"inside": torch.randn(5, 2, generator=generator), "ends": torch.randn(2, generator=generator)}


RAGGED = {"inside": "mse", "ends": (0.3, nn.PoissonNLLLoss())}


def test_heads_of_different_lengths() -> None:
    """Each mean is over the head's own data, and rows that fill up have neither curvature nor noise."""
    likelihood, y = resolve(RAGGED).likelihood, ragged(1)
    assert isinstance(likelihood, Joint)
    f, moved = likelihood.join(likelihood.heads(ragged(2))), likelihood.join(likelihood.heads(ragged(3)))
    assert f.shape == (5, 3)
    assert [len(head) for head in likelihood.split(f)] == [5, 2]

    def value(f: Tensor) -> Tensor:
        inside, ends = likelihood.split(f)
        return mse_loss(inside, y["inside"]) + 0.3 * nn.PoissonNLLLoss()(ends, y["ends"])

    R, n = likelihood.scale(likelihood.terms(f)), f.numel()
    products = torch.stack([likelihood.hessian_product(f, e.reshape(f.shape)).flatten() for e in torch.eye(n)])
    assert relative_error(R * products, jacrev(jacrev(value))(f).reshape(n, n)) < 1e-12
    change = torch.sum(torch.func.grad(value)(f) * (moved - f)) + R * likelihood.divergence(f, moved).sum()
    assert torch.allclose(change, value(moved) - value(f), atol=1e-12)
    drawn = likelihood.sample(f, torch.Generator().manual_seed(0))
    assert (drawn[2:, 2] == 0).all()
    assert (drawn[:2, 2] != 0).all()


class Ragged(nn.Module):
    """A network for each head, and what they are given."""

    def __init__(self, repeated: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.ends = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.repeated = repeated

    def forward(self, x: Tensor, x_ends: Tensor) -> dict[str, Tensor]:
        return {"inside": self.inside(x), "ends": self.ends(x_ends.repeat(self.repeated, 1))[:, 0]}


def steps_of_ragged(model: Ragged, longer: int, shorter: int, **settings: Any) -> tuple[list[float], list[float]]:
    """Losses before each step and after the last, and what was told of their changes."""
    generator = torch.Generator().manual_seed(1)
    x, x_ends = torch.randn(longer, 3, generator=generator), torch.randn(shorter, 3, generator=generator)
    optimizer = natgrad.KFAC(model, loss={"inside": "mse", "ends": (3.0, "mse")}, **settings)
    losses, told = [], []
    for _ in range(5):
        optimizer.zero_grad()
        outputs = model(x, x_ends)
        y = x_ends.sin().sum(1).repeat(model.repeated)
        value = mse_loss(outputs["inside"], x[:, :2].cos()) + 3 * mse_loss(outputs["ends"], y)
        losses.append(value.item())
        if len(losses) < 5:
            value.backward()
            optimizer.step()
            told.append(optimizer.diagnostics(per_layer=False).get("actual_change", 0.0))
    return losses, told


def test_data_may_be_repeated_or_not() -> None:
    settings: dict[str, Any] = {"fisher": "exact", "damping": 0.01}
    expected, _ = steps_of_ragged(Ragged(6), 36, 6, **settings)
    assert expected[-1] < expected[0]
    assert torch.allclose(torch.tensor(steps_of_ragged(Ragged(), 36, 6, **settings)[0]), torch.tensor(expected))


@pytest.mark.parametrize(("longer", "shorter"), [(400, 30), (400, 390)])
def test_what_is_told_of_a_step_is_exact(longer: int, shorter: int) -> None:
    """Catches a model of the loss that is of some of the rows, which are no data here."""
    losses, told = steps_of_ragged(Ragged(), longer, shorter)
    changes = [after - before for before, after in itertools.pairwise(losses)]
    assert told == pytest.approx(changes, abs=1e-10)
    assert losses[-1] < 0.5 * losses[0]


def test_every_network_tells_of_its_noise() -> None:
    """Also that of the shorter head; and each number of data is its own."""
    model = Ragged()
    optimizer = natgrad.KFAC(model, loss={"inside": "mse", "ends": (3.0, "mse")})
    outputs = model(torch.randn(40, 3), torch.randn(7, 3))
    (outputs["inside"].square().mean() + 3 * outputs["ends"].square().mean()).backward()
    samples = optimizer.preconditioner.capture.ahead[-1].samples
    assert {name: sample.data for name, (sample,) in samples.items()} == {
        "inside.0": 40,
        "inside.2": 40,
        "ends.0": 7,
        "ends.2": 7,
    }


def test_labels_bound_the_multiplier_whatever_the_lengths() -> None:
    """All rows are looked at, as some of them would not be some of each head's data."""
    torch.manual_seed(0)
    model = Ragged()
    optimizer = natgrad.KFAC(model, loss=dict.fromkeys(("inside", "ends"), "bce_with_logits"))
    x, x_ends = torch.randn(9000, 3), torch.randn(7, 3)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(x, x_ends)
        losses = [binary_cross_entropy_with_logits(f, torch.ones_like(f)) for f in outputs.values()]
        (1000 * sum(losses)).backward()
        optimizer.step()
    assert optimizer.diagnostics(per_layer=False)["loss_multiplier"] == pytest.approx(1000)
