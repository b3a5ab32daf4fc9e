"""Natgrad judges a step by the very function that the loop differentiated: same masks, same draws, same branches."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad

pytestmark = pytest.mark.usefixtures("float64")
DATA, POSITIONS, WIDTH, CLASSES = 12, 5, 4, 3


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(DATA, POSITIONS, WIDTH, generator=generator)
    return x, torch.randint(CLASSES, (DATA,), generator=generator)


class Pooled(nn.Module):
    """A head on the mean of what becomes of the positions."""

    def __init__(self, body: nn.Module, *args: Any) -> None:
        super().__init__()
        self.body, self.head, self.args = body, nn.Linear(WIDTH, CLASSES), args

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, *self.args).mean(1))


class Transposed(nn.Module):
    """Dropout of a tensor that is not laid out row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.inner(x).tanh().transpose(0, 1)).transpose(0, 1)


class Noisy(nn.Module):
    """Draws from a stream of its own."""

    def __init__(self, draw: Callable[[Any], float], stream: Any) -> None:
        super().__init__()
        self.inner, self.draw, self.stream = nn.Linear(WIDTH, WIDTH), draw, stream

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh() * (1 + self.draw(self.stream))


class Watched(nn.Module):
    """Keeps the gradient of what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).tanh()
        hidden.retain_grad()
        return hidden


def encoder(dropout: float) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=dropout, batch_first=True)


def padded() -> nn.Module:
    """Torch has a fast path for it without gradients, on which padded positions become something else."""
    mask = torch.arange(POSITIONS) >= torch.randint(1, POSITIONS, (DATA, 1))
    return Pooled(nn.TransformerEncoder(encoder(0.0), 1), None, mask).eval()


OF_TORCH = (lambda stream: torch.rand((), generator=stream).item(), lambda: torch.Generator().manual_seed(0))
OF_NUMPY = (lambda stream: stream.random(), lambda: np.random.default_rng(0))
OF_MERSENNE = (lambda stream: stream.random(), lambda: np.random.Generator(np.random.MT19937(0)))
OF_STATES = (lambda stream: stream.random_sample(), lambda: np.random.RandomState(0))
OF_PYTHON = (lambda stream: stream.random(), lambda: random.Random(0))
MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout, transposed": lambda: Pooled(Transposed()),
    "dropout in an encoder": lambda: Pooled(encoder(0.2)),
    "padding in evaluation": padded,
    "keeps gradients": lambda: Pooled(Watched()),
    **{
        f"stream of {name}": lambda draw=draw, make=make: Pooled(Noisy(draw, make()))
        for name, (draw, make) in {
            "torch": OF_TORCH,
            "numpy": OF_NUMPY,
            "numpy's arrays": OF_MERSENNE,
            "old numpy": OF_STATES,
            "Python": OF_PYTHON,
        }.items()
    },
}


def streams(model: nn.Module) -> list[Any]:
    return [module.stream for module in model.modules() if isinstance(module, Noisy)]


def states(model: nn.Module) -> list[Any]:
    """Of the process's stream, and of the model's own."""
    own = [
        stream.get_state()
        if isinstance(stream, torch.Generator)
        else stream.bit_generator.state
        if isinstance(stream, np.random.Generator)
        else stream.get_state()
        if isinstance(stream, np.random.RandomState)
        else stream.getstate()
        for stream in streams(model)
    ]
    return [torch.get_rng_state(), *own]


def put_back(model: nn.Module, before: list[Any]) -> None:
    torch.set_rng_state(before[0])
    for stream, state in zip(streams(model), before[1:], strict=True):
        if isinstance(stream, torch.Generator):
            stream.set_state(state)
        elif isinstance(stream, np.random.Generator):
            stream.bit_generator.state = state
        elif isinstance(stream, np.random.RandomState):
            stream.set_state(state)
        else:
            stream.setstate(state)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_change_that_is_told_is_that_of_the_loops_own_function(make: Callable[[], nn.Module]) -> None:
    """And draws go on as they would without natgrad."""
    torch.manual_seed(0)
    model = make()
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for step in range(4):
        x, y = batch(step)
        before = states(model)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        after = states(model)
        loss.backward()
        undone = optimizer.undone_steps
        optimizer.step()
        assert str(states(model)) == str(after)
        if optimizer.undone_steps == undone:
            put_back(model, before)
            change = cross_entropy(model(x), y).item() - loss.item()
            put_back(model, after)
            assert optimizer.diagnostics(per_layer=False)["actual_change"] == pytest.approx(change, rel=1e-6, abs=1e-9)


def test_a_stream_that_the_loop_replaces_is_the_one_that_counts() -> None:
    """As where it is seeded anew at each epoch."""
    torch.manual_seed(0)
    draw, make = OF_NUMPY
    model = Pooled(Noisy(draw, make()))
    optimizer = natgrad.KFAC(model, "cross_entropy")
    for seed in range(3):
        model.body.stream = np.random.default_rng(seed)
        x, y = batch(seed)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        expected = np.random.default_rng(seed)
        expected.random()
        assert model.body.stream.random() == expected.random()


class Late(nn.Module):
    """Makes its stream when it is first called; another of its attributes has no state at all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.stream, self.system = nn.Linear(WIDTH, WIDTH), None, random.SystemRandom()

    def forward(self, x: Tensor) -> Tensor:
        if self.stream is None:
            self.stream = np.random.default_rng(0)
        return self.inner(x).tanh() * (1 + self.stream.random())


def test_a_stream_that_is_made_in_the_first_pass_goes_on_as_the_loop_drew() -> None:
    torch.manual_seed(0)
    model = Pooled(Late())
    optimizer, expected = natgrad.KFAC(model, "cross_entropy"), np.random.default_rng(0)
    for seed in range(3):
        x, y = batch(seed)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        expected.random()
        assert model.body.stream.bit_generator.state == expected.bit_generator.state


class Crowded(nn.Module):
    """There is memory for the loop's pass, and for no other."""

    passes = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        type(self).passes += 1  # attributes of the module are put back after natgrad's passes
        if self.passes > 1:
            raise torch.OutOfMemoryError("no memory")
        return self.inner(x)


def test_where_memory_is_full_nothing_else_is_tried() -> None:
    """It was taken for a model that takes no part of its data, and then all of them were tried."""
    model = Crowded()
    optimizer = natgrad.KFAC(model, "cross_entropy", batch_fraction=1.0)
    cross_entropy(model(torch.randn(600, WIDTH)), torch.randint(CLASSES, (600,))).backward()
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert Crowded.passes == 2


class WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Opaque(nn.Module):
    passes = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        type(self).passes += 1
        return self.outer(WithoutForwardMode.apply(self.inner(x)))


def test_a_network_that_torch_cannot_differentiate_forwards_is_not_tried_again() -> None:
    """It was tried in two ways at each step, and the outputs were computed anew for each direction."""
    model, counts = Opaque(), []
    optimizer = natgrad.KFAC(model, "cross_entropy", curvature_period=100, inverse_period=100)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        before = Opaque.passes
        cross_entropy(model(x[:, 0]), y).backward()
        optimizer.step()
        counts.append(Opaque.passes - before)
    assert "differences" in optimizer.state[model.inner.weight]
    # The loop's, two for each of two directions, one for the outputs where it is not known that they are the loop's,
    # and one to try the step, if it need not be halved; at first two in vain, and two more as there are two dampings
    # to choose from.
    assert counts[0] == 8
    assert max(counts[2:]) <= 7
