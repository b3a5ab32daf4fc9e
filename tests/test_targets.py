"""What one pass tells of the number that multiplies the loss, by the bounds of its targets."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from natgrad.forward import Forward
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, LogCategorical, Poisson
from natgrad.targets import at_least

pytestmark = pytest.mark.usefixtures("float64")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def criteria(name: str) -> tuple[Likelihood, Callable[[Tensor], list[Tensor]]]:
    """A likelihood, and the criterion summed over its entries for each of all targets, or for many."""
    counts = [torch.full((4, 3), float(k)) for k in range(6)]
    bits = [torch.full((4, 3), float(k)) for k in range(2)]
    classes = [torch.full((4,), k) for k in range(3)]
    by_name: dict[str, tuple[Likelihood, Callable[[Tensor], list[Tensor]]]] = {
        "categorical": (Categorical(), lambda f: [cross_entropy(f, y, reduction="sum") for y in classes]),
        "bernoulli": (
            Bernoulli(),
            lambda f: [binary_cross_entropy_with_logits(f, y, reduction="sum") for y in bits],
        ),
        "log categorical": (LogCategorical(), lambda f: [functional.nll_loss(f, y, reduction="sum") for y in classes]),
        "poisson": (Poisson(), lambda f: [functional.poisson_nll_loss(f, y, reduction="sum") for y in counts]),
        "poisson rate": (
            Poisson(log_input=False),
            lambda f: [functional.poisson_nll_loss(f, y, log_input=False, reduction="sum", eps=0.0) for y in counts],
        ),
    }
    return by_name[name]


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "log categorical", "poisson", "poisson rate"])
def test_reach_is_the_longest_gradient_of_any_target(name: str) -> None:
    likelihood, losses = criteria(name)
    f = random(4, 3).abs().requires_grad_() if name == "poisson rate" else random(4, 3).requires_grad_()
    largest = {sign: torch.zeros(4, 3) for sign in (1, -1)}
    for loss in losses(f):
        (g,) = torch.autograd.grad(loss, f)
        for sign, most in largest.items():
            torch.maximum(most, (sign * g).clamp(min=0), out=most)
    for sign, most in largest.items():
        reach = likelihood.reach(f.detach(), torch.full((4, 3), float(sign)))
        assert torch.allclose(torch.where(reach.isfinite(), reach, most), most)
        assert reach.isfinite().all() == (sign == 1 or name in ("categorical", "bernoulli")) or name.startswith("log")


def passed(likelihood: Likelihood, f: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[float, bool]:
    """What one pass tells, given the loss that the loop differentiates."""
    leaf = f.clone().requires_grad_()
    loss(leaf).backward()
    forward = Forward((), {}, f, [])
    with torch.no_grad():
        forward.note(leaf.grad)
    return at_least(forward, likelihood, likelihood.terms(f))


def smoothed(f: Tensor) -> Tensor:
    return cross_entropy(f, labels(5, len(f)), label_smoothing=0.1)


LABELLED: dict[str, tuple[Likelihood, Tensor, Callable[[Tensor], Tensor]]] = {
    "classes": (Categorical(), random(40, 5), lambda f: cross_entropy(f, labels(5, 40))),
    "positions": (Categorical(), random(6, 5, 7), lambda f: cross_entropy(f, labels(5, 6, 7))),
    "one datum": (Categorical(), random(1, 10), lambda f: cross_entropy(f, labels(10, 1))),
    "many classes": (Categorical(), random(3, 30_000), lambda f: cross_entropy(f, labels(30_000, 3))),
    "bits": (Bernoulli(), random(40, 3), lambda f: binary_cross_entropy_with_logits(f, labels(2, 40, 3).double())),
    "some pixels black": (
        Bernoulli(),
        random(40, 9),
        lambda f: binary_cross_entropy_with_logits(f, (random(40, 9, seed=2) / 3).clamp(0, 1)),
    ),
    "counts": (Poisson(), random(40, 3), lambda f: functional.poisson_nll_loss(f, labels(3, 40, 3).double())),
    "summed": (Categorical("sum"), random(40, 5), lambda f: cross_entropy(f, labels(5, 40), reduction="sum")),
    "half precision": (Categorical(), random(40, 5).bfloat16(), lambda f: cross_entropy(f, labels(5, 40))),
}


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e-3])
@pytest.mark.parametrize("name", LABELLED)
def test_labels_tell_the_factor(name: str, factor: float) -> None:
    likelihood, f, loss = LABELLED[name]
    found, certain = passed(likelihood, f, lambda f: factor * loss(f))
    assert certain
    assert found == pytest.approx(factor, rel=0.02 if name == "half precision" else 1e-9)


def test_ignored_targets_are_a_factor() -> None:
    """Functional losses divide by what counts, and natgrad, who is told the name alone, by all."""
    ignored = torch.where(torch.arange(40) < 10, -100, labels(5, 40))
    assert passed(Categorical(), random(40, 5), lambda f: cross_entropy(f, ignored)) == (pytest.approx(40 / 30), True)


@pytest.mark.parametrize(
    ("f", "loss"),
    [
        (random(40, 5), lambda f: cross_entropy(f, random(40, 5, seed=3).softmax(1))),
        (0 * random(40, 5), smoothed),
        (0 * random(40, 1), lambda f: binary_cross_entropy_with_logits(f, torch.full((40, 1), 0.3))),
        (random(40, 5).relu(), lambda f: 0.0 * f.sum()),
    ],
    ids=["soft", "smoothed and uniform", "soft and constant", "no gradient"],
)
def test_targets_that_are_no_labels_give_a_lower_bound(f: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    """Of a constant output, soft targets look like labels under another factor: nothing is certain then."""
    likelihood = Bernoulli() if f.shape[1] == 1 else Categorical()
    found, certain = passed(likelihood, f, loss)
    assert not certain
    assert found <= 1.0


def test_smoothed_labels_are_nearly_labels() -> None:
    found, _ = passed(Categorical(), random(40, 5), smoothed)
    assert 0.85 < found < 1.0


def test_squared_errors_tell_nothing() -> None:
    assert passed(Gaussian(), random(8, 2), lambda f: mse_loss(f, random(8, 2, seed=1))) == (0.0, False)
