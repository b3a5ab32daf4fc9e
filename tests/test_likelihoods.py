"""Likelihoods against automatic differentiation of the loss that the user computes.

Every comparison is R times what the likelihood says with a derivative of torch's own loss, reduction included.
"""

from collections.abc import Callable

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, poisson_nll_loss

from cases import LOSSES, Loss, every_loss
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, LogCategorical, MeanVariance, Poisson
from natgrad.losses import resolve
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
some_examples = hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
KINDS = [Gaussian, Categorical, Bernoulli, LogCategorical, Poisson, MeanVariance]
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
    likelihood = resolve(loss.told).likelihood
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
    likelihood = resolve(loss.told).likelihood
    for shape in layouts(likelihood, sizes):
        output, vector = logits(shape), logits(shape, seed=1)
        product = likelihood.scale(likelihood.terms(output)) * likelihood.hessian_product(output, vector)
        assert relative_error(product.flatten(), hessian(loss, output) @ vector.flatten()) < 1e-12


def output_for(kind: type[Likelihood], shape: tuple[int, ...]) -> Tensor:
    """Log-probabilities, or means and positive variances, where the likelihood wants them."""
    if kind is LogCategorical:
        return logits(shape).log_softmax(1)
    if kind is MeanVariance:
        rest = (shape[0], *shape[2:])
        return torch.stack([logits(rest), logits(rest, seed=1).exp()], 1)
    return logits(shape)


def expected_hessian(criterion: Callable[[Tensor, Tensor], Tensor], output: Tensor, targets: list[Tensor]) -> Tensor:
    """Of a criterion, averaged over targets that stand for the model's own distribution."""
    n = output.numel()
    return torch.stack([jacrev(jacrev(lambda f: criterion(f, y)))(output).reshape(n, n) for y in targets]).mean(0)  # noqa: B023


def outer_products(likelihood: Likelihood, output: Tensor) -> Tensor:
    """Σ of the columns' outer products of one datum, reduction included."""
    columns = torch.stack(list(likelihood.columns(output))).flatten(1)
    return likelihood.scale(likelihood.terms(output)) * columns.T @ columns


