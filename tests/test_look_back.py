"""What the previous step did to the loss, asked of the loss itself where the batch is the same."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm

import natgrad
from natgrad.fingerprint import ENTRIES, fingerprint
from natgrad.trust import BACK, Evidence, Trust


def fingerprint_of(*args: Any, **kwargs: Any) -> float:
    return fingerprint((args, kwargs))


def test_inputs_are_told_apart() -> None:
    """By values, order, number and place, and by numbers and words beside the tensors, as a level of noise is one."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 3), torch.randn(7, 3)
    own = fingerprint_of(x, 2, mask={"rows": y})
    assert own == fingerprint_of(x.clone(), 2, mask={"rows": y.clone()})
    assert own != fingerprint_of(x, 3, mask={"rows": y})
    assert fingerprint_of(x, "sum") != fingerprint_of(x, "mean")
    others = [(x.flip(0), y), (x + 1e-3, y), (y, x), (x[:6], y), (x, y[:6])]
    assert own not in {fingerprint_of(a, 2, mask={"rows": b}) for a, b in others}
    wide = torch.randn(5000, 100)
    assert fingerprint_of(wide) != fingerprint_of(wide.flip(0))


@pytest.mark.parametrize("data", [ENTRIES // 4, ENTRIES // 2, ENTRIES])
def test_images_with_a_border_are_told_apart(data: int) -> None:
    """Entries at regular distances lie in the same columns of each image, and these may be black."""
    torch.manual_seed(0)
    images = torch.nn.functional.pad(torch.rand(2, data, 1, 20, 20), (4, 4, 4, 4))
    one, other = (fingerprint_of(batch) for batch in images)
    assert 0 != one != other != 0


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_and_complex_inputs_are_told_apart() -> None:
    """Catches batches of spectra that are taken for one and the same."""
    for kind in (Tensor.to_sparse, Tensor.to_sparse_csr, partial(Tensor.to, dtype=torch.complex64), nested):
        own, same, other = (fingerprint_of(kind(weight * torch.eye(4))) for weight in (1.0, 1.0, 2.0))
        assert own == same != other
    assert fingerprint_of(1j * torch.ones(3)) != fingerprint_of(2j * torch.ones(3))


def nested(rows: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(rows), layout=torch.jagged)


def test_inputs_that_cannot_be_read_are_never_the_same() -> None:
    unknown = fingerprint_of(object(), torch.ones(3))
    assert unknown != unknown


class Heat(nn.Module):
    """u_t = u_xx, by derivatives in the forward pass: far from quadratic in the weights."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        inner = weight_norm(nn.Linear(16, 16))
        self.u = nn.Sequential(weight_norm(nn.Linear(2, 16)), nn.Tanh(), inner, nn.Tanh(), nn.Linear(16, 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, inside: Tensor, start: Tensor) -> dict[str, Tensor]:
        x = inside.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.u(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
        equation = self.dropout(slope[:, 1] - bend[:, 0])
        return {"equation": equation, "start": self.u(start) - torch.sin(torch.pi * start[:, :1])}


def averaged(shuffles: bool = False, dropout: float = 0.0) -> tuple[int, float]:
    """At how many of 40 steps gradients were averaged, and the loss in the end over that in the beginning."""
    model, generator = Heat(dropout), torch.Generator().manual_seed(0)
    inside, start = (torch.rand(n, 2, generator=generator) for n in (150, 40))
    start[:, 1] = 0
    optimizer, count, losses = natgrad.KFAC(model, {"equation": "mse", "start": (10.0, "mse")}), 0, []
    for _ in range(40):
        optimizer.zero_grad()
        out = model(inside[torch.randperm(150, generator=generator)] if shuffles else inside, start)
        loss = out["equation"].square().mean() + 10 * out["start"].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        count += int(optimizer.diagnostics(per_layer=False)["averaging"])
    return count, losses[-1] / losses[0]


@pytest.mark.usefixtures("float64")
def test_a_loss_that_is_not_quadratic_is_no_noise() -> None:
    """The quadratic model that looks back takes it for noise, and is believed where the batch may be another."""
    count, fall = averaged()
    assert count == 0
    assert fall < 0.03
    assert averaged(shuffles=True)[0] > 0


@pytest.mark.usefixtures("float64")
def test_dropout_is_noise_on_the_same_batch() -> None:
    assert averaged(dropout=0.8)[0] > 0


def test_what_was_seen_in_fact_replaces_what_was_guessed() -> None:
    state: dict[str, Any] = {"evidence": torch.tensor(Evidence(confirmed=0.1))}
    Trust(state).witness(0.9)
    assert Trust(state).confirmed == pytest.approx(0.9)
    Trust(state).witness(1.7)
    assert Trust(state).confirmed == 1.0


class Branched(nn.Module):
    """A network with a branch that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.uses_branch = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + self.branch(h) if self.uses_branch else h)


def test_a_layer_that_is_not_used_any_more_is_no_reason_not_to_look_back() -> None:
    """Its step is none. Catches a dead expert with which nothing was ever confirmed, and no gradient averaged."""
    torch.manual_seed(0)
    model = Branched()
    optimizer = natgrad.KFAC(model, "cross_entropy")

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    for uses_branch in (True, True, False):
        model.uses_branch = uses_branch
        step(x, y)  # the same data, which refute nothing
    assert not optimizer.state[model.branch.weight]["velocity"].any()
    assert optimizer.state[model.last.weight]["velocity"].any()
    for _ in range(24):
        step(torch.randn(32, 6), torch.randint(3, (32,)))
    told = optimizer.diagnostics()
    assert told["averaging"] == 1
    assert 0 < told["confirmed"] < 0.7


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {}])
def test_rates_recover_where_nobody_looks_back(options: dict[str, Any]) -> None:
    """With a given momentum, or on the same batch: catches rates that stay at a quarter once a step was undone."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(64, 6), torch.randint(3, (64,))
    optimizer = natgrad.KFAC(model, "cross_entropy", **options)
    for step in range(8):
        if step == 2:
            optimizer.state[model.weight]["evidence"] = torch.tensor(Evidence(confirmed=1.0, caution=BACK))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    assert optimizer.diagnostics()["caution"] == 1
