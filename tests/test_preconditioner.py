"""The preconditioner around the mathematics: refusals, skipped steps, periods, clipping, state."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import natgrad
from linear_cases import stack
from natgrad import preconditioner as module
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
LOSSES = {"mse": mse_loss, "cross_entropy": cross_entropy, "bce_with_logits": binary_cross_entropy_with_logits}
every_inverse = pytest.mark.parametrize("inverse", ["cholesky", "eigen", "ekfac"])
every_fisher = pytest.mark.parametrize("fisher", ["mc", "exact", "empirical", "forward"])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return stack([3, 4, 2])


def batch(seed: int, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.rand(n, 2, generator=generator)


class Training:
    """A model, its preconditioner and SGD, taken through one batch at a time."""

    def __init__(self, loss: str = "mse", **options: Any) -> None:
        self.model, self.loss_fn = network(), LOSSES[loss]
        self.preconditioner = natgrad.Preconditioner(self.model, loss, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def backward(self, seed: int) -> None:
        x, y = batch(seed)
        self.optimizer.zero_grad()
        self.loss_fn(self.model(x), y).backward()

    def step(self, seed: int) -> bool:
        self.backward(seed)
        return self.finish()

    def finish(self) -> bool:
        taken = self.preconditioner.step()
        self.optimizer.step()
        return taken

    def values(self) -> dict[str, Tensor]:
        """Everything that a step may change, copied."""
        state = {f"{n}.{k}": t for n, s in self.preconditioner.states().items() for k, t in s.items()}
        return {n: t.detach().clone() for n, t in {**self.model.state_dict(), **state}.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [n for n in expected if not torch.equal(actual[n], expected[n])] == []


# What is refused.


def test_step_before_backward() -> None:
    training = Training()
    training.model(batch(0)[0])
    with pytest.raises(RuntimeError, match=r"`step\(\)` found no gradient: call `loss.backward\(\)` before it"):
        training.preconditioner.step()


def test_a_layer_with_a_gradient_that_was_never_seen_is_named() -> None:
    """Calling the parts instead of the model, the hooks on the model never ran."""
    training = Training()
    training.model[2](training.model[0](batch(0)[0])).sum().backward()
    with pytest.raises(RuntimeError, match="layer '0' has a gradient but natgrad saw no data pass through it"):
        training.preconditioner.step()


# Steps that are skipped.


def spoil_gradient(training: Training) -> None:
    training.backward(99)
    training.model[2].weight.grad[0, 1] = torch.inf


def spoil_input(training: Training) -> None:
    x, y = batch(99)
    x[2, 1] = torch.nan
    training.optimizer.zero_grad()
    training.loss_fn(training.model(x), y).backward()


@pytest.mark.parametrize("spoil", [spoil_gradient, spoil_input])
@every_fisher
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_that_is_not_finite_might_never_have_been(
    spoil: Callable[[Training], None], fisher: str, loss: str
) -> None:
    """Catches infinity in a running average, where it would stay, and draws that count the skipped step."""
    plain, spoilt = (
        Training(loss, fisher=fisher, factor_decay=0.9, curvature_period=2, inverse_period=3) for _ in range(2)
    )
    for seed in range(4):
        before = spoilt.values()
        spoil(spoilt)
        assert not spoilt.finish()
        assert all(p.grad is None for p in spoilt.model.parameters())
        assert_same(spoilt.values(), before)
        assert plain.step(seed)
        assert spoilt.step(seed)
        assert_same(spoilt.values(), plain.values())
    assert spoilt.preconditioner.diagnostics()["skipped_steps"] == 4
    assert plain.preconditioner.diagnostics()["skipped_steps"] == 0
    assert spoilt.preconditioner.steps == 4


def test_statistics_that_overflow_skip_the_step() -> None:
    """The gradient alone would not tell: here it is 10⁻¹⁰⁰."""
    training = Training()
    (training.model(1e200 * batch(0)[0]).sum() * 1e-300).backward()
    assert all(p.grad.isfinite().all() for p in training.model.parameters())
    assert not training.finish()
    assert training.preconditioner.factors() == {}


def test_zero_gradients_without_a_forward_pass_are_no_step() -> None:
    """Else the period would start without factors, and the first step would find none."""
    training = Training(curvature_period=5)
    before = training.values()
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.finish()
    assert_same(training.values(), before)
    assert training.preconditioner.diagnostics()["skipped_steps"] == 0
    assert training.step(0)


@pytest.mark.parametrize("spoilt", [False, True])
def test_sparse_gradients_of_others_are_looked_at_too(spoilt: bool) -> None:
    """An embedding that makes them has no block; torch cannot take their extremes."""
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    preconditioner = natgrad.Preconditioner(model, "mse")
    mse_loss(model(torch.arange(8).reshape(4, 2)), torch.randn(4, 2)).backward()
    gradient = model[0].weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    if spoilt:
        model[0].weight.grad = gradient * torch.nan
    assert preconditioner.step() is not spoilt


# Layers that take no part.


class TwoHeads(nn.Module):
    """One head at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, side: str) -> Tensor:
        return getattr(self, side)(torch.tanh(self.body(x)))


