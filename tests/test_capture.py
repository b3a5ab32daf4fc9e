"""Capture: what is watched, what is drawn, which data enter, and what is refused. The oracle checks the numbers."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import natgrad
from cases import assert_blocks, product_blocks
from linear_cases import stack
from natgrad import factors
from natgrad.factors import Statistics
from natgrad.likelihoods import Gaussian

pytestmark = pytest.mark.usefixtures("float64")
every_fisher = pytest.mark.parametrize("fisher", ["mc", "exact", "empirical", "forward"])


def network(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return stack(widths or (3, 4, 2))


def take_step(preconditioner: natgrad.Preconditioner, x: Tensor) -> None:
    preconditioner.model.zero_grad()
    preconditioner.model(x).square().sum().backward()
    preconditioner.step()


def statistics(preconditioner: natgrad.Preconditioner) -> dict[str, Statistics]:
    """By layer; of tied layers there would be two."""
    return {name: s for (name, swapped), s in preconditioner.capture.ahead[-1].statistics.items() if not swapped}


# When there is something to capture.


@every_fisher
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_captured(fisher: str, mode: Callable[[], Any]) -> None:
    """An evaluation between two steps must not enter the factors."""
    preconditioner = natgrad.Preconditioner(network(), "mse", fisher=fisher)
    with mode():
        preconditioner.model(torch.randn(5, 3))
    assert preconditioner.capture.ahead == []


def test_a_layer_called_on_its_own_is_not_captured() -> None:
    preconditioner = natgrad.Preconditioner(network(), "mse")
    preconditioner.model[0](torch.randn(5, 3))
    assert preconditioner.capture.ahead == []


def trained(evaluate: Callable[[nn.Module, str], None]) -> list[Tensor]:
    """Parameters after some steps of two micro-batches, with a look at other data wherever somebody may take one."""
    model, x = network(), torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    optimizer = natgrad.KFAC(model, "mse")
    for step in range(4):
        optimizer.zero_grad()
        for number, part in enumerate(x.chunk(2)):
            (mse_loss(model(part), part[:, :2].sin()) / 2).backward()
            if step or number:  # before any gradient has arrived, a pass may be one of which none will be heard
                evaluate(model, "after a backward pass")
        optimizer.step()
        evaluate(model, "after a step")
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("place", ["after a backward pass", "after a step"])
@pytest.mark.parametrize("times", [1, 2])
def test_an_evaluation_with_gradients_is_none_without_a_backward_pass(place: str, times: int) -> None:
    """As of a target that is detached. Catches statistics, draws and a divisor that count it."""
    others = torch.randn(7, 3)

    def evaluate(model: nn.Module, here: str) -> None:
        for _ in range(times if here == place else 0):
            mse_loss(model(others), model(others).detach()).item()

    torch.testing.assert_close(trained(evaluate), trained(lambda *_: None), rtol=0, atol=0)


@pytest.mark.parametrize("fisher", ["mc", "exact", "forward"])
@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_a_graph_is_freed_with_its_output(fisher: str, fraction: float) -> None:
    """Catches circles, in which it waits for the garbage collector, with all that was saved for a backward pass."""
    preconditioner = natgrad.Preconditioner(network(), "mse", fisher=fisher, batch_fraction=fraction)
    gc.disable()
    try:
        output = preconditioner.model(torch.randn(40, 3))
        ears = preconditioner.capture.ahead[-1].ears
        assert [ear.is_deaf for ear in ears] == [False]
        del output
        assert [ear.is_deaf for ear in ears] == [True]
    finally:
        gc.enable()


def test_passes_that_wait_for_one_backward_pass_count_together() -> None:
    """Even where the first of their outputs is only kept by the loss."""
    model, whole, x = network(), network(), torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    optimizers = [natgrad.KFAC(m, "mse", fisher="exact", lr=0.1, momentum=0.9, damping=0.1) for m in (model, whole)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = torch.zeros(())
        for part in x.chunk(4):
            total = total + model(part).square().mean() / 4
        total.backward()
        whole(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_while_disabled_forwards_are_counted_and_statistics_are_not_gathered() -> None:
    preconditioner = natgrad.Preconditioner(network(), "mse")
    preconditioner.capture.due = set()
    preconditioner.model(torch.randn(5, 3))
    batch = preconditioner.capture.ahead[-1]
    assert (batch.forwards, batch.data, batch.terms, batch.statistics) == (1, 5, 10, {})


def test_empirical_gradients_arrive_during_the_backward_pass() -> None:
    preconditioner = natgrad.Preconditioner(network(), "mse", fisher="empirical")
    loss = preconditioner.model(torch.randn(5, 3)).square().sum()
    assert statistics(preconditioner).keys() == {"0", "2"}
    assert all(s.G is None for s in statistics(preconditioner).values())
    loss.backward()
    assert all(s.G is not None for s in preconditioner.capture.take().statistics.values())


class Discarding(nn.Module):
    """Computes what it does not return."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.discarded = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.discarded(x)
        return self.used(x)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_layer_that_the_output_does_not_depend_on_has_a_zero_factor(fisher: str) -> None:
    preconditioner = natgrad.Preconditioner(Discarding(), "mse", fisher=fisher)
    take_step(preconditioner, torch.randn(5, 3))
    _, G = preconditioner.factors()["discarded"]
    assert torch.equal(G, torch.zeros(2, 2))
    assert preconditioner.model.discarded.weight.grad is None


