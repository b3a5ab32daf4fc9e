"""Which pass of the model a loss module that is watched has seen, and what becomes of the others."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad
from linear_cases import stack
from natgrad import waiting
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return stack([4, 6, 3])


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))


def labels(seed: int = 0) -> Tensor:
    return torch.randint(3, (20,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def anew() -> Iterator[None]:
    """What is told once is told again."""
    waiting.tell_of_forgotten.cache_clear()
    yield
    waiting.tell_of_forgotten.cache_clear()


@pytest.mark.parametrize("criterion", [WEIGHTED, nn.CrossEntropyLoss()], ids=["weighted", "plain"])
def test_a_criterion_of_two_networks_tells_each_of_its_own(criterion: nn.Module) -> None:
    """The one whose loss came first was taken to see the output of the other, and had no G at all."""
    models = [network(seed) for seed in (1, 2)]
    expected = []
    for model in models:
        alone = natgrad.Preconditioner(model, criterion, fisher="exact")
        criterion(model(inputs()), labels()).backward()
        alone.step()
        expected.append(alone.factors())
        alone.capture.close()
        model.zero_grad()
    both = [natgrad.Preconditioner(model, criterion, fisher="exact") for model in models]
    outputs = [model(inputs()) for model in models]
    sum((criterion(output, labels()) for output in outputs), torch.zeros(())).backward()
    for preconditioner, factors in zip(both, expected, strict=True):
        preconditioner.step()
        for name, pair in preconditioner.factors().items():
            assert all(relative_error(F, E) < 1e-12 for F, E in zip(pair, factors[name], strict=True))


def test_another_networks_output_is_not_taken_for_an_equal_one() -> None:
    """As where the heads of both begin with zeros."""
    models = [network(seed) for seed in (1, 2)]
    for model in models:
        nn.init.zeros_(model[-1].weight)
        nn.init.zeros_(model[-1].bias)
    ours = natgrad.Preconditioner(models[0], WEIGHTED)
    outputs = [model(inputs()) for model in models]
    sum((WEIGHTED(output, labels()) for output in outputs[::-1]), torch.zeros(())).backward()
    ours.step()
    assert all(G.any() for name, (_, G) in ours.factors().items() if name == "2")


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize(("passes", "told"), [(waiting.MOST, False), (waiting.MOST + 1, True)])
def test_passes_that_could_not_wait_are_told_of(passes: int, told: bool) -> None:
    model = network()
    preconditioner = natgrad.Preconditioner(model, nn.CrossEntropyLoss())
    outputs = [model(inputs(seed)) for seed in range(passes)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        losses = [nn.functional.cross_entropy(outputs[0], labels()), *map(loss_of(preconditioner), outputs[1:])]
        sum(losses, torch.zeros(())).backward()
    assert any("more than 4 forward passes" in str(one.message) for one in seen) is told


def loss_of(preconditioner: natgrad.Preconditioner) -> nn.Module:
    module = preconditioner.loss.module
    assert module is not None
    return type("Labelled", (nn.Module,), {"forward": lambda _, output: module(output, labels())})()


@pytest.mark.usefixtures("anew")
def test_more_passes_that_are_only_evaluated_are_told_nothing_of() -> None:
    model = network()
    preconditioner, criterion = natgrad.Preconditioner(model, WEIGHTED), WEIGHTED
    kept = [model(inputs(seed)) for seed in range(3 * waiting.MOST)]
    criterion(model(inputs()), labels()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preconditioner.step()
    assert len(kept) == 3 * waiting.MOST


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_criterion_may_be_checkpointed(reentrant: bool) -> None:
    model = network()
    preconditioner = natgrad.Preconditioner(model, WEIGHTED)
    checkpoint(WEIGHTED, model(inputs()), labels(), use_reentrant=reentrant).backward()
    preconditioner.step()
    assert all(G.any() for _, G in preconditioner.factors().values())


def test_a_criterion_that_sees_a_copy_whose_gradient_the_loop_hands_on_is_told_of() -> None:
    """No graph leads from it to the model, and G would be zero."""
    model = network()
    preconditioner = natgrad.Preconditioner(model, WEIGHTED)
    output = model(inputs())
    copy = output.detach().requires_grad_()
    WEIGHTED(copy, labels()).backward()
    output.backward(copy.grad)
    with pytest.raises(RuntimeError, match="was not called with the model's output"):
        preconditioner.step()


@pytest.mark.parametrize("criterion", [WEIGHTED, nn.CrossEntropyLoss()], ids=["weighted", "plain"])
def test_a_step_whose_rearranged_output_is_no_number_is_skipped(criterion: nn.Module) -> None:
    model = network()
    optimizer = natgrad.KFAC(model, criterion)
    for bad in (False, True, False):
        optimizer.zero_grad()
        x = inputs().reshape(5, 4, 4).clone()
        if bad:
            x[0, 0, 0] = torch.nan
        criterion(model(x).reshape(-1, 3), labels()).backward()
        optimizer.step()
    assert optimizer.preconditioner.skipped_steps == 1
    assert optimizer.preconditioner.steps == 2


def test_inputs_of_the_criterion_may_be_named() -> None:
    """That of PoissonNLLLoss has another name."""
    model, criterion = network(), nn.PoissonNLLLoss()
    preconditioner = natgrad.Preconditioner(model, criterion)
    criterion(target=labels().double()[:, None].expand(-1, 3), log_input=model(inputs())).backward()
    assert preconditioner.step()
