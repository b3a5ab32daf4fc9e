"""Copies and pickles of optimizer and model: a working pair, a working optimizer alone, a model of nobody's."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.utils.parametrizations import weight_norm

import natgrad
from kfac_cases import assert_same, backward, batch, every_mode, network, train, values
from natgrad.groups import FALLBACK_RATE

pytestmark = pytest.mark.usefixtures("float64")

Copy = Callable[[Any], Any]
WAYS: dict[str, Copy] = {"deepcopy": copy.deepcopy, "pickle": lambda it: pickle.loads(pickle.dumps(it))}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@every_way
@every_mode
@pytest.mark.parametrize("model_first", [True, False])
def test_a_copied_pair_trains_as_the_original_does(way: Copy, mode: dict[str, Any], model_first: bool) -> None:
    optimizer = natgrad.KFAC(network(), "mse", weight_decay=0.1, curvature_period=2, inverse_period=3, **mode)
    model = optimizer.preconditioner.model
    train(optimizer, 0, 1)
    pair = way((model, optimizer) if model_first else (optimizer, model))
    other_model, other = pair if model_first else pair[::-1]
    assert other.preconditioner.model is other_model
    assert {id(p) for group in other.param_groups for p in group["params"]} == {id(p) for p in other_model.parameters()}
    assert hooks(other_model) == hooks(model)
    before = values(optimizer)
    train(other, 2, 3, 4, 5)
    assert_same(values(optimizer), before)
    train(optimizer, 2, 3, 4, 5)
    assert_same(values(other), values(optimizer))
    assert other.diagnostics() == optimizer.diagnostics()


def test_a_weight_that_is_computed_goes_along() -> None:
    """What was kept of it was no leaf of the graph, and cannot be copied."""
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    optimizer = natgrad.KFAC(model, "mse")
    train(optimizer, 0)
    nobodys = copy.deepcopy(model)
    _, other = copy.deepcopy((model, optimizer))
    train(other, 1)
    train(optimizer, 1)
    assert_same(values(other), values(optimizer))
    assert hooks(nobodys) == hooks(model)


@every_way
def test_an_optimizer_alone_brings_its_model(way: Copy) -> None:
    optimizer = natgrad.KFAC(network(), "mse")
    train(optimizer, 0)
    alone = way(optimizer)
    assert alone.preconditioner.model is not optimizer.preconditioner.model
    train(alone, 1)
    train(optimizer, 1)
    assert_same(values(alone), values(optimizer))


@every_way
@pytest.mark.parametrize("damping", ["auto", 0.1, (0.1, 0.2)])
@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
def test_a_preconditioner_is_copied_with_its_model(way: Copy, damping: Any, inverse: str) -> None:
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    preconditioner = natgrad.Preconditioner(model, "mse", damping=damping, inverse=inverse)
    pairs = [(model, sgd, preconditioner)]
    for seed in range(4):
        if seed == 2:
            pairs.append(way(pairs[0]))
        for one, optimizer, pre in pairs:
            backward(one, seed)
            assert pre.step()
            optimizer.step()
    one, other = (dict(pair[0].named_parameters()) for pair in pairs)
    assert_same({n: p.detach() for n, p in other.items()}, {n: p.detach() for n, p in one.items()})


@every_way
def test_a_model_copied_alone_is_free(way: Copy) -> None:
    """For instance for an average of weights: nothing is gathered for an optimizer that is not there."""
    optimizer = natgrad.KFAC(network(), "mse", output=lambda out: out)  # which could not be pickled
    train(optimizer, 0)
    free = way(optimizer.preconditioner.model)
    backward(free, 1)
    assert optimizer.preconditioner.capture.ahead == []
    assert all(not vars(part)["_forward_hooks"] or _idle(part) for part in free.modules())
    another = natgrad.KFAC(free, "mse")
    train(another, 1)
    train(optimizer, 1)
    names = dict(free.named_parameters())
    assert names.keys() == dict(optimizer.preconditioner.model.named_parameters()).keys()


def _idle(module: nn.Module) -> bool:
    captures = [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
    return all(capture is None or vars(capture).keys() <= {"attached", "_calls", *vars(module)} for capture in captures)


def test_a_dropped_optimizer_takes_its_hooks_along() -> None:
    """Catches hooks that keep their owner alive, gather for ever, and slow down the next optimizer."""
    model = network()
    for make in (natgrad.KFAC, natgrad.Preconditioner):
        for inverse in ("cholesky", "ekfac"):
            optimizer = make(model, "mse", inverse=inverse)
            assert hooks(model) > 0
            backward(model, 0)
            optimizer.step()
            del optimizer
            gc.collect()
            assert hooks(model) == 0


class Agent(nn.Module):
    """Keeps its optimizer itself: each is reached while the other is half copied."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.optimizer = natgrad.KFAC(self, "mse")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_a_model_that_holds_its_optimizer_can_be_copied() -> None:
    agent = Agent()
    train(agent.optimizer, 0)
    twin = copy.deepcopy(agent)
    assert twin.optimizer.preconditioner.model is twin
    train(agent.optimizer, 1, 2)
    train(twin.optimizer, 1, 2)
    assert_same(values(twin.optimizer), values(agent.optimizer))


@every_way
def test_a_loss_module_is_copied_along(way: Copy) -> None:
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    model = network()
    optimizer = natgrad.KFAC(model, criterion)
    triples = [(model, optimizer, criterion)]
    for seed in range(3):
        if seed == 1:
            triples.append(way(triples[0]))
        for one, opt, loss in triples:
            opt.zero_grad()
            loss(one(batch(seed)[0]), torch.arange(6) % 2).backward()
            opt.step()
    assert_same(values(triples[1][1]), values(triples[0][1]))


@every_way
def test_what_was_captured_stays_behind(way: Copy) -> None:
    """A graph cannot be copied; the copy starts with the next forward pass."""
    optimizer = natgrad.KFAC(network(), "mse")
    model = optimizer.preconditioner.model
    train(optimizer, 0)
    backward(model, 1)
    other_model, other = way((model, optimizer))
    optimizer.step()
    backward(other_model, 1)
    other.step()
    assert_same(values(other), values(optimizer))


def test_a_scheduler_is_copied_with_its_optimizer() -> None:
    optimizer = natgrad.KFAC(network(), "mse", lr=0.4, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(optimizer, 0)
    scheduler.step()
    _, other, other_scheduler = copy.deepcopy((optimizer.preconditioner.model, optimizer, scheduler))
    train(other, 1)
    other_scheduler.step()
    assert [group["lr"] for group in other.param_groups] == [0.1, FALLBACK_RATE / 4]
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, FALLBACK_RATE / 2]
    assert other.diagnostics()["lr"] == 0.2


def test_a_copy_can_be_regrouped() -> None:
    model = network()
    optimizer = natgrad.KFAC(model, "mse", params=model[3].parameters(), lr=0.1, momentum=0.9)
    train(optimizer, 0)
    other = copy.deepcopy(optimizer)
    other_model = other.preconditioner.model
    other.add_param_group({"params": other_model[0].parameters()})
    before = other_model[0].weight.detach().clone()
    x, y = batch(1)
    other.zero_grad()
    mse_loss(other_model(x), y).backward()
    other.step()
    assert not torch.equal(other_model[0].weight, before)
    assert len(optimizer.param_groups) == 1
