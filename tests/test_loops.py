"""What training loops do beside their passes: natgrad looks at the same network and data, or says that it cannot."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, nll_loss
from torch.nn.utils import prune

import natgrad
from linear_cases import stack
from natgrad import forward

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(number: int = 0, size: int = 40) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(number))


def labels(x: Tensor) -> Tensor:
    return x[:, :3].argmax(1)


# Between the backward pass and the step.


SPECIAL: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "dropout": lambda: nn.Dropout(0.4),
    "both": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Dropout()),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_a_model_may_be_set_to_evaluate_before_the_step(name: str) -> None:
    """Passes of natgrad's were made in that mode: 0.38 became 0.53 on digits, with a warning of undeclared terms."""

    def trained(evaluates: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), SPECIAL[name](), nn.Tanh(), nn.Linear(6, 3))
        optimizer = natgrad.KFAC(model, "cross_entropy")
        for i in range(4):
            model.train()
            optimizer.zero_grad()
            cross_entropy(model(inputs(i)), labels(inputs(i))).backward()
            model.train(not evaluates)
            optimizer.step()
            assert all(module.training is not evaluates for module in model.modules())
        return [p.detach().clone() for p in model.parameters()]

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=0)


def test_gradients_that_frozen_parameters_still_have_are_no_news() -> None:
    model = stack([4, 6, 3])
    mse_loss(model(inputs()), inputs()[:, :3]).backward()
    model[0].requires_grad_(False)
    optimizer = natgrad.KFAC(model, "mse")
    model[2].zero_grad()
    mse_loss(model(inputs()), inputs()[:, :3]).backward()
    optimizer.step()


# Arguments.


class Reading(nn.Module):
    """Does something to its argument before it computes."""

    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.net, self.read = stack([4, 6, 3]), read

    def forward(self, given: Any) -> Tensor:
        out: Tensor = self.net(self.read(given))
        return out


def centered_in_place(x: Tensor) -> Tensor:
    return x.sub_(1.0)


def emptied(parts: list[Tensor]) -> Tensor:
    return torch.cat([parts.pop() for _ in range(len(parts))])


def read_to_the_end(parts: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def take_step(model: nn.Module, optimizer: natgrad.KFAC, given: Any, refill: Tensor | None = None) -> None:
    optimizer.zero_grad()
    mse_loss(model(given), inputs()[:, :3]).backward()
    if refill is not None:
        given.copy_(refill)
    optimizer.step()


def test_a_list_that_the_model_empties_is_kept() -> None:
    one, other = Reading(emptied), Reading(lambda parts: torch.cat(parts[::-1]))
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        optimizer = natgrad.KFAC(model, "mse")
        for _ in range(3):
            take_step(model, optimizer, [inputs()[20:], inputs()[:20]])
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_an_argument_that_is_used_up_is_named() -> None:
    model = Reading(read_to_the_end)
    with pytest.raises(RuntimeError, match=r"natgrad evaluated the model once more .* uses up an argument"):
        take_step(model, natgrad.KFAC(model, "mse"), iter([inputs()]))


def test_arguments_that_change_are_told_of() -> None:
    """In the model, or where the loop refills the buffer of a batch too soon; training had stalled without a reason."""
    for read, refill in ((centered_in_place, None), (lambda x: x, inputs(1))):
        forward._tell_of_arguments.cache_clear()
        model, x = Reading(read), inputs().clone()
        optimizer = natgrad.KFAC(model, "mse")
        with pytest.warns(RuntimeWarning, match="an argument of the model was changed in place"):
            take_step(model, optimizer, x, refill)
    forward._tell_of_arguments.cache_clear()


# Several passes in one loss.


@pytest.mark.parametrize("together", [True, False])
def test_a_pass_without_a_gradient_tells_nothing_of_the_loss(together: bool) -> None:
    """As of pseudo-labels, none of which is sure yet: the loss seemed to be flat, and was multiplied by 10²⁴."""
    model = stack([4, 6, 3])
    optimizer = natgrad.KFAC(model, "cross_entropy", fisher="exact")
    start = float(cross_entropy(model(inputs()), labels(inputs())).detach())
    for _ in range(4):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs()), labels(inputs()))
        if not together:
            loss.backward()
        unsure = 0.0 * cross_entropy(model(inputs(1, size=160)), labels(inputs(1, size=160)))
        (loss + unsure if together else unsure).backward()
        optimizer.step()
        assert optimizer.diagnostics(per_layer=False)["actual_change"] < -0.01
    assert cross_entropy(model(inputs()), labels(inputs())) < 0.3 * start