@pytest.mark.parametrize("log_input", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_poisson_is_the_fisher_of_torchs_loss(log_input: bool, reduction: str) -> None:
    """Its Hessian is linear in the count, so that the rate, the mean of all counts, stands for them."""
    output = logits((1, 3, 2)) if log_input else logits((1, 3, 2)).exp()
    criterion = nn.PoissonNLLLoss(log_input=log_input, reduction=reduction, eps=0.0)
    likelihood = Poisson(reduction, log_input=log_input)
    rate = output.exp() if log_input else output.clone()
    expected = expected_hessian(criterion, output, [rate])
    assert relative_error(outer_products(likelihood, output), expected) < 1e-12
    v = logits((1, 3, 2), seed=2)
    product = likelihood.scale(likelihood.terms(output)) * likelihood.hessian_product(output, v)
    assert relative_error(product.flatten(), expected @ v.flatten()) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mean_and_variance_have_the_fisher_of_torchs_loss(reduction: str) -> None:
    """Its Hessian is quadratic in the target, so that two targets, one deviation to either side, stand for all."""
    output = output_for(MeanVariance, (1, 2, 3))
    criterion = nn.GaussianNLLLoss(reduction=reduction)
    mean, deviation = output[:, 0], output[:, 1].sqrt()
    targets = [mean + deviation, mean - deviation]
    expected = expected_hessian(lambda f, y: criterion(f[:, 0], y, f[:, 1]), output, targets)
    likelihood = MeanVariance(reduction)
    assert relative_error(outer_products(likelihood, output), expected) < 1e-12
    v = logits((1, 2, 3), seed=2)
    product = likelihood.scale(likelihood.terms(output)) * likelihood.hessian_product(output, v)
    assert relative_error(product.flatten(), expected @ v.flatten()) < 1e-12


def test_log_probabilities_have_the_fisher_of_their_logits() -> None:
    """Seen through log_softmax it is the Hessian of the cross-entropy."""
    z = logits((1, 3, 2))
    J = jacrev(lambda z: z.log_softmax(1))(z).reshape(6, 6)
    columns = [c.flatten() @ J for c in LogCategorical().columns(z.log_softmax(1))]
    expected = [c.flatten() for c in Categorical().columns(z)]
    outer = [torch.stack(c).T @ torch.stack(c) for c in (columns, expected)]
    assert relative_error(*outer) < 1e-12
    v = logits((1, 3, 2), seed=2)
    product = J.T @ LogCategorical().hessian_product(z.log_softmax(1), (J @ v.flatten()).reshape(v.shape)).flatten()
    assert relative_error(product, outer[1] @ v.flatten()) < 1e-12


@every_kind
def test_a_column_touches_one_position(kind: type[Likelihood]) -> None:
    """Two positions in one column would be mixed by a network in which positions interact."""
    for column in kind().columns(output_for(kind, (2, 3, 4))):
        touched = column.abs().sum((0, 1)) > 0
        assert touched.sum() == 1


@every_kind
def test_second_moment_of_the_samples_is_the_hessian(kind: type[Likelihood]) -> None:
    """Catches draws that depend on each other between positions, and draws from something else than the model."""
    likelihood, M = kind(), 40_000
    output = output_for(kind, (1, 3, 2)) / (4 if kind is Poisson else 1)  # large rates have heavy tails
    draws = likelihood.sample(output.expand(M, *output.shape[1:]), torch.Generator().manual_seed(0)).flatten(1)
    columns = torch.stack(list(likelihood.columns(output))).flatten(1)
    if kind is LogCategorical:  # in its own input the gradient has a mean, which log_softmax takes away
        J = jacrev(lambda z: z.log_softmax(1))(output).reshape(6, 6)
        draws, columns = draws @ J, columns @ J
    # A mean of M terms of order one is within 5/√M of its expectation; an inverse variance may be larger.
    bound = 5 * max(1.0, float(columns.square().sum(0).max())) / M**0.5
    assert (draws.T @ draws / M - columns.T @ columns).abs().max() < 3 * bound
    assert draws.mean(0).abs().max() < bound


def test_samples_are_gradients_at_possible_targets() -> None:
    output, generator = logits((50, 3, 2)), torch.Generator().manual_seed(0)
    drawn = output.softmax(1) - Categorical().sample(output, generator)
    assert torch.allclose(drawn.sort(1).values, torch.tensor([0.0, 0.0, 1.0])[:, None].expand_as(drawn), atol=1e-12)
    drawn = output.sigmoid() - Bernoulli().sample(output, generator)
    assert torch.allclose(drawn, drawn.round(), atol=1e-12)
    assert drawn.round().unique().tolist() == [0.0, 1.0]


@every_kind
def test_samples_come_from_the_generator_alone(kind: type[Likelihood]) -> None:
    output, state = output_for(kind, (5, 3)), torch.get_rng_state()
    first, second = (kind().sample(output, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [Categorical, Bernoulli, LogCategorical, Poisson])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_do_not_raise(kind: type[Likelihood], bad: float) -> None:
    """torch's own samplers raise, on a GPU even for the whole process; the step is to be skipped instead."""
    output = logits((3, 4))
    output[1] = bad
    draws = kind().sample(output, torch.Generator().manual_seed(0))
    assert draws[[0, 2]].isfinite().all()
    if kind is not Bernoulli or bad != torch.inf:  # the sigmoid of infinity is 1
        assert not draws[1].isfinite().any()


# The curvature of what data cannot tell from certainty.


def additional(p: Tensor, number: int, uniform: float) -> Tensor:
    return (number * p + uniform) / (number + 1)


SMOOTHED: dict[str, tuple[Likelihood, Likelihood, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "classes": (Categorical(), Categorical(), lambda f: f.softmax(1), torch.log),
    "log-probabilities": (LogCategorical(), LogCategorical(), lambda f: f.softmax(1), torch.log),
    "binary": (Bernoulli(), Bernoulli(), torch.sigmoid, torch.logit),
    "counts": (Poisson(), Poisson(), torch.exp, torch.log),
}


@pytest.mark.parametrize("number", [4, 100])
@pytest.mark.parametrize(("likelihood", "same", "mean", "link"), SMOOTHED.values(), ids=SMOOTHED.keys())
def test_smoothed_curvature_is_that_of_one_more_observation(
    likelihood: Likelihood,
    same: Likelihood,
    mean: Callable[[Tensor], Tensor],
    link: Callable[[Tensor], Tensor],
    number: int,
) -> None:
    K = 3 if isinstance(likelihood, Categorical) else 2
    smoothed, v = likelihood.smoothed(logits((2, 3, 2)), number), logits((2, 3, 2), seed=2)
    for f in (logits((2, 3, 2)), logits((2, 3, 2), seed=1)):
        at = link(additional(mean(f), number, 1 / K))
        if isinstance(likelihood, Poisson):
            at = torch.log(f.exp() + 1 / 2 / (number + 1))
        assert relative_error(smoothed.hessian_product(f, v), same.hessian_product(at, v)) < 1e-12
        for one, other in zip(smoothed.columns(f), same.columns(at), strict=True):
            assert torch.allclose(one, other, atol=1e-12)
        draws = [k.sample(x, torch.Generator().manual_seed(0)) for k, x in ((smoothed, f), (same, at))]
        assert torch.allclose(*draws, atol=1e-12)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Poisson(), Gaussian()])
def test_what_a_step_does_is_not_smoothed(likelihood: Likelihood) -> None:
    f, moved = logits((2, 3)), logits((2, 3), seed=1)
    smoothed = likelihood.smoothed(f, 4)
    assert torch.equal(smoothed.divergence(f, moved), likelihood.divergence(f, moved))
    assert torch.equal(smoothed.gradient_change(f, moved), likelihood.gradient_change(f, moved))
    assert torch.equal(smoothed.remainder(f, moved, f), likelihood.remainder(f, moved, f))


def test_what_is_no_probability_is_not_smoothed() -> None:
    f, v = output_for(MeanVariance, (2, 2)), logits((2, 2))
    for likelihood in (Gaussian(), MeanVariance(), Poisson(log_input=False)):
        smoothed = likelihood.smoothed(f, 4)
        assert torch.equal(smoothed.hessian_product(f, v), likelihood.hessian_product(f, v))
        draws = [one.sample(f, torch.Generator().manual_seed(0)) for one in (smoothed, likelihood)]
        assert torch.equal(*draws)


def test_where_a_model_is_certain_and_wrong_there_is_curvature() -> None:
    f = torch.tensor([[2000.0, 0.0], [0.0, 0.0]])
    assert not Categorical().hessian_product(f, torch.eye(2))[0].any()
    assert Categorical().smoothed(f, 2).hessian_product(f, torch.eye(2))[0, 0] == pytest.approx(5 / 36)


def test_log_probabilities_that_were_called_keep_the_smoothing() -> None:
    f = logits((4, 3)).log_softmax(1)
    smoothed = Categorical("sum").smoothed(f, 4)
    called = smoothed.as_called(f, -torch.eye(3)[[0, 1, 2, 0]])
    assert isinstance(called, LogCategorical)
    assert called.reduction == "sum"
    v = logits((4, 3), seed=1)
    assert torch.equal(called.hessian_product(f, v), smoothed.hessian_product(f, v))


@pytest.mark.parametrize("least", [-torch.inf, -1e9])
def test_a_class_that_is_ruled_out_is_never_observed(least: float) -> None:
    f = logits((500, 3))
    f[:, 1] = least
    smoothed = Categorical().smoothed(f, 1)
    draws = smoothed.sample(f, torch.Generator().manual_seed(0))
    assert not draws[:, 1].any()
    p = 0.5 * f.softmax(1) + 0.25
    p[:, 1] = 0
    v = logits((500, 3), seed=1)
    assert torch.allclose(smoothed.hessian_product(f, v), p * v - p * (p * v).sum(1, keepdim=True), atol=1e-12)
    assert torch.allclose((p - draws).sum(1), torch.ones(500))


@every_kind
def test_the_slope_rises_as_the_gradient_changes(kind: type[Likelihood]) -> None:
    """That of log-probabilities as that of their logits, whose softmax bends it."""
    f, moved = output_for(kind, (2, 2, 3)), output_for(kind, (2, 2, 3)) + 0.1
    moved[:, 0] += 0.3
    expected = kind().gradient_change(f, moved) * (moved - f)
    if kind is LogCategorical:
        expected = Categorical().gradient_change(f, moved) * (moved - f)
        assert expected.sum() > 0
    assert torch.equal(kind().steepening(f, moved), expected)


def test_a_likelihood_of_the_users_own_is_not_touched() -> None:
    """It may have any attributes, and not take any more."""

    class Own(Gaussian):
        smoothing = 0.1
        __setattr__ = None  # type: ignore[assignment]

        def __init__(self) -> None: ...

    own = Own()
    assert own.smoothed(torch.zeros(2), 4) is own
    assert own.smoothing == 0.1


# What a step at the output does to the criterion.


CRITERIA: dict[str, tuple[Likelihood, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "mse": (Gaussian(), lambda f, y: (f - y).square() / 2, torch.randn_like),
    "ce": (Categorical(), lambda f, y: cross_entropy(f, y, reduction="none"), lambda f: torch.rand_like(f).softmax(1)),
    "bce": (Bernoulli(), lambda f, y: binary_cross_entropy_with_logits(f, y, reduction="none"), torch.rand_like),
    "poisson": (Poisson(), lambda f, y: poisson_nll_loss(f, y, reduction="none"), lambda f: 9 * torch.rand_like(f)),
    "nll": (LogCategorical(), lambda f, y: -(f * y).sum(1), lambda f: torch.rand_like(f).softmax(1)),
}
every_criterion = pytest.mark.parametrize(("likelihood", "criterion", "target"), CRITERIA.values(), ids=CRITERIA.keys())


def moved_outputs(seed: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return logits(shape, seed), logits(shape, seed) + torch.randn(shape)


@every_criterion
@hypothesis.settings(some_examples, max_examples=15)
@hypothesis.given(seed=st.integers(0, 1000), sizes=SIZES)
def test_divergence_and_gradient_make_the_exact_change(
    likelihood: Likelihood,
    criterion: Callable[[Tensor, Tensor], Tensor],
    target: Callable[[Tensor], Tensor],
    seed: int,
    sizes: tuple[int, ...],
) -> None:
    """c(f′) = c(f) + ∇c(f) · (f′ − f) + D(f, f′) at every criterion, whatever the target."""
    f, moved = moved_outputs(seed, sizes[:3])
    y = target(f)
    gradient = torch.func.grad(lambda f: criterion(f, y).sum())(f)
    linear = gradient * (moved - f)
    linear = linear.sum(1, keepdim=True) if isinstance(likelihood, Categorical) else linear
    divergence = likelihood.divergence(f, moved)
    divergence = divergence.sum(1, keepdim=True) if isinstance(likelihood, Categorical) else divergence
    change = (criterion(moved, y) - criterion(f, y)).reshape(linear.shape)
    assert torch.allclose(linear + divergence, change, rtol=1e-10, atol=1e-10)
    assert (divergence >= -1e-12).all()


@every_criterion
def test_gradient_change_is_that_of_automatic_differentiation(
    likelihood: Likelihood, criterion: Callable[[Tensor, Tensor], Tensor], target: Callable[[Tensor], Tensor]
) -> None:
    f, moved = moved_outputs(0, (4, 3, 2))
    y = target(f)
    before, after = (torch.func.grad(lambda f: criterion(f, y).sum())(at) for at in (f, moved))
    assert torch.allclose(likelihood.gradient_change(f, moved), after - before, rtol=1e-10, atol=1e-10)


def distributions(likelihood: Likelihood, f: Tensor) -> torch.distributions.Distribution:
    """What the output means, in torch's own words."""
    if isinstance(likelihood, MeanVariance):
        return torch.distributions.Normal(f[:, 0], f[:, 1].sqrt())
    if isinstance(likelihood, Poisson):
        return torch.distributions.Poisson(f.exp() if likelihood.log_input else f)
    if isinstance(likelihood, Bernoulli):
        return torch.distributions.Bernoulli(logits=f)
    if isinstance(likelihood, Categorical):
        return torch.distributions.Categorical(logits=f.movedim(1, -1))
    return torch.distributions.Normal(f, 1.0)


@pytest.mark.parametrize(
    "likelihood",
    [Gaussian(), Categorical(), Bernoulli(), Poisson(), Poisson(log_input=False), MeanVariance()],
    ids=["mse", "ce", "bce", "poisson", "poisson of the rate", "mean and variance"],
)
def test_divergence_is_that_of_kullback_and_leibler(likelihood: Likelihood) -> None:
    """From the distribution before to the one after, and not the other way round."""
    f, moved = moved_outputs(0, (4, 2, 3))
    if isinstance(likelihood, MeanVariance) or getattr(likelihood, "log_input", True) is False:
        f, moved = f.exp(), moved.exp()
    expected = torch.distributions.kl_divergence(*(distributions(likelihood, at) for at in (f, moved)))
    assert torch.allclose(likelihood.divergence(f, moved).reshape(expected.shape), expected, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not LogCategorical])
def test_divergence_and_gradient_change_are_the_hessians_for_small_moves(kind: type[Likelihood]) -> None:
    """Half the square in its norm, and its product; of log-probabilities it is the curvature of the logits instead."""
    likelihood, f = kind(), output_for(kind, (3, 2, 2))
    d = 1e-5 * torch.randn(f.shape, generator=torch.Generator().manual_seed(3))
    product = likelihood.hessian_product(f, d)
    assert likelihood.divergence(f, f + d).sum().item() == pytest.approx((d * product).sum().item() / 2, rel=1e-3)
    assert relative_error(likelihood.gradient_change(f, f + d), product) < 1e-3


class Custom(Gaussian):
    """A user's likelihood that tells nothing of larger moves."""

    divergence, gradient_change = Likelihood.divergence, Likelihood.gradient_change

    def hessian_product(self, output: Tensor, vector: Tensor) -> Tensor:
        return 3 * vector


def test_by_default_a_likelihood_is_quadratic() -> None:
    f, moved = torch.zeros(2, 1), torch.tensor([[2.0], [-1.0]])
    assert Custom().divergence(f, moved).tolist() == [[6.0], [1.5]]
    assert Custom().gradient_change(f, moved).tolist() == [[6.0], [-3.0]]


@pytest.mark.parametrize("loss", LOSSES)
def test_terms_add_up_when_a_batch_is_split(loss: str) -> None:
    likelihood = resolve(LOSSES[loss].told).likelihood
    output = logits((7, 3, 2))
    assert sum(likelihood.terms(part) for part in output.split([1, 4, 2])) == likelihood.terms(output)


# What is refused.


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match=r"`reduction` must be one of \('mean', 'sum', 'batchmean'\), not 'avg'"):
        Gaussian(reduction="avg")


@pytest.mark.parametrize(
    ("kind", "output", "text"),
    [
        *[(kind, torch.zeros(4, 3, dtype=torch.long), "needs a floating point output") for kind in KINDS],
        *[(kind, torch.zeros(()), "with the data as its first dimension") for kind in KINDS],
        (Categorical, torch.zeros(4), 'use loss="bce_with_logits"'),
        (Categorical, torch.zeros(4, 1), "at least two classes, not (4, 1)"),
        (LogCategorical, torch.zeros(4, 1), "at least two classes, not (4, 1)"),
        (MeanVariance, torch.zeros(4), "means then variances, not (4,)"),
        (MeanVariance, torch.zeros(4, 3), "pass for instance `output=lambda out: torch.stack(out, dim=1)`"),
    ],
)
def test_outputs_that_cannot_belong_to_the_loss(kind: type[Likelihood], output: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=r"`output=|bce") as raised:
        kind().check(output)
    assert text in str(raised.value)


# What weights the loop multiplies by.


def shares_of(loss: Callable[[Tensor, Tensor], Tensor], weights: Tensor, output: Tensor) -> Tensor | None:
    """As natgrad reads them from the gradient of Σ weight · loss."""
    f = output.clone().requires_grad_()
    torch.sum(weights * loss(f, output.argmax(1).roll(1))).backward()
    assert f.grad is not None
    return Categorical("sum").shares(output, f.grad)


def labelled(f: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(f, y, reduction="none")


@pytest.mark.parametrize("sizes", [(), (3,)])
def test_weights_of_labelled_data_are_read_from_the_gradient(sizes: tuple[int, ...]) -> None:
    """Over their median; zeros stay zeros."""
    output, weights = logits((9, 4, *sizes)), torch.rand(9, *sizes) + 0.1
    weights[0] = 0.0
    found = shares_of(labelled, weights, output)
    assert found is not None
    torch.testing.assert_close(found.squeeze(1), weights / weights[weights > 0].median(), rtol=1e-8, atol=0.0)


def test_labels_that_are_met_have_the_usual_weight() -> None:
    """Their gradient is what rounding leaves; and it hardly counts."""
    output, weights = logits((9, 4)), torch.rand(9) + 0.1
    output[0] = torch.tensor([30.0, 0.0, 0.0, 0.0])
    labels = torch.zeros(9, dtype=torch.long)
    found = shares_of(lambda f, _: labelled(f, labels), weights, output)
    assert found is not None
    assert found[0] == 1.0


def distilled(f: Tensor, y: Tensor) -> Tensor:
    """From a teacher, at a temperature."""
    teacher = torch.randn(f.shape, generator=torch.Generator().manual_seed(1), dtype=f.dtype)
    return nn.functional.kl_div((f / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="none").sum(1)


def smoothed(f: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(f, y, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("loss", [distilled, smoothed])
def test_targets_that_are_no_labels_tell_no_weights(loss: Callable[[Tensor, Tensor], Tensor], classes: int) -> None:
    """Of two classes, every gradient is that of a label with some weight."""
    assert shares_of(loss, torch.rand(9) + 0.1, logits((9, classes))) is None
    assert shares_of(loss, torch.ones(9), logits((9, classes))) is None


def test_of_two_classes_weights_of_the_classes_are_read() -> None:
    weights, labels = torch.tensor([0.5, 2.0]), torch.arange(9) % 2
    found = shares_of(lambda f, _: labelled(f, labels), weights[labels], logits((9, 2)))
    assert found is not None
    torch.testing.assert_close(found.squeeze(1), weights[labels] / 0.5, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0)])
def test_saturated_outputs_may_meet_their_targets(bounds: tuple[float, float]) -> None:
    """Catches them taken for masked, as pixels that are black or white in the target, too; masked ones are not."""
    f = (3 * logits((9, 4))).clamp(*bounds)
    y = f.clone()
    inside = (f > bounds[0]) & (f < bounds[1])
    y[inside] += 0.3
    assert Gaussian().shares(f, f - y) is None
    mask = inside & (torch.rand(9, 4) < 0.5)
    shares = Gaussian().shares(f, torch.where(mask, 0.0, f - y))
    assert torch.equal(shares == 0, mask)


def test_a_rate_and_a_variance_of_zero_have_a_likelihood() -> None:
    """Finite throughout; what is below zero has no logarithm, and is seen to have none."""
    zero = torch.zeros(3, 1)
    poisson, both = Poisson(log_input=False), torch.stack([logits((3, 1)), torch.zeros(3, 1)], 1)
    assert poisson.divergence(zero, zero - 0.2).isnan().all()
    for likelihood, output in ((poisson, zero), (MeanVariance(), both)):
        drawn = likelihood.sample(output, torch.Generator().manual_seed(0))
        for result in (drawn, *likelihood.columns(output), likelihood.divergence(output, output)):
            assert result.isfinite().all()


def test_equal_weights_are_none() -> None:
    assert shares_of(labelled, torch.full((9,), 7.0), logits((9, 4))) is None


def test_a_loss_that_is_none_of_log_probabilities_is_told_of() -> None:
    """Catches a CTC loss of log-probabilities that was declared as NLLLoss: nothing was learnt, without a word."""
    scores = torch.randn(6, 1, 4).log_softmax(2).requires_grad_()
    torch.nn.functional.ctc_loss(scores, torch.tensor([[1, 2]]), torch.tensor([6]), torch.tensor([2])).backward()
    with pytest.warns(RuntimeWarning, match=r'of which no entry is above zero.*a CTC loss as "cross_entropy"'):
        LogCategorical().check_gradient(scores.grad.squeeze(1))
    LogCategorical().check_gradient(-torch.eye(4))


def test_only_gradients_at_labels_of_log_probabilities_are_those_of_nll_loss() -> None:
    output, label = torch.randn(5, 3).log_softmax(1), -torch.eye(3)[torch.tensor([0, 2, 1, 1, 0])]
    assert isinstance(Categorical("sum").as_called(output, label), LogCategorical)
    assert Categorical("sum").as_called(output, label).reduction == "sum"
    for others, gradient in [
        (output + 0.1, label),
        (output, -label),
        (output, label - 0.1),
        (output, 0.0 * label),
        (output, output.softmax(1) + label),
        (output[:0], label[:0]),
    ]:
        assert type(Categorical().as_called(others, gradient)) is Categorical
