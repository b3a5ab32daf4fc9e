"""Several passes between two steps: each is counted once, with its own targets, and only if it was trained on."""

import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import natgrad
from linear_cases import stack
from natgrad.passes import APART
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
Factors = dict[str, tuple[Tensor, Tensor]]
WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return stack([4, 6, 3])


def inputs(number: int = 0) -> Tensor:
    return torch.randn(20, 4, generator=torch.Generator().manual_seed(number))


def labels(number: int = 0) -> Tensor:
    return torch.randint(3, (20,), generator=torch.Generator().manual_seed(number))


def factors_of(loop: Callable[[nn.Module], None], loss: str | nn.Module, fisher: str = "exact") -> Factors:
    """What a loop of forward and backward passes leaves."""
    model = network()
    preconditioner = natgrad.Preconditioner(model, loss, fisher=fisher, batch_fraction=1.0)
    loop(model)
    preconditioner.step()
    return preconditioner.factors()


def assert_alike(first: Factors, second: Factors) -> None:
    for name in first:
        for mine, theirs in zip(first[name], second[name], strict=True):
            assert relative_error(mine, theirs) < 1e-12


# Which pass belongs to which call of the loss module.


@pytest.mark.parametrize("loss", [WEIGHTED, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_all_calls_of_the_model_may_come_before_those_of_the_loss(loss: nn.Module, order: tuple[int, int]) -> None:
    """G was zero: the calls of one pass were looked for in the graph of the other."""

    def in_turn(model: nn.Module) -> None:
        sum((loss(model(inputs(i)), labels(i)) for i in (0, 1)), torch.zeros(())).backward()

    def one_after_the_other(model: nn.Module) -> None:
        outputs = [model(inputs(i)) for i in (0, 1)]
        sum((loss(outputs[i], labels(i)) for i in order), torch.zeros(())).backward()

    assert_alike(factors_of(one_after_the_other, loss), factors_of(in_turn, loss))


def test_a_module_that_misses_a_pass_is_told_of_and_one_that_only_evaluates_is_not() -> None:
    model = network()
    preconditioner = natgrad.Preconditioner(model, WEIGHTED)
    _kept = model(inputs(1))
    WEIGHTED(model(inputs()), labels()).backward()
    preconditioner.step()
    WEIGHTED(model(inputs()), labels()).backward()
    nn.functional.cross_entropy(model(inputs()), labels()).backward()
    with pytest.raises(RuntimeError, match="was not called with the model's output"):
        preconditioner.step()


class Mark:
    """Lives as long as the hook that holds it."""

    def __call__(self, gradient: Tensor) -> None:
        pass


def test_a_pass_that_no_loss_has_seen_goes_with_its_output() -> None:
    """Catches a hook on the graph that holds the pass, and with it the graph."""
    preconditioner = natgrad.Preconditioner(network(), nn.CrossEntropyLoss())
    gc.disable()
    try:
        output, mark = preconditioner.model(inputs()), Mark()
        output.register_hook(mark)
        held = weakref.ref(mark)
        del output, mark
        assert held() is not None
        preconditioner.capture.take()
        assert held() is None
    finally:
        gc.enable()


# Several backward passes through one graph.


@pytest.mark.parametrize("parts", [2, 4])
def test_the_empirical_fisher_is_that_of_the_sum_of_all_backward_passes(parts: int) -> None:
    """It was that of halves, each by itself: half as large."""

    def loop(parts: int) -> Callable[[nn.Module], None]:
        def run(model: nn.Module) -> None:
            loss = mse_loss(model(inputs()), inputs(1)[:, :3])
            for _ in range(parts):
                (loss / parts).backward(retain_graph=True)

        return run

    assert_alike(factors_of(loop(parts), "mse", "empirical"), factors_of(loop(1), "mse", "empirical"))


def noises(parts: int) -> dict[str, Tensor]:
    """By layer, after two steps with so many backward passes each."""
    model = network()
    optimizer = natgrad.KFAC(model, "mse")
    for _ in range(2):
        optimizer.zero_grad()
        loss = mse_loss(model(inputs()), inputs(1)[:, :3])
        for _ in range(parts):
            (loss / parts).backward(retain_graph=True)
        optimizer.step()
    return {name: state["noise"] for name, state in optimizer.preconditioner.states().items()}


def test_the_noise_of_gradients_is_that_of_their_sum() -> None:
    """It was that of the last part: the share of noise fell from 0.45 to 0.008 of four."""
    whole, parted = noises(1), noises(4)
    assert len(whole) == 2
    torch.testing.assert_close(parted, whole)


# Passes that are evaluated.


def trained(kept: bool, loss: str | nn.Module, **options: float) -> tuple[list[Tensor], dict[str, float]]:
    model = network()
    optimizer = natgrad.KFAC(model, loss, fisher="exact", **options)
    target: Tensor = labels() if isinstance(loss, nn.Module) or loss == "cross_entropy" else inputs(1)[:, :3]
    function = loss if isinstance(loss, nn.Module) else optimizer.preconditioner.loss.function
    assert function is not None
    for _ in range(4):
        optimizer.zero_grad()
        function(model(inputs()), target).backward()
        optimizer.step()
        _value = function(model(inputs(9).repeat(50, 1)), target.repeat(50, *[1] * (target.ndim - 1))) if kept else None
    return [p.detach() for p in model.parameters()], optimizer.diagnostics(per_layer=False)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", WEIGHTED, nn.CrossEntropyLoss()])
def test_an_evaluation_whose_loss_is_kept_is_no_data(loss: str | nn.Module) -> None:
    """It counted as data of the batch: what a step was to do was found a hundred times too large."""
    (mine, told), (theirs, expected) = trained(True, loss), trained(False, loss)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=0)
    assert told["predicted_change"] == pytest.approx(expected["predicted_change"], rel=1e-8)


def test_many_passes_before_one_backward_pass_share_their_sums() -> None:
    """As when a policy acts, one observation at a time: the memory is not that of so many sets of factors."""

    def loop(model: nn.Module) -> None:
        sum((mse_loss(model(x), x[:, :3]) for x in inputs().split(1)), torch.zeros(())).backward()

    model = network()
    preconditioner = natgrad.Preconditioner(model, "mse", fisher="exact", batch_fraction=1.0)
    loop(model)
    assert len(preconditioner.capture.ahead) == APART
    preconditioner.step()
    assert_alike(
        preconditioner.factors(), factors_of(lambda m: mse_loss(m(inputs()), inputs()[:, :3]).backward(), "mse")
    )


# A model that is called inside of its own call, or again in a backward pass.


class Recursive(nn.Module):
    """Calls itself, or what stands for it; the innermost call may return nothing."""

    def __init__(self, itself: bool, is_empty: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.itself, self.is_empty = nn.Linear(4, 4), itself, is_empty

    def forward(self, x: Tensor, depth: int = 2, wrong: bool = False) -> Tensor | None:
        if not depth:
            if wrong:
                raise ArithmeticError
            return None if self.is_empty else x
        again = self if self.itself else self.forward
        x = torch.tanh(self.linear(x))
        below = again(x, depth - 1, wrong)
        return self.linear(x if below is None else below)


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_model_may_call_itself(is_empty: bool) -> None:
    """Only the layers of the innermost call counted; and one that returned nothing was taken for an exception."""
    found = []
    for itself in (True, False):
        model = Recursive(itself, is_empty)
        preconditioner = natgrad.Preconditioner(model, "mse", fisher="exact", batch_fraction=1.0)
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                model(inputs(), wrong=True)
            mse_loss(model(inputs()), inputs(1)).backward()
            preconditioner.step()
        found.append(preconditioner.factors())
    assert_alike(*found)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_whole_model_may_be_checkpointed(reentrant: bool, micro_batches: int) -> None:
    """Without re-entrance all that was captured was thrown away when it ran again."""

    def loop(model: nn.Module, again: bool) -> None:
        for i in range(micro_batches):
            x = inputs(i).requires_grad_()
            output = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
            mse_loss(output, inputs(2)[:, :3]).backward()

    assert_alike(factors_of(lambda m: loop(m, True), "mse"), factors_of(lambda m: loop(m, False), "mse"))


def test_a_hook_of_the_users_may_change_what_a_layer_returns() -> None:
    """G is of the layer's own output: it was of what the hook made of it, a hundredth."""

    def tenfold(model: nn.Module) -> None:
        model[0].register_forward_hook(lambda module, args, z: 10 * z)

    def found(hooked: bool) -> Factors:
        model = network()
        if hooked:
            tenfold(model)
        else:
            model.insert(1, Tenfold())
        preconditioner = natgrad.Preconditioner(model, "mse", fisher="exact", batch_fraction=1.0)
        mse_loss(model(inputs()), inputs(1)[:, :3]).backward()
        preconditioner.step()
        return preconditioner.factors()

    first, second = found(True), found(False)
    for name, other in zip(first, second, strict=True):
        assert_alike({name: first[name]}, {name: second[other]})


class Tenfold(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return 10 * z


def test_warnings_of_the_loop_are_shown_once() -> None:
    """A filter that is changed makes Python show all of them anew, at every step."""
    model = network()
    optimizer = natgrad.KFAC(model, "mse")
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda *told, **_: shown.append(told)
        for _ in range(4):
            optimizer.zero_grad()
            mse_loss(model(inputs()), inputs(1)[:, :3]).backward()
            optimizer.step()
            warnings.warn("of the loop", UserWarning, stacklevel=1)
    assert len(shown) == 1
