"""Linear layers: natgrad's factors against the dense oracle, in double precision.

Blocks are compared as kron(G, A), since only the product is defined. Each test says which mistake it is there to catch.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import natgrad
from cases import (
    CROSS_ENTROPY,
    LOSSES,
    MSE,
    TOLERANCE,
    Loss,
    assert_blocks,
    data_for,
    every_loss,
    every_sharing,
    every_squared_loss,
    product_blocks,
)
from linear_cases import Halves, Mixed, Pooled, Recurrent, inputs, linear_layers, networks, stack
from natgrad.likelihoods import Gaussian
from oracle import (
    empirical_fisher_block,
    empirical_kfac_block,
    forward_kfac_block,
    ggn_block,
    hessian_block,
    kfac_block,
    layer_params,
    relative_error,
)

some_examples = hypothesis.settings(max_examples=8, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Where K-FAC is exact.


@every_loss
@some_examples
@hypothesis.given(model=networks())
def test_one_datum_gives_the_ggn(loss: Loss, model: nn.Sequential) -> None:
    """One outer product of Kronecker form: catches a wrong scale, column order, transpose or bias column."""
    x, y = data_for(model, loss, inputs(model, 1))
    expected = {n: ggn_block(model, layer_params(model, n), x, y, loss.loss_fn) for n in linear_layers(model)}
    assert_blocks(product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="exact"), expected)


@every_loss
@some_examples
@hypothesis.given(model=networks())
def test_one_datum_gives_the_empirical_fisher(loss: Loss, model: nn.Sequential) -> None:
    x, y = data_for(model, loss, inputs(model, 1))
    scale = loss.scale(model(x), y)
    expected = {
        n: empirical_fisher_block(model, layer_params(model, n), x, y, loss.criterion, scale)
        for n in linear_layers(model)
    }
    assert_blocks(product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="empirical"), expected)


@every_squared_loss
@some_examples
@hypothesis.given(model=networks(activations=[nn.Identity]), N=st.integers(1, 5), S=st.integers(0, 3))
def test_deep_linear_network_gives_the_hessian(loss: Loss, model: nn.Sequential, N: int, S: int) -> None:
    """The article's derivation, with and without positions that do not interact."""
    x, y = data_for(model, loss, inputs(model, N, *[S] * (S > 0)))
    params = {n: layer_params(model, n) for n in linear_layers(model)}
    expected = {n: ggn_block(model, p, x, y, loss.loss_fn) for n, p in params.items()}
    assert_blocks({n: hessian_block(model, p, x, y, loss.loss_fn) for n, p in params.items()}, expected)
    assert_blocks(product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="exact"), expected)


@every_squared_loss
@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_pooled_linear_network_is_exact_with_reduce(loss: Loss, pool: str) -> None:
    """Catches a lost or doubled power of S, and a bias entry that is 1 where it should be S."""
    torch.manual_seed(0)
    model = Pooled(stack([3, 4, 2], nn.Identity), pool)
    x, y = data_for(model, loss, torch.randn(5, 6, 3))
    expected = {n: ggn_block(model, layer_params(model, n), x, y, loss.loss_fn) for n in linear_layers(model)}
    assert_blocks(product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="exact", sharing="reduce"), expected)


@every_squared_loss
@some_examples
@hypothesis.given(model=networks(), N=st.integers(2, 5))
def test_last_layer_under_squared_error_is_exact(loss: Loss, model: nn.Sequential, N: int) -> None:
    """The last layer's G is the same for all data, whatever lies before: catches statistics that mix layers."""
    x, y = data_for(model, loss, inputs(model, N))
    last = linear_layers(model)[-1]
    block = product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="exact")[last]
    assert relative_error(block, ggn_block(model, layer_params(model, last), x, y, loss.loss_fn)) <= TOLERANCE


@every_squared_loss
def test_calls_that_do_not_interact_are_exact(loss: Loss) -> None:
    """Catches calls that overwrite each other, and data counted once per call."""
    torch.manual_seed(0)
    model = Halves()
    x, y = data_for(model, loss, torch.randn(5, 6))
    expected = {"halves": ggn_block(model, layer_params(model, "halves"), x, y, loss.loss_fn)}
    assert_blocks(product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="exact"), expected)


