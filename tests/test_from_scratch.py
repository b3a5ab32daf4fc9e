"""The example that explains K-FAC takes the same step as the product, given the same noise."""

import importlib.util
import pathlib
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import natgrad

SIZES = [12, 9, 5, 9, 12]
RATE, STEPS = 0.15, 3


@pytest.fixture(scope="module")
def from_scratch() -> ModuleType:
    path = pathlib.Path(__file__).parents[1] / "examples" / "from_scratch.py"
    spec = importlib.util.spec_from_file_location("from_scratch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Dealt(natgrad.likelihoods.Gaussian):
    """A Gaussian whose sample is handed in."""

    noise: Tensor

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        return self.noise


def test_steps_equal_those_of_the_product(from_scratch: ModuleType) -> None:
    torch.manual_seed(0)
    images, damping = torch.rand(20, SIZES[0]), 0.02
    layers = [from_scratch.Layer(i, o) for i, o in pairwise(SIZES)]
    model = nn.Sequential(*[m for i, o in pairwise(SIZES) for m in (nn.Linear(i, o, bias=False), nn.Sigmoid())])
    with torch.no_grad():
        for layer, linear in zip(layers, model[::2], strict=True):
            linear.weight.copy_(layer.W)
    by_hand = torch.optim.SGD([layer.W for layer in layers], lr=RATE)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    gaussian = Dealt(reduction="batchmean")
    preconditioner = natgrad.Preconditioner(
        model, loss=gaussian, damping=(damping, damping), factor_decay=0.0, batch_fraction=1.0
    )
    for _ in range(STEPS):
        gaussian.noise = torch.randn_like(images)

        by_hand.zero_grad()
        loss_by_hand = from_scratch.backward(layers, images, gaussian.noise, damping)
        by_hand.step()

        optimizer.zero_grad()
        loss = (model(images) - images).square().sum() / 2 / len(images)
        loss.backward()
        preconditioner.step()
        for layer, linear in zip(layers, model[::2], strict=True):
            torch.testing.assert_close(linear.weight.grad, layer.W.grad, rtol=1e-5, atol=1e-5)
        optimizer.step()

        assert loss.item() == pytest.approx(loss_by_hand, rel=1e-5)
        for layer, linear in zip(layers, model[::2], strict=True):
            torch.testing.assert_close(linear.weight, layer.W, rtol=1e-5, atol=1e-5)


def test_standard_mode_is_the_gradient(from_scratch: ModuleType) -> None:
    torch.manual_seed(0)
    images, layers = torch.rand(20, SIZES[0]), [from_scratch.Layer(i, o) for i, o in pairwise(SIZES)]
    weights = [layer.W.detach().clone().requires_grad_() for layer in layers]
    from_scratch.backward(layers, images)
    output = images
    for W in weights:
        output = torch.sigmoid(output @ W.T)
    ((output - images).square().sum() / 2 / len(images)).backward()
    for layer, W in zip(layers, weights, strict=True):
        torch.testing.assert_close(layer.W.grad, W.grad)


def test_it_is_one_page_long(from_scratch: ModuleType) -> None:
    assert from_scratch.__file__ is not None
    assert len(pathlib.Path(from_scratch.__file__).read_text().splitlines()) <= 80
