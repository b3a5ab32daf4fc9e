"""Torch loss modules with their options: K-FAC's factors against the oracle, which differentiates the module itself."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, gaussian_nll_loss, kl_div, smooth_l1_loss

import natgrad
from cases import TOLERANCE, assert_blocks, dense_block
from linear_cases import stack
from natgrad.likelihoods import MeanVariance
from natgrad.losses import resolve
from oracle import kfac_block, relative_error

pytestmark = pytest.mark.usefixtures("float64")
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])
Rearrange = Callable[[Tensor], Tensor]
LAYERS = ["0", "2"]


def same(output: Tensor) -> Tensor:
    return output


def tokens_flat(output: Tensor) -> Tensor:
    """(N, T, C) → (N·T, C)."""
    return output.flatten(0, 1)


def classes_second(output: Tensor) -> Tensor:
    """(N, T, C) → (N, C, T)."""
    return output.movedim(-1, 1)


def weights(size: int = 4) -> Tensor:
    return torch.linspace(0.3, 2.0, size, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """What a user passes to natgrad and to a training loop.

    Attributes:
        make: The module, given the reduction.
        target: Its other arguments.
        rearrange: What the training loop does to the model's output, (N, 4) or (N, T, 4).
        positions: T.
    """

    make: Callable[..., nn.Module]
    target: Callable[[], tuple[Any, ...]]
    rearrange: Rearrange = same
    positions: int | None = None


def labels(*shape: int, ignored: int | None = None) -> Tensor:
    target = torch.randint(4, shape)
    if ignored is not None:
        target.view(-1)[1::3] = ignored
    return target


def cross(**options: Any) -> Callable[..., nn.Module]:
    return lambda reduction: nn.CrossEntropyLoss(reduction=reduction, **options)


def bernoulli(**options: Any) -> Callable[..., nn.Module]:
    return lambda reduction: nn.BCEWithLogitsLoss(reduction=reduction, **options)


def soft(*shape: int) -> Tensor:
    return torch.softmax(torch.randn(shape), 1)


CASES: dict[str, Case] = {
    "ce": Case(cross(), lambda: (labels(7),)),
    "ce, class weights": Case(cross(weight=weights()), lambda: (labels(7),)),
    "ce, smoothing": Case(cross(label_smoothing=0.3), lambda: (labels(7),)),
    "ce, ignored": Case(cross(), lambda: (labels(7, ignored=-100),)),
    "ce, another ignored": Case(cross(ignore_index=2), lambda: (labels(7, ignored=2),)),
    "ce, all three": Case(
        cross(weight=weights(), label_smoothing=0.3, ignore_index=1), lambda: (labels(7, ignored=1),)
    ),
    "ce, soft targets": Case(cross(), lambda: (soft(7, 4),)),
    "ce, soft targets, weights, smoothing": Case(cross(weight=weights(), label_smoothing=0.1), lambda: (soft(7, 4),)),
    "ce, soft targets, (N, C, T)": Case(cross(weight=weights()), lambda: (soft(3, 4, 5),), classes_second, 5),
    "ce, (N, C, T)": Case(cross(), lambda: (labels(3, 5),), classes_second, 5),
    "ce, (N, C, T), everything": Case(
        cross(weight=weights(), label_smoothing=0.2), lambda: (labels(3, 5, ignored=-100),), classes_second, 5
    ),
    "ce, flattened tokens": Case(cross(), lambda: (labels(15),), tokens_flat, 5),
    "ce, flattened tokens, everything": Case(
        cross(weight=weights(), label_smoothing=0.2), lambda: (labels(15, ignored=-100),), tokens_flat, 5
    ),
    "bce": Case(bernoulli(), lambda: (torch.rand(7, 4).round(),)),
    "bce, soft targets": Case(bernoulli(), lambda: (torch.rand(7, 4),)),
    "bce, pos_weight": Case(bernoulli(pos_weight=weights()), lambda: (torch.rand(7, 4).round(),)),
    "bce, weight": Case(bernoulli(weight=weights(7).unsqueeze(1)), lambda: (torch.rand(7, 4).round(),)),
    "bce, both": Case(bernoulli(weight=weights(), pos_weight=weights() * 2), lambda: (torch.rand(7, 4),)),
    "mse": Case(lambda reduction: nn.MSELoss(reduction=reduction), lambda: (torch.randn(7, 4),)),
    "mse, positions": Case(lambda reduction: nn.MSELoss(reduction=reduction), lambda: (torch.randn(3, 5, 4),), same, 5),
    "huber, small errors": Case(
        lambda reduction: nn.HuberLoss(reduction=reduction, delta=30.0), lambda: (torch.randn(7, 4),)
    ),
    "smooth l1, small errors": Case(
        lambda reduction: nn.SmoothL1Loss(reduction=reduction, beta=30.0), lambda: (torch.randn(7, 4),)
    ),
    "poisson, logarithm": Case(
        lambda reduction: nn.PoissonNLLLoss(reduction=reduction), lambda: (torch.randint(5, (7, 4)).double(),)
    ),
    "gaussian, variances": Case(
        lambda reduction: nn.GaussianNLLLoss(reduction=reduction), lambda: (torch.randn(7, 4), torch.rand(7, 4) + 0.1)
    ),
    "gaussian, a variance a datum": Case(
        lambda reduction: nn.GaussianNLLLoss(reduction=reduction), lambda: (torch.randn(7, 4), torch.rand(7, 1) + 0.1)
    ),
    "gaussian, variance below eps": Case(
        lambda reduction: nn.GaussianNLLLoss(reduction=reduction, eps=0.3),
        lambda: (torch.randn(7, 4), torch.rand(7, 4)),
    ),
}


def network(positions: int | None, count: int) -> tuple[nn.Module, Tensor]:
    shape = (count,) if positions is None else (count, positions)
    return stack([3, 5, 4]), torch.randn(*shape, 3)


def blocks_of(model: nn.Module, told: Any, closure: Callable[[nn.Module], Tensor], **options: Any) -> dict[str, Tensor]:
    """After one step; ``closure`` computes the loss of the model that it is given."""
    model = copy.deepcopy(model)
    preconditioner = natgrad.Preconditioner(
        model, told, **{"fisher": "exact", "damping": 1e-3, "factor_decay": 0.0, "batch_fraction": 1.0} | options
    )
    closure(model).backward()
    preconditioner.step()
    return {name: dense_block(A, G) for name, (A, G) in preconditioner.factors().items()}


@every_reduction
@pytest.mark.parametrize("name", CASES)
def test_modules_equal_the_oracle(name: str, reduction: str) -> None:
    """A weight that is forgotten, squared or normalized away, an ignored target that counts, a layout misread."""
    torch.manual_seed(0)
    case = CASES[name]
    criterion, target = case.make(reduction), case.target()
    model, x = network(case.positions, 7 if case.positions is None else 3)
    told = copy.deepcopy(criterion)
    expected = {
        n: kfac_block(model, n, x, target[0], lambda output, _: criterion(case.rearrange(output), *target))
        for n in LAYERS
    }
    assert_blocks(blocks_of(model, told, lambda m: told(case.rearrange(m(x)), *target)), expected)


@every_reduction
@pytest.mark.parametrize("options", [{}, {"weight": weights()}, {"ignore_index": 2}], ids=["", "weight", "ignore"])
def test_nll_after_log_softmax_is_cross_entropy(options: dict[str, Any], reduction: str) -> None:
    """The Fisher of log-probabilities is that of the logits before."""
    torch.manual_seed(0)
    (model, x), y = network(None, 7), labels(7, ignored=2)
    told = nn.NLLLoss(reduction=reduction, **options)
    plain = nn.CrossEntropyLoss(reduction=reduction, **options)
    expected = {n: kfac_block(model, n, x, y, plain) for n in LAYERS}
    assert_blocks(blocks_of(nn.Sequential(*model, nn.LogSoftmax(1)), told, lambda m: told(m(x), y)), expected)


@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
@pytest.mark.parametrize("log_target", [True, False])
def test_divergence_after_log_softmax_is_cross_entropy_with_soft_targets(log_target: bool, reduction: str) -> None:
    torch.manual_seed(0)
    (model, x), q = network(None, 7), soft(7, 4)
    divided = {"sum": 1, "batchmean": 7}[reduction]
    told = nn.KLDivLoss(reduction=reduction, log_target=log_target)
    expected = {
        n: kfac_block(model, n, x, q, lambda f, q: cross_entropy(f, q, reduction="sum") / divided) for n in LAYERS
    }
    target = q.log() if log_target else q
    assert_blocks(blocks_of(nn.Sequential(*model, nn.LogSoftmax(1)), told, lambda m: told(m(x), target)), expected)


ROBUST = [nn.HuberLoss(delta=0.4), nn.SmoothL1Loss(beta=0.3), nn.L1Loss(), nn.SmoothL1Loss(beta=0.0)]


@pytest.mark.parametrize("module", ROBUST, ids=str)
def test_the_parabola_of_a_robust_loss_touches_it_from_above(module: nn.Module) -> None:
    """At the error and, as both are even, at its opposite; nowhere does it lie below."""
    loss = resolve(copy.deepcopy(module))
    assert loss.weigh is not None
    errors = torch.cat([torch.linspace(-3, -0.5, 30), torch.linspace(0.5, 3, 30)])  # beyond any kink
    curvature, terms = loss.weigh(module, errors, (torch.zeros_like(errors),))
    assert terms.sum() == len(errors)
    each = copy.deepcopy(module)
    each.reduction = "none"

    def value(error: Tensor) -> Tensor:
        return each(error, torch.zeros_like(error))

    slope = torch.func.grad(lambda error: value(error).sum())(errors)
    for moved in (-errors, *torch.linspace(-4, 4, 41).unsqueeze(1)):
        parabola = value(errors) + slope * (moved - errors) + curvature * (moved - errors) ** 2 / 2
        assert (parabola >= value(moved.expand_as(errors)) - 1e-12).all()
    assert torch.allclose(value(errors) - 2 * slope * errors + 2 * curvature * errors**2, value(-errors))


def test_the_curvature_of_an_absolute_error_is_bounded() -> None:
    """By that at a tenth of the mean error."""
    loss = resolve(module := nn.L1Loss())
    assert loss.weigh is not None
    curvature, _ = loss.weigh(module, torch.tensor([0.0, 0.05, -1.0, 2.95]), (torch.zeros(4),))
    assert curvature.tolist() == pytest.approx([10, 10, 1, 1 / 2.95])
    assert loss.weigh(module, torch.zeros(4), (torch.zeros(4),)).curvature.isfinite().all()


@pytest.mark.parametrize("module", ROBUST, ids=str)
def test_robust_losses_train_where_some_targets_are_far_off(module: nn.Module) -> None:
    """The parabola's curvature is bounded where an error is zero, and outliers do not count by their square."""
    torch.manual_seed(0)
    model, x = network(None, 200)
    y = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2], x[:, 0], torch.zeros(200)], 1)
    far = y.clone()
    far[::10] += 50
    optimizer = natgrad.KFAC(model, loss=module)
    for _ in range(40):
        optimizer.zero_grad()
        module(model(x), far).backward()
        optimizer.step()
    kept = torch.arange(200) % 10 > 0
    assert (model(x) - y)[kept].abs().mean() < 0.2


