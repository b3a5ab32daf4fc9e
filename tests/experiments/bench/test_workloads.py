"""Every workload at a tiny size: it trains, it repeats itself, and its loss is what it says."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from natgrad.experiments import autoencoder
from natgrad.experiments.bench import workloads
from natgrad.experiments.bench.contestants import CONTESTANTS
from natgrad.experiments.bench.trial import Trial
from natgrad.experiments.bench.workload import Workload, epochs
from natgrad.experiments.bench.workloads import autoencoders, classifiers, language, physics, regression
from natgrad.experiments.settings import Settings, SettingsError

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
SMALL = {"width_divisor": 32, "images": 40}
TINY: dict[str, Callable[[], Workload]] = {
    "article": partial(autoencoders.article, "article", 1, Settings(**SMALL)),
    "article, weight norm": partial(
        autoencoders.article, "wn", 1, Settings(**SMALL, nonlinearity="relu", weight_norm=True, batch_size=10)
    ),
    "classical": partial(autoencoders.classical, "classical", 1, images=40, widths=(784, 12, 8, 3)),
    "mlp": partial(classifiers.mlp, "mlp", 1, widths=(8, 8), images=600),
    "convnet": partial(classifiers.convnet, "convnet", 1, channels=(2, 3, 4), images=500),
    "gpt": partial(language.gpt, "gpt", 1, text=TEXT, width=8, blocks=1),
    "poisson": partial(physics.poisson, "poisson", 1, width=6, depth=2, batch=20),
    "linear": partial(regression.linear, "linear", 1, dimension=6, depth=3, batch=30),
}


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest) -> Workload:
    return TINY[request.param]()


@pytest.mark.parametrize("name", ["adamw", "kfac"])
def test_every_workload_trains(tiny: Workload, name: str) -> None:
    trial = Trial(CONTESTANTS[name], {}, tiny, seed=1, seconds=1e-9)
    before = [p.detach().clone() for p in trial.model.parameters()]
    trial.advance()
    trial.step()
    outcome = trial.outcome
    assert not outcome.failure
    assert outcome.steps == [0, 1]
    assert all(None not in values and len(values) == 2 for values in outcome.values.values())
    assert trial.model.training
    assert not any(torch.equal(p, q) for p, q in zip(trial.model.parameters(), before, strict=True))


def test_the_loss_that_natgrad_is_told_is_the_one_that_is_trained_on(tiny: Workload) -> None:
    """Else its curvature would have another scale than the gradient: g · Δ must be the loss's own second order."""
    likelihood = natgrad.losses.resolve(tiny.natgrad_loss).likelihood
    x, y = next(tiny.batches(1))
    with torch.no_grad():
        output = tiny.model(1)(x).double()
    y = y.double() if y.is_floating_point() else y
    output.requires_grad_()
    vector = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).double()
    _, product = torch.autograd.functional.hvp(lambda f: tiny.loss(f, y), output, vector)
    ours = likelihood.scale(likelihood.terms(output)) * likelihood.hessian_product(output.detach(), vector)
    assert torch.allclose(product, ours, rtol=1e-9, atol=1e-12)


def test_a_seed_fixes_model_and_batches(tiny: Workload) -> None:
    before = torch.random.get_rng_state()
    models = [list(tiny.model(seed).parameters()) for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(models[0], models[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(models[0], models[2], strict=True))
    batches = [list(itertools.islice(tiny.batches(seed), 3)) for seed in (1, 1, 2)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches[0], batches[1], strict=True))
    if not torch.equal(batches[0][0][0], batches[0][1][0]):  # minibatches
        assert not torch.equal(batches[0][0][0], batches[2][0][0])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", [name for name in workloads.WORKLOADS if name not in ("gpt", "classical-60k")])
def test_names_are_those_of_the_registry(name: str) -> None:
    assert workloads.find(name)().name == name


def test_an_unknown_workload_names_the_choices() -> None:
    with pytest.raises(SettingsError, match="unknown workload 'cifar': choose from autoencoder, "):
        workloads.find("cifar")


def test_epochs_see_every_datum_once() -> None:
    x = torch.arange(10)
    stream = epochs(x, 2 * x, 3, seed=0)
    first, second = ([next(stream) for _ in range(3)] for _ in range(2))
    for epoch in (first, second):
        seen = torch.cat([a for a, _ in epoch])
        assert len(seen.unique()) == 9
        assert all(torch.equal(b, 2 * a) for a, b in epoch)
    assert not torch.equal(first[0][0], second[0][0])


def test_the_article_starts_where_it_started() -> None:
    workload = autoencoders.article("a", 1, Settings(images=40))
    model = workload.model(1)
    x, y = next(workload.batches(1))
    assert torch.equal(model[0].weight, autoencoder.network(Settings(images=40, seed=1))[0].weight)
    assert workload.loss(model(x), y).item() == pytest.approx(97.5, abs=5)


def test_the_classical_network() -> None:
    model = autoencoders.classical("c", 1, images=1).model(1)
    widths = [m.weight.shape[0] for m in model if isinstance(m, nn.Linear)]
    assert widths == [1000, 500, 250, 30, 250, 500, 1000, 784]
    kinds = [type(m).__name__ for m in model]
    assert kinds == ["Linear", "Tanh"] * 3 + ["Linear"] + ["Linear", "Tanh"] * 3 + ["Linear"]


def test_squared_error_is_summed_over_pixels() -> None:
    logits, target = torch.zeros(2, 4), torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]])
    assert autoencoders.squared_error(logits, target).item() == pytest.approx((4 * 0.25 + 0) / 2)