# How the model may be written.


class Dictionary(nn.Module):
    """Returns more than its logits, and calls its layers by keyword."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.layers[0](input=x))
        return {"hidden": hidden, "logits": self.layers[2](input=hidden)}


@every_fisher
def test_output_selects_and_layers_take_keywords(fisher: str) -> None:
    model, x, y = network(), torch.randn(5, 3), torch.randn(5, 2)
    plain = product_blocks(model, "mse", mse_loss, (x, y), fisher=fisher)
    blocks = product_blocks(
        Dictionary(model),
        "mse",
        lambda out, y: mse_loss(out["logits"], y),
        (x, y),
        fisher=fisher,
        output=lambda out: out["logits"],
    )
    assert_blocks(blocks, {f"layers.{name}": block for name, block in plain.items()}, 1e-14)


@pytest.mark.parametrize("fisher", ["mc", "exact", "forward"])
def test_autocast_does_not_round_the_statistics(fisher: str) -> None:
    """Only the first layer's input is not rounded by autocast itself; 1 + 2⁻¹² is 1 in bfloat16."""
    model = network().float()
    preconditioner = natgrad.Preconditioner(model, "mse", fisher=fisher)
    x = torch.full((4, 3), 1 + 2.0**-12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    sums = statistics(preconditioner)["0"]
    assert {t.dtype for t in sums.tensors()} == {torch.float32}
    assert sums.A[0, 0] == 4 * (1 + 2.0**-12) ** 2


# Draws.


class Recorder(Gaussian):
    """Remembers every sample that it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        self.drawn.append(super().sample(output, generator))
        return self.drawn[-1]


def test_every_step_micro_batch_sample_and_seed_draws_anew() -> None:
    x, drawn = torch.randn(4, 3), []
    for seed in (0, 1):
        recorder = Recorder()
        preconditioner = natgrad.Preconditioner(network(), recorder, mc_samples=2, seed=seed)
        for _ in range(3):
            _waiting = preconditioner.model(x)  # a micro-batch more
            take_step(preconditioner, x)
        drawn += recorder.drawn
    assert len(drawn) == 24
    assert len({tuple(t.flatten().tolist()) for t in drawn}) == 24


def test_the_same_step_draws_the_same_after_a_reload() -> None:
    x = torch.randn(4, 3)
    first, second = (natgrad.Preconditioner(network(), Recorder()) for _ in range(2))
    for step in range(4):
        if step == 2:
            second.load_state_dict(first.state_dict())
        take_step(first, x)
    take_step(second, x)
    take_step(second, x)
    assert all(map(torch.equal, second.loss.likelihood.drawn, first.loss.likelihood.drawn[2:]))
    assert len(second.loss.likelihood.drawn) == 2


class Constant(Gaussian):
    """Draws the same every time."""

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return torch.ones_like(output)


def test_samples_are_averaged() -> None:
    model, data = network(), (torch.randn(5, 3), torch.randn(5, 2))
    one, three = (product_blocks(model, Constant(), mse_loss, data, mc_samples=k) for k in (1, 3))
    assert_blocks(three, one, 1e-14)


# Which data enter.


@every_fisher
@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("shape", [(1, 3), (1, 2, 3)])
def test_a_fraction_of_identical_data_gives_all_of_them(fisher: str, fraction: float, shape: tuple[int, ...]) -> None:
    """Catches a G that is not scaled up from the data used to all data."""
    model, x = network(), torch.randn(shape)
    data = x.expand(8, *shape[1:]), torch.randn(*shape[:-1], 2).expand(8, *shape[1:-1], 2)
    told = Constant() if fisher == "mc" else "mse"
    whole = product_blocks(model, told, mse_loss, data, fisher=fisher)
    assert_blocks(product_blocks(model, told, mse_loss, data, fisher=fisher, batch_fraction=fraction), whole, 1e-12)


def chosen(preconditioner: natgrad.Preconditioner, n: int) -> list[int]:
    """Which of n one-hot data entered the first layer's A in a forward pass."""
    preconditioner.model(torch.eye(n))
    A = statistics(preconditioner)["0"].A
    preconditioner.capture.take()
    return A.diagonal()[:n].nonzero().flatten().tolist()


def test_a_fraction_is_drawn_anew_at_every_step() -> None:
    """Were it always the same, the other data of a full batch would never be seen; and the user's stream stays."""
    preconditioner = natgrad.Preconditioner(network(8, 2), "mse", batch_fraction=0.25)
    state, sets = torch.get_rng_state(), []
    for step in range(24):
        preconditioner.capture.step = step
        sets.append(tuple(chosen(preconditioner, 8)))
    assert {len(data) for data in sets} == {2}
    assert {datum for data in sets for datum in data} == set(range(8))
    assert len(set(sets)) > 12
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("n", "inputs", "gradients"),
    [(5, 5, 5), (6, 6, 6), (7, 6, 6), (11, 6, 6), (16, 8, 6), (24, 12, 6), (48, 24, 12), (49, 24, 13)],
)
def test_auto_keeps_a_row_for_each_dimension(
    n: int, inputs: int, gradients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The larger factor, of size 6, wants 6 rows; of many data G gets a quarter, and A a half, the quarter among it."""
    monkeypatch.setattr(factors, "MIN_ROWS", 1)
    preconditioner = natgrad.Preconditioner(network(5, 2), "mse", batch_fraction="auto")
    seen: list[int] = []
    sample = preconditioner.loss.likelihood.sample
    monkeypatch.setattr(
        preconditioner.loss.likelihood, "sample", lambda f, generator: seen.append(len(f)) or sample(f, generator)
    )
    preconditioner.model(torch.randn(n, 5))
    sums = statistics(preconditioner)["0"]
    assert (sums.rows, seen) == (inputs, [gradients if 4 * gradients <= n else n])
    assert sums.of == pytest.approx(n)
    assert float(sums.weight) == pytest.approx(n)


def test_inputs_of_a_half_and_gradients_of_a_quarter_are_of_all_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of identical data they give what all of them give: A is a mean, and G is scaled up by its own share."""
    monkeypatch.setattr(factors, "MIN_ROWS", 1)
    model, x = network(), torch.randn(1, 3)
    data = x.expand(40, 3), torch.randn(1, 2).expand(40, 2)
    whole, some = (
        product_blocks(model, Constant(), mse_loss, data, batch_fraction=fraction) for fraction in (1.0, "auto")
    )
    assert_blocks(some, whole, 1e-12)


def test_auto_counts_positions_and_keeps_a_least_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "MIN_ROWS", 30)
    preconditioner = natgrad.Preconditioner(network(5, 2), "mse", batch_fraction="auto")
    preconditioner.model(torch.randn(12, 10, 5))  # 120 rows: a fourth of the data
    assert statistics(preconditioner)["0"].rows == 30