def test_of_passes_in_one_loss_that_with_the_largest_gradient_is_looked_at() -> None:
    model = stack([4, 6, 3])
    preconditioner = natgrad.Preconditioner(model, "mse")
    x = [inputs(0), inputs(1), inputs(2)]
    losses = [mse_loss(model(part), part[:, :3]) for part in x]
    (losses[0] + 3 * losses[1] + losses[2]).backward()
    latest = preconditioner.capture.take().latest
    assert latest is not None
    assert latest.args[0] is x[1]


@pytest.mark.filterwarnings("ignore:natgrad. 5 steps in a row were not taken:RuntimeWarning")
def test_the_model_may_act_many_times_before_its_loss() -> None:
    """Of twenty actions the last has next to no gradient; a policy stayed where it was, with a multiplier of 10²⁴.

    A step that went too far is seen by the next pass: the least cost counts.
    """
    policy = stack([4, 8, 4])
    optimizer = natgrad.KFAC(policy, "mse")

    def cost() -> Tensor:
        state, total = inputs(), torch.zeros(())
        for _ in range(20):
            state = 0.9 * state + 0.2 * policy(state)
            total = total + state.square().mean()
        return total

    costs = []
    for _ in range(15):
        optimizer.zero_grad()
        costs.append(cost())
        costs[-1].backward()
        optimizer.step()
    assert optimizer.diagnostics(per_layer=False)["loss_multiplier"] < 100
    assert min(costs) < 0.7 * costs[0]


# What no rate is for.


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"'0.weight' has sparse gradients, .* leave `sparse=True` out"):
        natgrad.KFAC(model, "mse")
    natgrad.KFAC(model, "mse", params=model[2].parameters())
    for table in (nn.EmbeddingBag(9, 4, sparse=True), nn.Embedding(9, 4, max_norm=1.0, sparse=True)):
        with pytest.raises(ValueError, match=r"'0.weight' has sparse gradients, .* leave `sparse=True` out"):
            natgrad.KFAC(nn.Sequential(table, nn.Linear(4, 3)), "mse")


def test_complex_weights_are_adamws() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex128), Modulus(), nn.Linear(4, 3))
    optimizer = natgrad.KFAC(model, "mse")
    assert [group["fallback"] for group in optimizer.param_groups] == [False, True]
    before = model[0].weight.detach().clone()
    for _ in range(3):
        take_step(model, optimizer, inputs().to(torch.complex128))
    assert not torch.equal(model[0].weight, before)


class Modulus(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.abs()


# Steps that are skipped.


def test_what_is_not_finite_is_named_and_not_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    model = stack([4, 6, 3])
    optimizer = natgrad.KFAC(model, "mse")
    for i in range(9):
        x = inputs()
        if i % 2:
            x[0] = torch.nan
        optimizer.zero_grad()
        mse_loss(model(x), inputs()[:, :3]).backward()
        if i == 0:
            model[2].bias.grad[0] = torch.inf
        optimizer.step()
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"natgrad: step {step} is skipped, as {what} is not finite ({skipped} so far)"
        for step, what, skipped in [
            (0, "the gradient of 2.bias", 1),
            (0, "the model's output", 2),
            (2, "the model's output", 4),
        ]
    ]


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.float])
def test_a_model_that_changes_its_precision_is_named(change: Callable[[nn.Module], nn.Module]) -> None:
    """Instead of an error from a product of two precisions."""
    model = stack([4, 6, 3])
    optimizer = natgrad.KFAC(model, "mse")
    take_step(model, optimizer, inputs())
    change(model)
    x = inputs().to(model[0].weight.dtype)
    optimizer.zero_grad()
    mse_loss(model(x), x[:, :3]).backward()
    with pytest.raises(RuntimeError, match=r"layer '0' has become torch.float.* make the optimizer after"):
        optimizer.step()


