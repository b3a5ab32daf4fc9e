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
    preconditioner = natgrad.KFAC(model, "mse", inverse=inverse, batch_fraction=1.0).preconditioner
    mse_loss(model(x), y).backward()
    preconditioner.update()
    samples, states = preconditioner.batch.samples, preconditioner.states()
    for layer in preconditioner.layers:
        state, singles = states[layer.name], []
        V = matrix(layer.module)
        sums = noise.measure(layer, V, samples[layer.name], preconditioner.metric.inverse, state, 1.0)
        told = noise.split(*sums.tolist())
        assert told is not None
        for one, target in zip(x, y, strict=True):
            model.zero_grad()
            (mse_loss(model(one[None]), target[None]) / len(x)).backward()
            singles.append(matrix(layer.module))
        model.zero_grad()
        mse_loss(model(x), y).backward()
        lengths = [torch.sum(v * preconditioner.metric.inverse.solve(state, v)) for v in (V, *singles)]
        expected = torch.stack([lengths[0], (torch.stack(lengths[1:]).sum() - lengths[0] / len(x)) * 6 / 5])
        torch.testing.assert_close(torch.tensor(told), expected, rtol=1e-8, atol=0)


def test_noise_has_no_bias_and_one_datum_tells_none() -> None:
    """Catches batches of one to four data that are taken for next to noiseless, and steps that learn them by heart."""
    torch.manual_seed(0)
    for data in (2, 3, 8):
        g = 0.5 + torch.randn(100_000, data)
        measured = torch.stack([g.sum(1).square(), g.square().sum(1), torch.full((len(g),), float(data))], dim=1)
        noise_of = [told[1] for sums in measured[:4000].tolist() if (told := noise.split(*sums)) is not None]
        all_noise = (measured[:, 1] - measured[:, 0] / data) * data / (data - 1)
        torch.testing.assert_close(torch.tensor(noise_of), all_noise[:4000].clamp(min=0))
        assert float(all_noise.mean()) == pytest.approx(data, rel=0.02)  # data gradients of variance 1
    assert noise.split(1.0, 1.0, 1.0) is None


@pytest.mark.parametrize("blocks", [(), (3,)])
def test_a_few_data_stand_for_all(blocks: tuple[int, ...]) -> None:
    """Exactly where lengths go with |g|², nearly elsewhere, and for data that dominate; few data stay what they are."""
    torch.manual_seed(0)
    x, g = torch.randn(*blocks, 400, 2, 5), torch.randn(*blocks, 400, 2, 4)
    g *= torch.randn(400, 1, 1).square()  # a heavy tail
    g[..., 7, :, :] = 200 * g.square().sum().sqrt() / 400
    few_x, few_g = noise.representatives(x, g)
    assert few_g.shape == (*blocks, noise.ENOUGH, 2, 4)
    torch.testing.assert_close(few_g.square().sum(), g.square().sum(), rtol=1e-10, atol=0)
    lengths = [(gs.mT @ xs).square().sum() for xs, gs in ((x, g), (few_x, few_g))]
    torch.testing.assert_close(lengths[1], lengths[0], rtol=0.1, atol=0)
    same = noise.representatives(x[..., : noise.ENOUGH, :, :], g[..., : noise.ENOUGH, :, :])
    assert torch.equal(same[1], g[..., : noise.ENOUGH, :, :])
    assert not noise.representatives(x, 0 * g)[1].any()