@every_inverse
def test_an_unused_layer_is_left_alone(inverse: str) -> None:
    model = TwoHeads()
    preconditioner = natgrad.Preconditioner(model, "mse", inverse=inverse)
    for step, side in enumerate(["left", "right", "left"]):
        x, y = batch(step)
        model.zero_grad()
        mse_loss(model(x, side), y).backward()
        other = model.right if side == "left" else model.left
        before = {k: t.clone() for k, t in preconditioner.state[other.weight].items() if k != "step"}
        if step == 0:
            with pytest.warns(UserWarning, match="layer 'right' received no data and no gradient"):
                preconditioner.step()
        else:
            preconditioner.step()
        assert other.weight.grad is None
        assert other.bias.grad is None
        assert_same({k: t for k, t in preconditioner.state[other.weight].items() if k != "step"}, before)
    assert preconditioner.factors().keys() == {"body", "left", "right"}


def test_a_layer_first_used_between_two_updates_waits_for_the_next() -> None:
    """Nothing was captured then, of any layer: its gradient stays as it is, and no hook was missed."""
    model = TwoHeads()
    preconditioner = natgrad.Preconditioner(model, "mse", curvature_period=2)
    sides, known = ["left", "right", "right"], []
    for step, side in enumerate(sides):
        x, y = batch(step)
        model.zero_grad()
        mse_loss(model(x, side), y).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if step == 0:
            with pytest.warns(UserWarning, match="layer 'right' received no data and no gradient"):
                preconditioner.step()
        else:
            assert preconditioner.step()
        known.append(set(preconditioner.factors()))
        for name, gradient in gradients.items():
            waits = name.startswith("right") and step == 1
            assert torch.equal(model.get_parameter(name).grad, gradient) == waits
    assert known == [{"body", "left"}, {"body", "left"}, {"body", "left", "right"}]
    assert preconditioner.diagnostics()["skipped_steps"] == 0


def test_a_layer_that_is_missed_at_an_update_is_named_at_any_step() -> None:
    """Here others were captured, so that the hooks did watch."""
    model = TwoHeads()
    preconditioner = natgrad.Preconditioner(model, "mse")
    x, y = batch(0)
    mse_loss(model(x, "left"), y).backward()
    with pytest.warns(UserWarning, match="layer 'right' received no data and no gradient"):
        preconditioner.step()
    (mse_loss(model(x, "left"), y) + model.right(torch.zeros(1, 4)).sum()).backward()
    with pytest.raises(RuntimeError, match="layer 'right' has a gradient but natgrad saw no data pass through it"):
        preconditioner.step()


def test_a_wrapped_model_has_the_names_of_its_own() -> None:
    model = network()
    wrapped = nn.DataParallel(model)
    preconditioner = natgrad.Preconditioner(wrapped, "mse")
    wrapped(batch(0)[0]).sum().backward()
    preconditioner.step()
    assert preconditioner.factors().keys() == {"0", "2"}