def test_a_window_of_text_predicts_its_next_character() -> None:
    workload = TINY["gpt"]()
    x, y = next(workload.batches(1))
    assert x.shape == y.shape == (32, 64)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert workload.model(1)(x).shape == (32, len(set(TEXT)), 64)


def test_the_gpt_does_not_see_the_future() -> None:
    model = TINY["gpt"]().model(1)
    x = torch.randint(20, (1, 64), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 40] = (x[0, 40] + 1) % 20
    before, after = model(x), model(changed)
    assert torch.allclose(before[..., :40], after[..., :40], atol=1e-6)
    assert not torch.allclose(before[..., 40], after[..., 40], atol=1e-6)


@pytest.mark.parametrize("seed", [1, 2])
def test_residuals_of_poisson_are_those_of_automatic_differentiation(seed: int) -> None:
    model = physics.Poisson(5, 3).double()
    points = torch.rand(7, 4, generator=torch.Generator().manual_seed(seed)).double()

    def outputs(point: torch.Tensor) -> torch.Tensor:
        return model.values(point[None])[0]

    expected = []
    for inside, boundary in zip(points[:, :2], points[:, 2:], strict=True):
        (_, q1, q2), jacobian = outputs(inside), torch.func.jacrev(outputs)(inside)
        expected.append(
            torch.stack(
                [
                    q1 - jacobian[0, 0],
                    q2 - jacobian[0, 1],
                    jacobian[1, 0] + jacobian[2, 1] + 2 * torch.pi**2 * torch.sin(torch.pi * inside).prod(),
                    physics.BOUNDARY_WEIGHT * outputs(boundary)[0],
                ]
            )
        )
    assert torch.allclose(model(points), torch.stack(expected))


def test_the_source_belongs_to_the_solution() -> None:
    point = torch.tensor([0.3, 0.7]).double()
    hessian = torch.func.hessian(lambda p: physics.solution(p[None])[0])(point)
    assert -hessian.trace() == pytest.approx(physics.source(point[None]).item())
    edge = torch.tensor([[0.0, 0.4], [1.0, 0.4], [0.4, 0.0], [0.4, 1.0]])
    assert physics.solution(edge).abs().max() < 1e-6


def test_points_lie_where_they_should() -> None:
    inside, boundary = next(physics.poisson("p", 1, batch=2_000).batches(1))[0].split(2, dim=1)
    assert inside.min() > 0
    assert inside.max() < 1
    on_side = torch.stack([boundary[:, 0] == 0, boundary[:, 0] == 1, boundary[:, 1] == 0, boundary[:, 1] == 1])
    assert on_side.any(dim=0).all()
    assert on_side.double().mean(dim=1).min() > 0.2


def test_kfac_sees_values_and_tangents_of_poisson() -> None:
    """A of the second layer is the second moment of [h 1], [∂h 0] over values and both tangents, by autodiff."""
    torch.manual_seed(0)
    model = physics.Poisson(4, 2).double()
    points = torch.rand(6, 4).double()
    optimizer = natgrad.KFAC(model, loss="mse", batch_fraction=1.0)
    weight = model.layers[0].weight.detach().clone()
    functional.mse_loss(model(points), torch.zeros(6, 4).double()).backward()
    optimizer.step()
    A = optimizer.preconditioner.factors()["layers.1"][0]

    def hidden(point: torch.Tensor) -> torch.Tensor:
        return torch.tanh(weight @ torch.cat([point, point.new_ones(1)]))

    rows = []
    for inside, boundary in zip(points[:, :2], points[:, 2:], strict=True):
        tangents = torch.func.jacrev(hidden)(inside).T
        one, none = inside.new_ones(1), inside.new_zeros(1)
        rows += [torch.cat([hidden(inside), one]), torch.cat([hidden(boundary), one])]
        rows += [torch.cat([tangent, none]) for tangent in tangents]
    expected = torch.stack(rows).T @ torch.stack(rows)
    assert torch.allclose(A / A.trace(), (expected / expected.trace()).to(A), rtol=1e-5, atol=1e-8)


def test_the_answer_of_linear_regression_is_known() -> None:
    workload = regression.linear("l", 1, dimension=8, depth=1, condition=100)
    model = workload.model(1).double()
    mixing = regression.mixing_matrix(8, 100).double()
    singular = torch.linalg.svdvals(mixing)
    assert singular[[0, -1]].tolist() == pytest.approx([1, 0.01], rel=1e-3)
    x, y = next(workload.batches(1))
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.inv(mixing))
    assert workload.loss(model(x.double()), y.double()).item() < 1e-9


def test_the_loss_of_linear_regression_is_that_of_the_distribution() -> None:
    workload = regression.linear("l", 1, dimension=8, depth=3, batch=200_000)
    model = workload.model(1)
    x, y = next(workload.batches(1))
    sampled = workload.loss(model(x), y).item()
    assert workload.evaluate(model)["loss"] == pytest.approx(sampled, rel=0.02)