def test_auto_keeps_a_row_for_every_fourth_datum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of positions the rows of few data are enough. Catches convolutions whose factors cost a pass of the model."""
    monkeypatch.setattr(factors, "MIN_ROWS", 1)
    preconditioner = natgrad.Preconditioner(network(5, 2), "mse", batch_fraction="auto")
    preconditioner.model(torch.randn(80, 10, 5))
    assert statistics(preconditioner)["0"].rows == 20


# Several passes, forward and backward.


@pytest.mark.parametrize(("parts", "expected"), [((5, 2), 5), ((2, 5), 5), ((1, 4, 2), 4)])
def test_of_several_passes_that_of_most_data_tells_how_far_to_go(parts: tuple[int, ...], expected: int) -> None:
    """Catches 64 data that end in a micro-batch of one: learnt by heart, it shows no curvature; steps have no end."""
    preconditioner = natgrad.Preconditioner(network(), "mse")
    for n in parts:
        preconditioner.model(torch.randn(n, 3)).square().sum().backward()
    latest = preconditioner.capture.take().latest
    assert latest is not None
    assert latest.data == expected


Backwards = Callable[[Tensor, Tensor], Tensor]


def in_two_passes(x: Tensor, z: Tensor) -> Tensor:
    z[:2].square().sum().backward(retain_graph=True)
    z.sum().backward()
    return 2 * torch.cat([z[:2], 0 * z[2:]]) + 1


def looked_at_afterwards(x: Tensor, z: Tensor) -> Tensor:
    z.square().sum().backward(retain_graph=True)
    torch.autograd.grad(z[:, 0].sum(), x)
    return 2 * z


def looked_at_before(x: Tensor, z: Tensor) -> Tensor:
    torch.autograd.grad(z[:, 0].sum(), x, retain_graph=True)
    z.square().sum().backward()
    return 2 * z


def with_a_penalty(x: Tensor, z: Tensor) -> Tensor:
    torch.autograd.grad(z[:, 0].sum(), x, create_graph=True)[0].square().sum().backward(retain_graph=True)
    z.square().sum().backward()
    return 2 * z


@pytest.mark.filterwarnings("ignore:natgrad. the training loop differentiates:RuntimeWarning")
@pytest.mark.parametrize("backward", [in_two_passes, looked_at_afterwards, looked_at_before, with_a_penalty])
@pytest.mark.parametrize("heads", [1, 2])
def test_backward_passes_add_up_and_a_look_at_derivatives_is_none(backward: Backwards, heads: int) -> None:
    """Catches a loss in two parts of which the second alone is seen, and saliency maps that are taken for the loss."""
    model = network()
    told: Any = "mse" if heads == 1 else {"a": "mse", "b": "mse"}
    whole = model if heads == 1 else Heads(model)
    preconditioner = natgrad.Preconditioner(whole, told)
    x = torch.randn(5, 3, requires_grad=True)
    out = whole(x)
    expected = backward(x, out if heads == 1 else torch.cat([out["a"], out["b"]], dim=1))
    latest = preconditioner.capture.take().latest
    assert latest is not None
    assert latest.gradient is not None
    torch.testing.assert_close(latest.gradient, expected.detach())


def test_a_look_at_derivatives_is_none_where_a_layer_was_frozen_on_the_way() -> None:
    """Catches a parameter that takes no gradient any more and is asked for one."""
    preconditioner = natgrad.Preconditioner(network(), "mse")
    preconditioner.model[0].requires_grad_(False)
    x = torch.randn(5, 3, requires_grad=True)
    expected = looked_at_afterwards(x, preconditioner.model(x))
    latest = preconditioner.capture.take().latest
    assert latest is not None
    assert latest.gradient is not None
    torch.testing.assert_close(latest.gradient, expected.detach())


class Heads(nn.Module):
    """The two outputs of a network under two names."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.network(x)
        return {"a": z[:, :1] + 0, "b": z[:, 1:] + 0}