# Periods.


@every_inverse
def test_periods_skip_the_work_and_keep_its_results(inverse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors at steps 0, 2, 4, 6, inverses at 0, 3, 6: what changes in between, and how often work is done."""
    drawn: list[int] = []
    sample = natgrad.likelihoods.Gaussian.sample
    monkeypatch.setattr(natgrad.likelihoods.Gaussian, "sample", lambda *args: drawn.append(1) or sample(*args))
    training = Training(curvature_period=2, inverse_period=3, inverse=inverse, factor_decay=0.5)
    moments = {"spectrum", "spectrum_age"}  # of EKFAC: they move with every update of the factors
    names = set(module.INVERSES[inverse].names) - moments
    for step in range(7):
        before, already = training.values(), len(drawn)
        training.step(step)
        after = training.values()
        changed = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
        for layer in ("0", "2"):
            assert {f"{layer}.A", f"{layer}.G"} <= changed or step % 2
            assert not {f"{layer}.A", f"{layer}.G", f"{layer}.age"} & changed or not step % 2
            assert bool({f"{layer}.{name}" for name in names} & changed) == (step % 3 == 0)
            if inverse == "ekfac":
                assert (f"{layer}.spectrum" in changed) == (step in (0, 2, 3, 4, 6))
        assert len(drawn) - already == (step % 2 == 0)


@every_inverse
def test_between_updates_the_stored_inverse_is_used(inverse: str) -> None:
    training = Training(curvature_period=3, inverse_period=3, inverse=inverse, damping=(0.1, 0.1))
    training.step(0)
    factors = {n: (A.clone(), G.clone()) for n, (A, G) in training.preconditioner.factors().items()}
    training.backward(1)
    gradients = {n: torch.cat([layer(training, n).weight.grad, layer(training, n).bias.grad[:, None]], 1) for n in "02"}
    training.preconditioner.step()
    for n, (A, G) in factors.items():
        block = torch.kron(G + 0.1 * torch.eye(len(G)), A + 0.1 * torch.eye(len(A)))
        natural = torch.cat([layer(training, n).weight.grad, layer(training, n).bias.grad[:, None]], 1)
        assert relative_error(natural.flatten(), torch.linalg.solve(block, gradients[n].flatten())) < 1e-10


def layer(training: Training, name: str) -> nn.Linear:
    return training.model.get_submodule(name)


# The running average and the clip.


def test_factor_decay_is_that_of_the_average() -> None:
    singles = []
    for seed in (0, 1):
        training = Training(fisher="forward", factor_decay=0.0)
        training.optimizer.param_groups[0]["lr"] = 0.0
        training.step(seed)
        singles.append(training.preconditioner.factors()["0"][0])
    training = Training(fisher="forward", factor_decay=0.25)
    for seed in (0, 1):
        training.step(seed)
    assert relative_error(training.preconditioner.factors()["0"][0], (0.25 * singles[0] + singles[1]) / 1.25) < 1e-6


@pytest.mark.parametrize(("n", "forgets"), [(4, False), (5, True)])
def test_auto_forgets_where_the_batch_suffices(n: int, forgets: bool) -> None:
    """A row for each of five dimensions, of the larger factor of the last layer."""
    model = network()
    preconditioner = natgrad.Preconditioner(model, "mse")
    for seed in (0, 1):
        model(batch(seed, n)[0]).sum().backward()
        preconditioner.step()
    assert float(preconditioner.state[model[2].weight]["age"]) == pytest.approx(1.0 if forgets else 1.95)


@pytest.mark.parametrize("kl_clip", [1e-6, 1e-3, 1e6])
def test_clip_bounds_the_length_in_the_curvature_norm(kl_clip: float) -> None:
    """min(1, √(kl_clip / gᵀΔ)) times Δ, one number for all layers."""
    free, clipped = Training(damping=0.1), Training(damping=0.1, kl_clip=kl_clip)
    for training in (free, clipped):
        training.backward(0)
    gradient = [p.grad.clone() for p in free.model.parameters()]
    free.preconditioner.step()
    clipped.preconditioner.step()
    natural = [p.grad for p in free.model.parameters()]
    length = sum(float((g * d).sum()) for g, d in zip(gradient, natural, strict=True))
    scale = min(1.0, (kl_clip / length) ** 0.5)
    assert (scale == 1.0) == (kl_clip == 1e6)
    for actual, d in zip(clipped.model.parameters(), natural, strict=True):
        assert relative_error(actual.grad, scale * d) < 1e-12


# State.


@every_inverse
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_interrupted_run_is_bitwise_an_uninterrupted_one(inverse: str, steps: int, dtype: torch.dtype) -> None:
    """Seven steps end between two updates of either kind."""
    torch.set_default_dtype(dtype)
    try:
        options = {"inverse": inverse, "factor_decay": 0.9, "curvature_period": 2, "inverse_period": 3}
        whole, resumed = Training(**options), Training(**options)
        for seed in range(steps):
            whole.step(seed)
        file = io.BytesIO()
        parts = ("model", "preconditioner", "optimizer")
        torch.save({part: getattr(whole, part).state_dict() for part in parts}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        for part in parts:
            getattr(resumed, part).load_state_dict(saved[part])
        assert resumed.preconditioner.steps == steps
        for seed in range(steps, steps + 4):
            assert_same(resumed.values(), whole.values())
            whole.step(seed)
            resumed.step(seed)
        assert_same(resumed.values(), whole.values())
    finally:
        torch.set_default_dtype(torch.float64)


def test_a_loaded_state_is_a_copy() -> None:
    first, second = Training(factor_decay=0.9), Training(factor_decay=0.9)
    first.step(0)
    expected = first.values()
    second.preconditioner.load_state_dict(first.preconditioner.state_dict())
    second.step(1)
    assert_same(first.values(), expected)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (stack([3, 5, 2]), r"layer '0' has factors G, A of sizes \(5, 4\), the state \(4, 4\)"),
        (stack([3, 4, 3]), r"layer '2' has factors G, A of sizes \(3, 5\), the state \(2, 5\)"),
        (stack([3, 4, 4, 2]), "these layers are in only one of them: 4"),
        (stack([3, 2]), "these layers are in only one of them: 2"),
    ],
)
def test_the_state_of_another_model_is_refused_whole(other: nn.Module, text: str) -> None:
    training = Training()
    training.step(0)
    preconditioner = natgrad.Preconditioner(copy.deepcopy(other), "mse")
    with pytest.raises(ValueError, match=f"the state belongs to another model.*{text}"):
        preconditioner.load_state_dict(training.preconditioner.state_dict())
    assert preconditioner.factors() == {}
    assert preconditioner.steps == 0


def test_the_state_of_an_optimizer_is_refused() -> None:
    training = Training()
    with pytest.raises(ValueError, match=r"not saved by natgrad.Preconditioner; that of a natgrad.KFAC is for"):
        training.preconditioner.load_state_dict(natgrad.KFAC(stack([3, 4, 2]), "mse").state_dict())


@pytest.mark.filterwarnings("ignore:natgrad. the training loop differentiates:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_gradients_with_a_graph_become_natural_ones_without() -> None:
    """Of ``create_graph=True``: nothing would free what they are made of."""
    training = Training()
    x, y = batch(0)
    mse_loss(training.model(x), y).backward(create_graph=True)
    training.preconditioner.step()
    assert not any(p.grad.requires_grad for p in training.model.parameters() if p.grad is not None)


def test_replicas_in_threads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = nn.DataParallel(stack([3, 2]))
    monkeypatch.setattr(wrapped, "device_ids", [0, 1], raising=False)
    with pytest.raises(TypeError, match="DistributedDataParallel, as torch itself recommends"):
        natgrad.Preconditioner(wrapped, "mse")
