"""Likelihoods against automatic differentiation of the loss that the user computes.

Every comparison is R times what the likelihood says with a derivative of torch's own loss, reduction included.
"""

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev

from linear_cases import LOSSES, Loss, every_loss
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, resolve
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
some_examples = hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
KINDS = [Gaussian, Categorical, Bernoulli]
every_kind = pytest.mark.parametrize("kind", KINDS)

SIZES = st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(1, 3), st.integers(1, 2))


def layouts(likelihood: Likelihood, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """(N, C), (N, C, T), (N, C, T, U) and, for losses of single numbers, (N,)."""
    return [sizes[:n] for n in (2, 3, 4, 1) if n > 1 or not isinstance(likelihood, Categorical)]


def logits(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian(loss: Loss, output: Tensor) -> Tensor:
    """Dense Hessian of the user's loss in the flattened output. A column, since the criteria want two dimensions."""
    column = output if output.ndim > 1 else output[:, None]
    torch.manual_seed(0)
    y = loss.target(column)
    return jacrev(jacrev(lambda f: loss.loss_fn(f, y)))(column).reshape(output.numel(), output.numel())


@every_loss
@some_examples
@hypothesis.given(sizes=SIZES)
def test_columns_are_a_square_root_of_the_hessian(loss: Loss, sizes: tuple[int, ...]) -> None:
    """Also catches a wrong R, and classes looked for in the last dimension instead of dimension 1."""
    likelihood = resolve(loss.told)
    for shape in layouts(likelihood, sizes):
        output = logits(shape)
        likelihood.check(output)
        columns = torch.stack(list(likelihood.columns(output))).reshape(-1, shape[0], output[0].numel())  # (K, N, D)
        assert len(columns) == output[0].numel()
        per_datum = torch.einsum("knd,kne->nde", columns, columns)
        R = likelihood.scale(likelihood.terms(output))
        assert relative_error(R * torch.block_diag(*per_datum), hessian(loss, output)) < 1e-12


@every_loss
@some_examples
@hypothesis.given(sizes=SIZES)
def test_hessian_product_is_that_of_the_loss(loss: Loss, sizes: tuple[int, ...]) -> None:
    likelihood = resolve(loss.told)
    for shape in layouts(likelihood, sizes):
        output, vector = logits(shape), logits(shape, seed=1)
        product = likelihood.scale(likelihood.terms(output)) * likelihood.hessian_product(output, vector)
        assert relative_error(product.flatten(), hessian(loss, output) @ vector.flatten()) < 1e-12


@every_kind
def test_a_column_touches_one_position(kind: type[Likelihood]) -> None:
    """Two positions in one column would be mixed by a network in which positions interact."""
    for column in kind().columns(logits((2, 3, 4))):
        touched = column.abs().sum((0, 1)) > 0
        assert touched.sum() == 1


@every_kind
def test_second_moment_of_the_samples_is_the_hessian(kind: type[Likelihood]) -> None:
    """Catches draws that depend on each other between positions, and draws from something else than the model."""
    likelihood, M = kind(), 40_000
    output = logits((1, 3, 2))
    draws = likelihood.sample(output.expand(M, 3, 2), torch.Generator().manual_seed(0)).reshape(M, 6)
    columns = torch.stack(list(likelihood.columns(output))).reshape(6, 6)
    # A mean of M terms of order one is within 5/√M of its expectation.
    assert (draws.T @ draws / M - columns.T @ columns).abs().max() < 5 * 3 / M**0.5
    assert draws.mean(0).abs().max() < 5 / M**0.5


def test_samples_are_gradients_at_possible_targets() -> None:
    output, generator = logits((50, 3, 2)), torch.Generator().manual_seed(0)
    drawn = output.softmax(1) - Categorical().sample(output, generator)
    assert torch.allclose(drawn.sort(1).values, torch.tensor([0.0, 0.0, 1.0])[:, None].expand_as(drawn), atol=1e-12)
    drawn = output.sigmoid() - Bernoulli().sample(output, generator)
    assert torch.allclose(drawn, drawn.round(), atol=1e-12)
    assert drawn.round().unique().tolist() == [0.0, 1.0]


@every_kind
def test_samples_come_from_the_generator_alone(kind: type[Likelihood]) -> None:
    output, state = logits((5, 3)), torch.get_rng_state()
    first, second = (kind().sample(output, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [Categorical, Bernoulli])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_do_not_raise(kind: type[Likelihood], bad: float) -> None:
    """torch's own samplers raise, on a GPU even for the whole process; the step is to be skipped instead."""
    output = logits((3, 4))
    output[1] = bad
    draws = kind().sample(output, torch.Generator().manual_seed(0))
    assert draws[[0, 2]].isfinite().all()
    if kind is Categorical or bad != torch.inf:  # the sigmoid of infinity is 1
        assert draws[1].isnan().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_terms_add_up_when_a_batch_is_split(loss: str) -> None:
    likelihood = resolve(LOSSES[loss].told)
    output = logits((7, 3, 2))
    assert sum(likelihood.terms(part) for part in output.split([1, 4, 2])) == likelihood.terms(output)


# What a user may write as `loss`.


@pytest.mark.parametrize(
    ("told", "kind", "reduction"),
    [
        ("mse", Gaussian, "mean"),
        ("cross_entropy", Categorical, "mean"),
        ("bce_with_logits", Bernoulli, "mean"),
        (nn.MSELoss(), Gaussian, "mean"),
        (nn.MSELoss(reduction="sum"), Gaussian, "sum"),
        (nn.CrossEntropyLoss(), Categorical, "mean"),
        (nn.CrossEntropyLoss(reduction="sum"), Categorical, "sum"),
        (nn.BCEWithLogitsLoss(reduction="sum"), Bernoulli, "sum"),
    ],
)
def test_names_and_modules(told: Any, kind: type[Likelihood], reduction: str) -> None:
    likelihood = resolve(told)
    assert type(likelihood) is kind
    assert likelihood.reduction == reduction


def test_likelihoods_and_none_stay_themselves() -> None:
    likelihood = Gaussian(reduction="batchmean")
    assert resolve(likelihood) is likelihood
    assert resolve(None) is None


class Focal(nn.CrossEntropyLoss):
    """A subclass may compute anything."""


@pytest.mark.parametrize(
    ("told", "error", "text"),
    [
        ("nll", ValueError, "`loss='nll'` is not known: use one of 'mse', 'cross_entropy', 'bce_with_logits'"),
        (nn.L1Loss(), ValueError, "natgrad knows MSELoss, CrossEntropyLoss, BCEWithLogitsLoss"),
        (Focal(), ValueError, "natgrad knows MSELoss"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), ValueError, "'weight' is not supported; leave it at None"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(3)), ValueError, "'weight' is not supported; leave it at None"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), ValueError, "'pos_weight' is not supported"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), ValueError, "'label_smoothing' is not supported; leave it at 0.0"),
        (nn.CrossEntropyLoss(ignore_index=0), ValueError, "'ignore_index' is not supported; leave it at -100"),
        (nn.MSELoss(reduction="none"), ValueError, "reduce with 'mean' or 'sum'"),
        (torch.nn.functional.mse_loss, TypeError, "`loss` must be a name, a torch loss module or a `natgrad.like"),
    ],
)
def test_losses_that_are_refused(told: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        resolve(told)
    assert text in str(raised.value)


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match=r"`reduction` must be one of \('mean', 'sum', 'batchmean'\), not 'avg'"):
        Gaussian(reduction="avg")


@pytest.mark.parametrize(
    ("kind", "output", "text"),
    [
        *[(kind, torch.zeros(4, 3, dtype=torch.long), "needs a floating point output") for kind in KINDS],
        *[(kind, torch.zeros(()), "with the data as its first dimension") for kind in KINDS],
        (Categorical, torch.zeros(4), 'use loss="bce_with_logits"'),
        (Categorical, torch.zeros(4, 1), "at least two classes, and the model returned (4, 1)"),
    ],
)
def test_outputs_that_cannot_belong_to_the_loss(kind: type[Likelihood], output: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)pass `output=`|bce") as raised:
        kind().check(output)
    assert text in str(raised.value)
