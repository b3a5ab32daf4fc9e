"""Signal and noise of a gradient against the gradients of single data, one backward pass each."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import natgrad
from natgrad import noise

pytestmark = pytest.mark.usefixtures("float64")


def matrix(layer: nn.Linear) -> Tensor:
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    return torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)


@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "ekfac"])
@pytest.mark.parametrize("shape", [(6, 3), (6, 4, 3)])
def test_total_and_noise_are_those_of_the_data(inverse: str, shape: tuple[int, ...]) -> None:
    """Catches positions squared one by one, a bias left out, and a sum taken for a mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = torch.randn(shape), torch.randn(*shape[:-1], 2)
    preconditioner = natgrad.Preconditioner(model, "mse", inverse=inverse, batch_fraction=1.0)
    mse_loss(model(x), y).backward()
    preconditioner.update()
    samples, states = preconditioner.batch.samples, preconditioner.states()
    for layer in preconditioner.layers:
        told = noise.measure(layer, samples[layer.name], preconditioner._inverse, states[layer.name], 1.0)
        assert told is not None
        state, singles = states[layer.name], []
        V = matrix(layer.module)
        for one, target in zip(x, y, strict=True):
            model.zero_grad()
            (mse_loss(model(one[None]), target[None]) / len(x)).backward()
            singles.append(matrix(layer.module))
        model.zero_grad()
        mse_loss(model(x), y).backward()
        lengths = [torch.sum(v * preconditioner._inverse.solve(state, v)) for v in (V, *singles)]
        expected = torch.stack([lengths[0], torch.stack(lengths[1:]).sum() - lengths[0] / len(x)])
        torch.testing.assert_close(told, expected, rtol=1e-8, atol=0)


def test_ratio_is_one_without_evidence_and_bounded_with_little() -> None:
    assert noise.ratio([]) == 1.0
    assert noise.ratio([torch.tensor([3.0, 1.0])]) == pytest.approx(0.5)
    assert noise.ratio([torch.tensor([1.0, 2.0])]) == pytest.approx(1 / noise.LEAST_SIGNAL)
    assert noise.ratio([torch.tensor([1.0, 0.0])]) == 0.0
    assert noise.ratio([torch.tensor([2.0, 1.0]), torch.tensor([4.0, 1.0])]) == pytest.approx(0.5)