# What is refused.


class Returns(nn.Module):
    """One layer, and whatever is made of its output."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.then = nn.Linear(3, 2), then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.layer(x))


@pytest.mark.parametrize(
    ("then", "options", "error", "text"),
    [
        (lambda z: (z, z), {}, TypeError, "the model returned tuple, not a tensor: pass `output=`"),
        (lambda z: {"logits": z}, {}, TypeError, "for instance `output=lambda out: out.logits`"),
        (lambda z: z, {"output": lambda out: [out]}, TypeError, "the function `output=` returned list"),
        (lambda z: z[:, 0], {}, ValueError, 'use loss="bce_with_logits"'),
        (lambda z: z[:, :1], {}, ValueError, "at least two classes, not (5, 1)"),
        (lambda z: z.mean(), {}, ValueError, "the model returned a scalar"),
        (lambda z: z, {"output": torch.mean}, ValueError, "the function `output=` returned a scalar"),
        (lambda z: z.mean(), {"loss": None, "fisher": "empirical"}, ValueError, "the model returned a scalar"),
        (lambda z: z.round().long(), {}, ValueError, "needs a floating point output"),
    ],
)
def test_outputs_that_are_refused(
    then: Callable[[Tensor], Any], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    preconditioner = natgrad.Preconditioner(Returns(then), **{"loss": "cross_entropy", **options})
    with pytest.raises(error, match="output") as raised:
        preconditioner.model(torch.randn(5, 3))
    assert text in str(raised.value)
    with torch.no_grad():  # evaluation stays possible
        preconditioner.model(torch.randn(5, 3))


class Interrupted(nn.Module):
    """Raises what a user's Ctrl-C does, once it is told to."""

    raises = False

    def forward(self, x: Tensor) -> Tensor:
        if self.raises:
            raise KeyboardInterrupt
        return x


def test_training_goes_on_after_a_pass_that_was_interrupted() -> None:
    """torch calls no hook for what is no ``Exception``: all passes that followed were taken for inner ones."""
    model = nn.Sequential(nn.Linear(6, 8), middle := Interrupted(), nn.Linear(8, 3))
    optimizer = natgrad.KFAC(model, "mse", lr=0.1, momentum=0.9, curvature_period=1, inverse_period=1)
    x, y = torch.randn(32, 6), torch.randn(32, 3)

    def step() -> None:
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()

    step()
    middle.raises = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    middle.raises = False
    step()  # which is taken with the curvature of before
    step()
    assert optimizer.diagnostics()["inverse_age"] == 0
    assert not optimizer.preconditioner.capture._nested


def test_inputs_of_a_pass_that_failed_are_let_go_of() -> None:
    """They stayed until the next one, and went into copies."""
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = natgrad.KFAC(model, "mse")
    x = torch.randn(32, 5)
    gone = weakref.ref(x)
    with pytest.raises(RuntimeError, match="shapes"):
        model(x)
    del x
    gc.collect()
    assert gone() is None
    assert "_arguments" not in optimizer.preconditioner.capture.settings()