def test_what_is_no_logarithm_of_probabilities_is_refused() -> None:
    (model, x), told = network(None, 7), nn.KLDivLoss(reduction="batchmean")
    with pytest.raises(
        ValueError, match=r"needs logarithms of probabilities.*of shape \(7, 4\) whose probabilities do"
    ):
        blocks_of(model, told, lambda m: told(m(x), soft(7, 4)))


@every_reduction
def test_poisson_of_the_rate_itself(reduction: str) -> None:
    """Its Hessian depends on the counts; the Fisher is its mean over them, 1 / rate, as for counts equal to rates."""
    torch.manual_seed(0)
    model = nn.Sequential(*stack([3, 5, 4]), nn.Softplus())
    x = torch.randn(7, 3)
    rate = model(x).detach()
    told, plain = (nn.PoissonNLLLoss(log_input=False, eps=0.0, reduction=reduction) for _ in range(2))
    expected = {n: kfac_block(model, n, x, rate, plain) for n in LAYERS}
    counts = torch.poisson(rate)
    assert_blocks(blocks_of(model, told, lambda m: told(m(x), counts)), expected)
    # Its gradient 1 − y / rate grows as small rates are learnt; that of the logarithm, rate − y, is a residual.
    assert not resolve(told).likelihood.of_residuals
    assert resolve(nn.PoissonNLLLoss()).likelihood.of_residuals