# Losses of log-probabilities.


def of_log_probabilities(
    loss: str | nn.Module, called: Callable[[Tensor, Tensor], Tensor]
) -> tuple[list[Tensor], float]:
    """After eight steps with dropout, and the multiplier of the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3), nn.LogSoftmax(1))
    optimizer = natgrad.KFAC(model, loss)
    for i in range(8):
        optimizer.zero_grad()
        called(model(inputs(i)), labels(inputs(i))).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()], optimizer.diagnostics(per_layer=False)["loss_multiplier"]


@pytest.mark.parametrize("loss", ["cross_entropy", nn.NLLLoss()])
def test_nll_loss_may_be_called_whatever_of_its_kind_was_declared(loss: str | nn.Module) -> None:
    """As in torch's example of MNIST. Declared as NLLLoss, nothing moved after two steps, with a multiplier of 10³⁷."""
    module = nn.NLLLoss()
    expected, _ = of_log_probabilities(module, module)
    found, multiplier = of_log_probabilities(loss, nll_loss)
    assert multiplier == 1
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_a_loss_that_is_linear_in_the_output_tells_no_multiplier_by_its_bend() -> None:
    """It has none; division by it told 10³⁷."""
    weight = torch.tensor([1.0, 2.0, 0.5])
    _, multiplier = of_log_probabilities(nn.NLLLoss(), partial(nll_loss, weight=weight))
    assert 0.1 < multiplier < 10


# What a step is part of.


def test_a_step_may_be_in_what_is_compiled() -> None:
    """It was traced line by line, for minutes."""
    model, other = stack([4, 6, 3]), stack([4, 6, 3])
    other.load_state_dict(model.state_dict())
    optimizer, plain = natgrad.KFAC(model, "mse"), natgrad.KFAC(other, "mse")
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(2):
        take_step(other, plain, inputs())
        optimizer.zero_grad()
        mse_loss(model(inputs()), inputs()[:, :3]).backward()
        step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_model_that_is_pruned_later_needs_another_optimizer() -> None:
    model = stack([4, 6, 3])
    optimizer = natgrad.KFAC(model, "mse")
    take_step(model, optimizer, inputs())
    prune.random_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(RuntimeError, match=r"a parameter is no longer there, as after pruning .* make a new optimizer"):
        take_step(model, optimizer, inputs())


class Positions(nn.Module):
    """Uses the weight of an embedding that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Embedding(40, 4), stack([4, 6, 3])])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.parts[1](x + self.parts[0].weight[: len(x)])
        return out


def test_the_remedy_for_a_layer_that_is_never_called_is_one() -> None:
    model, loss = Positions(), "mse"
    with pytest.raises(RuntimeError, match=r"layer 'parts.0' has a gradient but natgrad saw no data") as error:
        take_step(model, natgrad.KFAC(model, loss), inputs())
    recipe = str(error.value).split("leave them to AdamW: ")[1].rstrip(".")
    assigned, made = recipe.split("; ")
    names: dict[str, Any] = {"model": model, "loss": loss, "natgrad": natgrad}
    exec(assigned, names)
    optimizer = eval(made, names)
    assert [group["fallback"] for group in optimizer.param_groups] == [False, True]
    take_step(model, optimizer, inputs())


def test_passes_that_are_weighted_by_returns_are_not_taken_for_clipped() -> None:
    """A policy gradient: the latest pass has another share in the gradients than its data have."""
    policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = natgrad.KFAC(policy, "cross_entropy")
    warnings.filterwarnings("ignore", message=".*none lowers the loss")
    for episode in range(12):
        returns = torch.randn(20 + episode % 7).sort(descending=True).values
        logits = [policy(torch.randn(1, 4)).log_softmax(1) for _ in returns]
        optimizer.zero_grad()
        chosen = [-p[0, int(p[0].exp().bernoulli()[0])] for p in logits]
        (torch.stack(chosen) * returns).sum().backward()
        optimizer.step()