# Where it is not: the dense K-FAC of the oracle.


@every_loss
@every_sharing
@some_examples
@hypothesis.given(model=networks(), N=st.integers(2, 4), S=st.integers(1, 3))
def test_pooled_positions_equal_dense_kfac(loss: Loss, sharing: str, model: nn.Sequential, N: int, S: int) -> None:
    pooled = Pooled(model, "mean")
    x, y = data_for(pooled, loss, inputs(model, N, S))
    expected = {n: kfac_block(pooled, n, x, y, loss.loss_fn, sharing) for n in linear_layers(pooled)}
    blocks = product_blocks(pooled, loss.told, loss.loss_fn, (x, y), fisher="exact", sharing=sharing)
    assert_blocks(blocks, expected)


@every_loss
@every_sharing
def test_interacting_positions_equal_dense_kfac(loss: Loss, sharing: str) -> None:
    """Outputs at many positions that depend on each other: vectors switched on together would mix."""
    torch.manual_seed(0)
    model = Mixed()
    x, y = data_for(model, loss, torch.randn(4, 5, 3))
    expected = {n: kfac_block(model, n, x, y, loss.loss_fn, sharing) for n in linear_layers(model)}
    blocks = product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="exact", sharing=sharing)
    assert_blocks(blocks, expected)


@every_sharing
def test_two_position_axes_equal_dense_kfac(sharing: str) -> None:
    torch.manual_seed(0)
    model = stack([3, 4, 2])
    x, y = data_for(model, MSE, torch.randn(4, 2, 3, 3))
    expected = {n: kfac_block(model, n, x, y, mse_loss, sharing) for n in linear_layers(model)}
    assert_blocks(product_blocks(model, "mse", mse_loss, (x, y), fisher="exact", sharing=sharing), expected)


@every_sharing
@pytest.mark.parametrize("loss", [MSE, CROSS_ENTROPY], ids=["mse", "ce"])
def test_calls_that_interact_equal_dense_kfac(loss: Loss, sharing: str) -> None:
    """A layer three times in a row: catches the calls' inputs paired with another call's gradients."""
    torch.manual_seed(0)
    model = Recurrent()
    x, y = data_for(model, loss, torch.randn(4, 3))
    expected = {n: kfac_block(model, n, x, y, loss.loss_fn, sharing) for n in ["cell", "leave"]}
    blocks = product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="exact", sharing=sharing)
    assert_blocks(blocks, expected)


@every_loss
@every_sharing
@some_examples
@hypothesis.given(model=networks(), N=st.integers(2, 4), S=st.integers(1, 3))
def test_empirical_equals_dense_kfac(loss: Loss, sharing: str, model: nn.Sequential, N: int, S: int) -> None:
    """Catches R where 1/R belongs: the backward pass of the loss carries R, and R (∇c)(∇c)ᵀ wants it once."""
    pooled = Pooled(model, "mean")
    x, y = data_for(pooled, loss, inputs(model, N, S))
    scale = loss.scale(pooled(x), y)
    expected = {n: empirical_kfac_block(pooled, n, x, y, loss.criterion, scale, sharing) for n in linear_layers(pooled)}
    blocks = product_blocks(pooled, loss.told, loss.loss_fn, (x, y), fisher="empirical", sharing=sharing)
    assert_blocks(blocks, expected)


