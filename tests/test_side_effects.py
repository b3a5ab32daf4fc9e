"""What natgrad leaves alone: modules and functions of torch and of the user, and other optimizers' statistics."""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss

import natgrad
from kfac_cases import assert_same, values

DATA, KEPT = 64, 8  # a second pass pays from four times as many on


class Noting(nn.Module):
    """Notes what it computes, for the loop to use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 3)
        self.every = list[Tensor]()
        self.named, self.calls = dict[str, Tensor](), 0

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.inner(x).tanh()
        self.every.append(self.hidden)
        self.named["hidden"] = self.hidden
        self.calls += 1
        setattr(self, f"hidden_{self.calls}", self.hidden)
        return self.outer(self.hidden)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(DATA, 6), torch.randint(3, (DATA,))


def test_what_a_module_notes_is_of_the_loops_own_pass(data: tuple[Tensor, Tensor]) -> None:
    """A penalty on it would be that of a few data alone; catches passes of natgrad that leave theirs."""
    x, y = data
    model = Noting()
    plain = copy.deepcopy(model)
    preconditioner = natgrad.Preconditioner(model, "cross_entropy", batch_fraction=KEPT / DATA)
    seen = []
    preconditioner.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    grads = []
    for one in (model, plain):
        loss = cross_entropy(one(x), y) + one.hidden.square().sum() + one.every[0].sum() + one.named["hidden"].sum()
        grads.append(torch.autograd.grad(loss, list(one.parameters())))
    assert seen == [DATA, KEPT]
    assert_same(dict(enumerate(grads[0])), dict(enumerate(grads[1])))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_may_be_traced_between_two_steps(data: tuple[Tensor, Tensor]) -> None:
    """Catches curvature that is gathered of a pass that trains nothing, and that a tracer cannot write down."""
    x, y = data
    runs = []
    for traces in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = natgrad.KFAC(model, "cross_entropy")
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            if traces:
                traced = torch.jit.trace(model, x)
                with torch.no_grad():
                    assert torch.equal(traced(x), model(x))
        runs.append(dict(model.named_parameters()))
    assert_same(runs[1], runs[0])


def test_steps_leave_no_trace_in_modules(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Noting()
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for step in range(3):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        hidden = model.hidden
        del model.named["hidden"]
        optimizer.step()
        assert model.calls == len(model.every) == step + 1
        assert model.hidden is hidden
        assert not model.named
        assert sum(name.startswith("hidden_") for name in vars(model)) == step + 1


class Counting(nn.Module):
    """Keeps what passes through it in containers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.kept = [[], {}, set(), deque(), OrderedDict(), defaultdict(int)]
        self.list, self.dict, self.set, self.deque, self.ordered, self.default = self.kept
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for one in (self.list, self.deque):
            one.append(self.calls)
        for one in (self.dict, self.ordered, self.default):
            one[len(one)] = self.calls
        self.set.add(len(self.set))
        return self.linear(x)


def test_containers_of_all_kinds_are_left_alone(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Counting()
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for step in range(3):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        assert [len(one) for one in model.kept] == [step + 1] * 6


def test_hooks_that_take_features_get_those_of_all_data(data: tuple[Tensor, Tensor]) -> None:
    x, _ = data
    model, features = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), list[int]()
    model[1].register_forward_hook(lambda module, args, output: features.append(len(output)))
    preconditioner = natgrad.Preconditioner(model, "mse", batch_fraction=KEPT / DATA)
    model(x)
    assert features == [DATA]
    assert preconditioner.capture.ahead[-1].forwards == 1


def test_an_exception_in_the_forward_pass_lets_go_of_what_was_captured(data: tuple[Tensor, Tensor]) -> None:
    class Failing(Noting):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(x) == DATA else super().forward(x)[:, :, :, 0]

    x, y = data
    optimizer = natgrad.KFAC(model := Failing(), "cross_entropy")
    with pytest.raises(IndexError):
        model(x[:3])
    assert optimizer.preconditioner.capture._calls is None
    cross_entropy(model(x), y).backward()
    optimizer.step()