@pytest.mark.parametrize("case", ["few positions", "many positions", "padded embedding", "wide embedding", "grouped"])
def test_lengths_are_those_of_the_solutions(case: str) -> None:
    """Catches a form of the lengths that holds for few positions, dense factors or distinct tokens only."""
    torch.manual_seed(0)
    module, x = {
        "few positions": (nn.Linear(3, 4), torch.randn(5, 2, 3)),
        "many positions": (nn.Linear(1, 2), torch.randn(5, 7, 1)),
        "padded embedding": (nn.Embedding(6, 3, padding_idx=0), torch.randint(6, (5, 8))),
        "wide embedding": (nn.Embedding(4, 9000), torch.randint(4, (3, 2))),
        "grouped": (nn.Conv2d(4, 2, 3, groups=2, padding=1), torch.randn(3, 4, 5, 5)),
    }[case]
    preconditioner = natgrad.KFAC(module, "mse", fisher="exact" if case != "wide embedding" else "mc").preconditioner
    for _ in range(2):
        z = module(x)
        mse_loss(z, torch.linspace(-1, 1, z.numel()).reshape(z.shape)).backward()
        preconditioner.update()
    (layer,), (sample,) = preconditioner.layers, preconditioner.batch.samples[""]
    state, inverse = preconditioner.states()[""], preconditioner.metric.inverse
    lengths = []
    for one, g in zip(sample.xs[0], sample.gs[0], strict=True):
        rows = layer.inputs(one[None]), layer.gradients(g[None], one[None])
        x1, g1 = (rows[0], rows[1])
        if isinstance(module, nn.Embedding):
            x1 = nn.functional.one_hot(x1.squeeze(-1), module.num_embeddings).to(g1.dtype)
        V = torch.einsum("...so,...si->...oi", g1, x1).squeeze(-3)
        if layer.has_bias:
            V = torch.cat([V, g1.sum(-2).squeeze(-2)[..., None]], -1)
        lengths.append(torch.sum(V * inverse.solve(state, V)))
    rows = sample.rows()
    assert rows is not None
    told = inverse.lengths(state, layer, *rows)
    torch.testing.assert_close(told, torch.stack(lengths).sum(), rtol=1e-8, atol=0)


def test_ratio_is_bounded_with_little_signal_and_without_evidence() -> None:
    assert noise.ratio([]) == 1 / noise.LEAST_SIGNAL
    assert noise.ratio([1 / 3]) == pytest.approx(0.5)
    assert noise.ratio([1.0]) == pytest.approx(1 / noise.LEAST_SIGNAL)
    assert noise.ratio([0.0]) == 0.0
    assert noise.ratio([0.2, 0.4]) == pytest.approx(3 / 7)


def test_shares_are_averaged_and_not_energies() -> None:
    """Catches an average in which an early, long gradient outweighs all later ones."""
    state: noise.State = {}
    for total, part in [(1e6, 0.0), (1.0, 0.5)]:
        noise.remember(state, total, part, anew=False)
    assert state["noise"].item() == pytest.approx((1 - noise.DECAY) * 0.5, rel=1e-12)
    noise.remember(state, 1.0, 3.0, anew=True)
    assert state["noise"].item() == 1


@pytest.mark.parametrize("rates", [{"lr": 0.1}, {"damping": 1e-3}, {"lr": 0.1, "momentum": 0.9}])
def test_nothing_is_measured_where_it_is_not_used(rates: dict[str, float]) -> None:
    """Catches the cost of single gradients where rates or damping are given."""
    model = nn.Linear(3, 2)
    optimizer = natgrad.KFAC(model, "mse", **{"momentum": 0.0, **rates})  # type: ignore[arg-type]
    mse_loss(model(torch.randn(6, 3)), torch.randn(6, 2)).backward()
    optimizer.step()
    assert not optimizer.preconditioner.capture.sampling
    assert "noise" not in optimizer.preconditioner.states()[""]


def test_rows_that_are_not_of_the_data_tell_nothing() -> None:
    """Catches positions, the same for all data, taken for data: their gradients never agree."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.places(torch.arange(5)))

    model = Placed()
    preconditioner = natgrad.KFAC(model, "mse").preconditioner
    mse_loss(model(torch.randn(7, 5, 4)), torch.randn(7, 5, 2)).backward()
    preconditioner.update()
    assert set(preconditioner.batch.samples) == {"head"}