def test_empirical_without_a_loss_takes_a_mean_over_the_batch() -> None:
    torch.manual_seed(0)
    model = stack([3, 4, 2])
    x, y = data_for(model, MSE, inputs(model, 5))

    def per_datum(output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().mean(1)

    expected = {n: empirical_kfac_block(model, n, x, y, per_datum, 1 / 5) for n in linear_layers(model)}
    assert_blocks(product_blocks(model, None, mse_loss, (x, y), fisher="empirical"), expected)


@every_sharing
def test_forward_keeps_the_inputs_only(sharing: str) -> None:
    torch.manual_seed(0)
    model = Pooled(stack([3, 4, 2]), "mean")
    x, y = data_for(model, MSE, torch.randn(5, 3, 3))
    expected = {n: forward_kfac_block(model, n, x, sharing) for n in linear_layers(model)}
    assert_blocks(product_blocks(model, "mse", mse_loss, (x, y), fisher="forward", sharing=sharing), expected)


# Monte Carlo.


@pytest.mark.parametrize("name", ["gaussian-batchmean", "ce", "bce-sum"])
def test_monte_carlo_converges_to_exact_at_rate_one_half(name: str) -> None:
    """The distance is to the exact block, so that a bias, too, would bend the line away from its slope."""
    loss = LOSSES[name]
    torch.manual_seed(0)
    model = stack([3, 4, 3])
    x, y = data_for(model, loss, inputs(model, 6))
    exact = product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="exact")
    samples, errors = [4, 16, 64, 256], []
    for k in samples:
        squares = []
        for seed in range(max(8, 128 // k)):
            block = product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="mc", mc_samples=k, seed=seed)["0"]
            squares.append(relative_error(block, exact["0"]) ** 2)
        errors.append((sum(squares) / len(squares)) ** 0.5)
    points = torch.tensor([samples, errors]).log()
    centred = points - points.mean(1, keepdim=True)
    slope = float((centred[0] * centred[1]).sum() / centred[0].square().sum())
    assert abs(slope + 0.5) < 0.1, (slope, errors)
    assert errors[-1] < 0.1, errors


class InjectedNoise(Gaussian):
    """A Gaussian that is dealt its samples in advance, row after row."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__(reduction="batchmean")
        self.noise, self.dealt = noise, 0

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        self.dealt += len(output)
        return self.noise[self.dealt - len(output) : self.dealt]


# What capture must not depend on, and must not change.


@pytest.mark.parametrize(
    ("name", "fisher"),
    [
        *itertools.product(
            ["mse", "mse-sum", "gaussian-batchmean", "ce", "ce-sum", "bce"], ["exact", "empirical", "forward"]
        ),
        ("gaussian-batchmean", "mc"),
    ],
)
def test_uneven_micro_batches_give_the_whole_batch(name: str, fisher: str) -> None:
    """Catches means of unequal means, and a last forward that overwrites those before."""
    loss = LOSSES[name]
    torch.manual_seed(0)
    model = stack([3, 4, 2])
    x, y = data_for(model, loss, inputs(model, 7))
    parts = list(zip(x.split([1, 4, 2]), y.split([1, 4, 2]), strict=True))

    def told() -> Any:
        return InjectedNoise(torch.randn(7, 2, generator=torch.Generator().manual_seed(3)))

    def blocks(*batches: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return product_blocks(model, told() if fisher == "mc" else loss.told, loss.loss_fn, *batches, fisher=fisher)

    assert_blocks(blocks(*parts), blocks((x, y)), 1e-12)


@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc"])
def test_in_place_activations_change_nothing(fisher: str) -> None:
    """An input that is overwritten after the layer saw it, or an output overwritten after the hook, shows here."""
    torch.manual_seed(0)
    plain = stack([3, 4, 5, 2], nn.ReLU)
    inplace = copy.deepcopy(plain)
    for module in inplace.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    x, y = data_for(plain, MSE, inputs(plain, 6))
    assert_blocks(
        product_blocks(inplace, "mse", mse_loss, (x, y), fisher=fisher),
        product_blocks(plain, "mse", mse_loss, (x, y), fisher=fisher),
        0.0,
    )


@pytest.mark.parametrize("fisher", ["exact", "empirical", "forward", "mc"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_capture_leaves_outputs_gradients_and_chance_alone(fisher: str, activation: type[nn.Module]) -> None:
    """Bitwise: not one parameter gradient is added by the backpropagated vectors, no global random number is drawn."""
    torch.manual_seed(0)
    bare = nn.Sequential(*stack([3, 4, 2], activation), nn.Dropout(0.5))
    hooked = copy.deepcopy(bare)
    x, y = data_for(bare, MSE, torch.randn(6, 3))
    natgrad.Preconditioner(hooked, "mse", fisher=fisher)
    outputs, states = [], []
    for model in (bare, hooked):
        torch.manual_seed(1)
        outputs.append(model(x))
        mse_loss(outputs[-1], y).backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*outputs)
    assert torch.equal(*states)
    for expected, actual in zip(bare.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad)