@every_reduction
def test_mean_and_variance_of_the_model(reduction: str) -> None:
    """The Fisher is the Hessian's mean over targets: at m ± √v the two Hessians have that mean."""
    torch.manual_seed(0)
    model = nn.Sequential(*stack([3, 5, 6]), nn.Softplus(), nn.Unflatten(1, (2, 3)))
    x = torch.randn(7, 3)
    out = model(x).detach()
    spread = out[:, 1].sqrt()

    def two_targets(output: Tensor, _: Tensor) -> Tensor:
        m, v = output.unbind(1)
        return sum(gaussian_nll_loss(m, out[:, 0] + sign * spread, v, reduction=reduction) / 2 for sign in (-1, 1))

    expected = {n: kfac_block(model, n, x, x, two_targets) for n in LAYERS}
    y = torch.randn(7, 3)

    def loss(m: nn.Module) -> Tensor:
        mean, variance = m(x).unbind(1)
        return gaussian_nll_loss(mean, y, variance, reduction=reduction)

    assert_blocks(blocks_of(model, MeanVariance(reduction=reduction), loss), expected)


# How the module is called.


def test_tokens_that_interact_and_are_flattened_for_the_loss() -> None:
    """Vectors of two positions of one datum, switched on together, would mix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 15), nn.Unflatten(1, (5, 3)))
    x, y = torch.randn(4, 5, 3), torch.randint(3, (20,))
    expected = {n: kfac_block(model, n, x, y, lambda o, y: cross_entropy(o.flatten(0, 1), y)) for n in ["0", "3"]}
    told = nn.CrossEntropyLoss()
    assert_blocks(blocks_of(model, told, lambda m: told(m(x).flatten(0, 1), y)), expected)


@pytest.mark.parametrize("ignored", [None, -100])
def test_the_function_in_place_of_a_module_without_options(ignored: int | None) -> None:
    """Ignored targets are those whose gradient is zero."""
    torch.manual_seed(0)
    (model, x), y = network(None, 7), labels(7, ignored=ignored)
    expected = {n: kfac_block(model, n, x, y, cross_entropy) for n in LAYERS}
    assert_blocks(blocks_of(model, nn.CrossEntropyLoss(), lambda m: cross_entropy(m(x), y)), expected)


def test_keywords_are_understood() -> None:
    torch.manual_seed(0)
    (model, x), y = network(None, 7), labels(7)
    told, plain = nn.CrossEntropyLoss(weight=weights()), nn.CrossEntropyLoss(weight=weights())
    expected = {n: kfac_block(model, n, x, y, plain) for n in LAYERS}
    assert_blocks(blocks_of(model, told, lambda m: told(input=m(x), target=y)), expected)


@pytest.mark.parametrize(
    "told",
    [cross(weight=weights())("mean"), bernoulli(pos_weight=weights())("mean")],
    ids=str,
)
def test_a_module_with_options_must_be_called(told: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = network(None, 7)
    with pytest.raises(RuntimeError, match="was not called with the model's output: call that very module"):
        blocks_of(model, told, lambda m: m(x).square().mean())


def test_evaluation_in_between_does_no_harm() -> None:
    """Neither without gradients on other data, nor the loss of a detached output."""
    torch.manual_seed(0)
    (model, x), y = network(None, 7), labels(7)
    told, plain = nn.CrossEntropyLoss(weight=weights()), nn.CrossEntropyLoss(weight=weights())
    expected = {n: kfac_block(model, n, x, y, plain) for n in LAYERS}

    def closure(m: nn.Module) -> Tensor:
        def evaluate() -> None:
            with torch.no_grad():
                told(m(torch.randn(9, 3)), labels(9))

        evaluate()
        output = m(x)
        told(output.detach(), y)
        evaluate()
        loss = told(output, y)
        evaluate()
        return loss

    assert_blocks(blocks_of(model, told, closure), expected)


def test_micro_batches_with_unlike_weights_give_the_whole_batch() -> None:
    """The divisor of the mean, Σ w_y, adds up."""
    torch.manual_seed(0)
    (model, x), y = network(None, 7), labels(7, ignored=-100)
    told, plain = nn.CrossEntropyLoss(weight=weights()), nn.CrossEntropyLoss(weight=weights())
    expected = {n: kfac_block(model, n, x, y, plain) for n in LAYERS}

    def divisor(y: Tensor) -> Tensor:
        return weights()[y[y != -100]].sum()

    def closure(m: nn.Module) -> Tensor:
        parts = zip(x.split([2, 5]), y.split([2, 5]), strict=True)
        return sum(told(m(a), b) * divisor(b) / divisor(y) for a, b in parts)

    assert_blocks(blocks_of(model, told, closure), expected)


@pytest.mark.parametrize("name", ["ce, all three", "bce, both", "gaussian, variances"])
def test_monte_carlo_has_the_weights_too(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    told, target, (model, x) = case.make("mean"), case.target(), network(None, 7)
    exact = blocks_of(model, told, lambda m: told(m(x), *target))["2"]
    sampled = blocks_of(model, told, lambda m: told(m(x), *target), fisher="mc", mc_samples=2000)["2"]
    assert relative_error(sampled, exact) < 0.06
    assert relative_error(sampled, exact) > TOLERANCE


# Bad input.


@pytest.mark.parametrize(
    ("told", "error", "text"),
    [
        (nn.CrossEntropyLoss(reduction="none"), ValueError, "reduce with 'mean' or 'sum'"),
        (nn.KLDivLoss(), ValueError, "reduce with 'batchmean'"),
        (nn.SoftMarginLoss(), ValueError, "natgrad knows MSELoss, Cross.*pass a `natgrad.likelihoods.Likelihood`"),
        (nn.BCELoss(), ValueError, "that returns probabilities return the logits, for BCEWithLogitsLoss. For another"),
        ("hinge", ValueError, "is not known: use one of 'mse', 'cross_entropy', 'bce_with_logits', or"),
        (smooth_l1_loss, TypeError, "pass an instance of `nn.SmoothL1Loss`, and call that in the loop"),
        (kl_div, TypeError, "pass an instance of `nn.KLDivLoss`"),
        (cross_entropy, TypeError, 'does not compute it: pass `"cross_entropy"`'),
        (nn.MSELoss, TypeError, r"does not compute it: pass an instance, `MSELoss\(\)`"),
        (torch.sigmoid, TypeError, "must be a name, a torch loss module or a"),
    ],
    ids=lambda told: getattr(told, "__name__", str(told)) if callable(told) or isinstance(told, str) else None,
)
def test_losses_that_are_refused(told: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        natgrad.Preconditioner(stack([3, 4]), told)


def test_a_variance_that_the_model_learns_is_refused() -> None:
    model, told = stack([3, 4]), nn.GaussianNLLLoss()
    _kept = natgrad.Preconditioner(model, told)
    mean, log_variance = model(torch.randn(5, 3)).chunk(2, 1)
    with pytest.raises(ValueError, match=r"variance that the model learns.*MeanVariance"):
        told(mean, torch.randn(5, 2), log_variance.exp())


def test_logits_of_a_wrong_shape_are_refused() -> None:
    model, told = stack([3, 1]), nn.CrossEntropyLoss()
    _kept = natgrad.Preconditioner(model, told)
    with pytest.raises(ValueError, match="at least two classes"):
        told(model(torch.randn(5, 3)), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"needs an output of shape \(N, 2, …\)"):
        blocks_of(stack([3, 4]), MeanVariance(), lambda m: m(torch.randn(5, 3)).sum())


def test_classes_in_another_dimension_than_the_loss_has_them_are_refused() -> None:
    """As after `cross_entropy(logits.flatten(0, 1), labels.flatten())`; the message's way out trains."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(9, (6, 5)), torch.randint(4, (6, 5))

    def step(**options: Any) -> float:
        model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))
        optimizer = natgrad.KFAC(model, "cross_entropy", **options)
        for _ in range(20):
            optimizer.zero_grad()
            loss = cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
            loss.backward()
            optimizer.step()
        return loss.item()

    with pytest.raises(ValueError, match=r"has them in dimension 2.*`output=lambda out: out.movedim\(2, 1\)`"):
        step()
    assert step(output=lambda out: out.movedim(2, 1)) < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3), (7, 50, 4), (2, 3, 4, 5)])
