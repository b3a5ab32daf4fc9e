"""From what a model returns to what the loss sees, and to where the loss's gradient arrives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from linear_cases import stack
from natgrad.losses import resolve
from natgrad.outputs import Selection, View, rearrangement

pytestmark = pytest.mark.usefixtures("float64")


# How the loss module's input comes from the model's output.


def seen_as(way: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (2, 4, 3)) -> tuple[Tensor, Tensor]:
    """What the model returned, and what the loss module got."""
    returned = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return returned, way(returned)


@pytest.mark.parametrize(
    "way",
    [
        lambda out: out,
        lambda out: out.reshape(8, 3),
        lambda out: out.movedim(-1, 1),
        lambda out: out.transpose(1, 2),
        lambda out: out.movedim(1, -1).reshape(6, 4),
    ],
    ids=["as it is", "flattened tokens", "moved classes", "transposed", "moved and flattened"],
)
def test_rearrangements_are_recognized_for_any_number_of_data(way: Callable[[Tensor], Tensor]) -> None:
    returned, given = seen_as(way)
    again = rearrangement(returned, given)
    assert torch.equal(again(returned), given)
    part = torch.randn(1, *returned.shape[1:])
    assert again(part).shape == (given.shape[0] // 2, *given.shape[1:])


def test_without_a_loss_module_nothing_is_rearranged() -> None:
    out = torch.randn(2, 3)
    assert rearrangement(None, torch.randn(5, 7))(out) is out


@pytest.mark.parametrize(
    "way",
    [
        lambda out: 2 * out,
        lambda out: out[:, 1:],
        lambda out: out.flip(0),
        lambda out: out[:, -1],
        lambda out: out[:, 0, 0],
    ],
)
def test_what_cannot_be_traced_to_the_output_is_refused(way: Callable[[Tensor], Tensor]) -> None:
    """Shapes alone do not tell."""
    with pytest.raises(ValueError, match=r"cannot trace to the model's output, of shape \(2, 4, 3\): pass `output=`"):
        rearrangement(*seen_as(way))


# Where the gradient arrives.


def origins(raw: Any, function: Callable[[Any], Any] | None) -> list[Tensor]:
    view = View(function, resolve("mse"))
    return [origin.tensor for origin in view.origins(raw, view.heads(raw))[0]]


def test_the_gradient_arrives_at_the_nearest_tensors_that_were_returned() -> None:
    """Not at features from which a returned tensor was made: what arrives there went through that tensor."""
    features = torch.randn(3, 2, requires_grad=True) * 2
    logits, others = features @ torch.randn(2, 4), features + 1
    (one,) = origins((features, logits, others), lambda out: out[1].mT.mT * 3)
    assert one is logits
    both = origins({"f": features, "l": [logits, others]}, lambda out: torch.cat(out["l"], 1))
    assert [id(tensor) for tensor in both] == [id(logits), id(others)]
    made = (features @ torch.randn(2, 2)).sin()
    (unknown,) = origins(object(), lambda _: made)
    assert unknown is made


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda out: out.movedim(-1, 1),
        lambda out: out.mT,
        lambda out: out.unflatten(2, (2, 2)).permute(3, 0, 2, 1),
        lambda out: out,
        lambda out: out.unsqueeze(1),
    ],
)
@pytest.mark.parametrize("transposed", [True, False])
def test_the_gradient_at_an_output_in_another_order_is_known(
    rearrange: Callable[[Tensor], Tensor], transposed: bool
) -> None:
    """It arrives at what the model returned, and has the same entries."""
    raw = torch.randn(3, 4, 5, requires_grad=True).mT.exp() if transposed else torch.randn(3, 5, 4).requires_grad_() * 1
    view = View(rearrange, resolve("mse"))
    (head,) = view.heads(raw)
    (origin,), find = view.origins(raw, [head])
    weight = torch.randn(head.shape)
    (arrived,) = torch.autograd.grad((rearrange(raw) * weight).sum(), raw)
    assert (find, origin.tensor) == (None, raw)
    assert torch.equal(origin.order(arrived), weight)


@pytest.mark.parametrize("part", [lambda out: out[:, :, 1:], lambda out: out.expand(2, 3, 5, 4), lambda out: out[:2]])
def test_a_part_or_a_copy_of_an_output_is_another_tensor(part: Callable[[Tensor], Tensor]) -> None:
    raw = torch.randn(3, 5, 4).requires_grad_() * 1
    view = View(part, resolve("mse"))
    (origin,), find = view.origins(raw, view.heads(raw))
    assert origin.tensor is raw
    assert find is not None
    assert find(raw) is raw


# What the loop selects of the output.


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gathered": lambda out: out.gather(1, torch.arange(len(out)).unsqueeze(1) % 4),
    "indexed": lambda out: out[torch.arange(len(out)), torch.arange(len(out)) % 4],
    "two of each": lambda out: out.gather(1, (torch.arange(len(out)).unsqueeze(1) + torch.tensor([0, 2])) % 4),
    "columns": lambda out: out[:, 1:3],
}


def test_orders_of_selected_entries_are_kept() -> None:
    out = random(5, 4).requires_grad_()
    given = out[:, [2, 0, 3]]
    found = Selection.between(out, given)
    assert found is not None
    other = random(5, 4)
    assert torch.equal(found(other), other[:, [2, 0, 3]])
    assert torch.equal(found.of(torch.tensor([3, 1]))(other[[3, 1]]), other[[3, 1]][:, [2, 0, 3]])


@pytest.mark.parametrize(
    "made",
    [
        lambda out: 2 * out[:, :2],
        lambda out: out[:, [1, 1]],
        lambda out: out[:, :2] + out[:, 2:],
        lambda out: out.flip(0)[:, :2],
        lambda out: out[:3, :2],
        lambda out: out.detach()[:, :2].requires_grad_(),
        lambda out: out[:, :2] + out[:, :2] - out[:, :2].detach(),  # of the same value, and not the same derivative
    ],
)
def test_what_is_more_than_a_selection_is_none(made: Callable[[Tensor], Tensor]) -> None:
    out = random(5, 4).requires_grad_()
    assert Selection.between(out, made(out)) is None


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("loss", [nn.SmoothL1Loss(), nn.HuberLoss(delta=0.3)])
def test_a_loss_of_selected_entries_trains_as_one_that_the_model_selects(name: str, loss: nn.Module) -> None:
    """As of the actions that were taken, in Q-learning; on all data of a pass and on some."""

    def trained(inside: bool) -> tuple[list[Tensor], list[float]]:
        torch.manual_seed(0)
        net = stack([3, 6, 4])
        model = nn.Sequential(net, Select(SELECTIONS[name])) if inside else net
        optimizer, changes = natgrad.KFAC(model, loss, fisher="exact", batch_fraction=1.0), []
        for _ in range(4):
            x = random(400, 3)
            optimizer.zero_grad()
            out = model(x)
            seen = out if inside else SELECTIONS[name](out)
            loss(seen, torch.sin(3 * seen.detach())).backward()
            optimizer.step()
            changes.append(optimizer.diagnostics(per_layer=False)["actual_change"])
        return [p.detach() for p in model.parameters()], changes

    (mine, changes), (theirs, expected) = trained(False), trained(True)
    if name == "columns":  # which are the same of some of the data, so that these are chosen alike
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(changes, expected)
    assert all(change < 0 for change in changes)


class Select(nn.Module):
    def __init__(self, select: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.select = select

    def forward(self, out: Tensor) -> Tensor:
        return self.select(out)