class Chain(nn.Module):
    """Modules one after the other, registered once each or as often as they are used, and perhaps under other names."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        a, norm, b = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.used = [a, norm, a, b]
        self.a, self.norm, self.b = a, norm, b
        if again:
            self.chain, self.aliases = nn.Sequential(*self.used), nn.ModuleDict({"b": b, "norm": norm})

    def forward(self, x: Tensor) -> Tensor:
        for module in self.used:
            x = module(x)
        return x


def test_modules_that_are_registered_twice_stay_whole() -> None:
    """And train as those do that are registered once: torch alone would leave plain tensors in them."""
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    once, twice = Chain(again=False), Chain(again=True)
    for model in (once, twice):
        optimizer = natgrad.KFAC(model, "cross_entropy")
        for _ in range(4):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        for module in model.modules():
            assert all(isinstance(p, nn.Parameter) for p in module._parameters.values())
    assert_same(dict(once.named_parameters()), dict(twice.named_parameters()))
    assert_same(dict(once.named_buffers()), dict(twice.named_buffers()))


def attention() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return model, torch.randn(6, 5, 8), torch.randn(6, 5, 8)


@pytest.mark.parametrize("look", [natgrad.verify, natgrad.curvature])
def test_attention_may_be_looked_at_beside_an_optimizer(look: Callable[..., Any]) -> None:
    """Two look at the calls of one module; catches a stand-in for torch's function that outlives its module."""
    model, x, y = attention()
    function = functional.linear
    optimizer = natgrad.KFAC(model, "mse")
    if look is natgrad.verify:
        assert {layer.name for layer in look(model, x, y, "mse").layers} >= {"self_attn.in_proj", "self_attn.out_proj"}
    else:
        assert look(model, x, y, "mse").keys() >= {"self_attn.in_proj", "self_attn.out_proj"}
    assert functional.linear is function
    mse_loss(model(x), y).backward()
    optimizer.step()
    assert functional.linear is function


@pytest.mark.usefixtures("float64")
def test_two_watchers_of_one_attention_see_the_same() -> None:
    model, x, y = attention()
    pair = [natgrad.Preconditioner(model, "mse", damping=0.1, fisher="exact") for _ in range(2)]
    mse_loss(model(x), y).backward()
    for preconditioner in pair:
        preconditioner.update()
    for name, factors in pair[0].factors().items():
        assert_same(dict(enumerate(factors)), dict(enumerate(pair[1].factors()[name])))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("look", ["curvature", "verify", "ekfac"])
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1)], ids=["name", "module"])
def test_a_look_at_the_curvature_enters_no_step(data: tuple[Tensor, Tensor], look: str, loss: Any) -> None:
    """Neither before the forward pass nor between the backward pass and the step."""

    def glance(model: nn.Module) -> None:
        x, y = 10 * torch.randn(16, 6), torch.randint(3, (16,))
        if look == "verify":
            natgrad.verify(model, x, y, loss)
        else:
            natgrad.curvature(model, x, y, loss, ekfac=look == "ekfac")

    (x, y), model = data, nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, call = x.double(), cross_entropy if loss == "cross_entropy" else loss
    trained = []
    for looks in (False, True):
        optimizer = natgrad.KFAC(copy.deepcopy(model), loss)
        for _ in range(2):
            if looks:
                glance(optimizer.preconditioner.model)
            optimizer.zero_grad()
            call(optimizer.preconditioner.model(x), y).backward()
            if looks:
                glance(optimizer.preconditioner.model)
            optimizer.step()
        trained.append(values(optimizer))
    assert_same(*trained)


class Centred(nn.Module):
    """Keeps a running mean in a tensor that is no buffer, and writes to it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.mean = nn.Linear(6, 5), nn.Linear(5, 3), torch.zeros(5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).tanh()
        self.mean.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        return self.outer(hidden - self.mean)


def test_tensors_that_a_module_writes_to_are_left_alone_once_that_was_seen(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = Centred()
    optimizer = natgrad.KFAC(model, "cross_entropy")
    alone = []
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        place, before = model.mean.data_ptr(), model.mean.clone()
        optimizer.step()
        alone.append(torch.equal(model.mean, before) and model.mean.data_ptr() == place)
    assert alone[1:] == [True] * 3