def test_gradients_of_a_cross_entropy_are_known_as_such(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Catches a refusal that rounding brings about; or half of the batch ignored."""
    logits = torch.randn(shape, dtype=dtype).requires_grad_()
    labels = torch.randint(shape[1], shape[:1] + shape[2:])
    labels[: shape[0] // 2] = -100
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels), logits)
    natgrad.likelihoods.Categorical().check_gradient(gradient.float())
    natgrad.likelihoods.Categorical().check_gradient(torch.zeros(shape))


def test_a_loss_module_may_be_called_with_its_arguments_in_any_order() -> None:
    """Catches a target that is taken for the variance."""
    factors = []
    for by_name in (False, True):
        torch.manual_seed(0)
        model, told = nn.Linear(3, 2), nn.GaussianNLLLoss()
        preconditioner = natgrad.Preconditioner(model, told, fisher="exact", damping=0.1)
        x, y, variance = torch.randn(8, 3), torch.randn(8, 2), torch.rand(8, 2) + 0.1
        f = model(x)
        (told(var=variance, target=y, input=f) if by_name else told(f, y, variance)).backward()
        preconditioner.update()
        factors.append(preconditioner.factors()[""][1])
    assert torch.equal(*factors)


@pytest.mark.parametrize("called", [functional.mse_loss, functional.binary_cross_entropy_with_logits])
def test_another_loss_than_cross_entropy_is_told_of(called: Any) -> None:
    model, x = nn.Linear(3, 4), torch.randn(16, 3)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    called(model(x), torch.ones(16, 4)).backward()
    with pytest.warns(RuntimeWarning, match=r"the gradient that arrived at the output is not that of Categorical"):
        optimizer.step()


def test_an_empty_first_batch_is_no_other_loss() -> None:
    model = nn.Linear(3, 4)
    optimizer = natgrad.KFAC(model, "cross_entropy")
    functional.cross_entropy(model(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.long), reduction="sum").backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
