"""Every kind of layer against the dense oracle: where K-FAC is exact, the GGN; elsewhere a K-FAC written independently.

The cases are in ``layer_cases``.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad
from cases import LOSSES, TOLERANCE, assert_blocks, data_for, dense_block, every_sharing, product_blocks
from layer_cases import EXACT, NOT_EXACT
from layer_modules import Language
from linear_cases import stack
from natgrad.factors import join
from natgrad.layers import partition
from oracle import ggn_block, kfac_block, layer_params, relative_error
from transcribed import counterparts, write_out

pytestmark = pytest.mark.usefixtures("float64")
every_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


# Where K-FAC is exact.


@every_bias
@pytest.mark.parametrize(("name", "loss_name"), [(name, loss) for name, case in EXACT.items() for loss in case.losses])
def test_exact(name: str, loss_name: str, bias: bool) -> None:
    """A position too many, a lost padding, a patch in another order, a scale: all show here."""
    torch.manual_seed(0)
    case, loss = EXACT[name], LOSSES[loss_name]
    model, x = case.make(bias)
    model(x)  # lazy layers
    x, y = data_for(model, loss, x)
    names = case.layers or [layer.name for layer in partition(model).layers]
    plain = write_out(model)
    expected = {n: ggn_block(plain, layer_params(plain, n), x, y, loss.loss_fn) for n in names}
    blocks = product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="exact", sharing=case.sharing)
    assert_blocks({n: blocks[n] for n in names}, expected)
    assert all(block.norm() > 0 for block in expected.values())


@every_bias
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"weight": torch.tensor([0.3, 1.0, 2.0])}], ids=["plain", "class weights"])
def test_exact_where_targets_are_ignored(options: dict[str, Tensor], reduction: str, bias: bool) -> None:
    """Data with the same input but different targets, some of them ignored: catches ignored data that count."""
    torch.manual_seed(0)
    options = {key: weight.double() for key, weight in options.items()}
    criterion = nn.CrossEntropyLoss(ignore_index=7, reduction=reduction, **options)
    model, x, y = stack([3, 4, 3], bias=bias), torch.randn(1, 3).expand(6, 3), torch.tensor([0, 7, 2, 2, 7, 7])
    expected = {n: ggn_block(model, layer_params(model, n), x, y, criterion) for n in ["0", "2"]}
    told = copy.deepcopy(criterion)
    assert_blocks(product_blocks(model, told, told, (x, y), fisher="exact"), expected)


@every_bias
def test_exact_for_logits_at_several_positions_of_which_some_are_ignored(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*stack([3, 4, 6], bias=bias), nn.Unflatten(1, (3, 2)))
    x, y = torch.randn(1, 3).expand(3, 3), torch.tensor([[0, -100], [2, 1], [-100, -100]])
    expected = {n: ggn_block(model, layer_params(model, n), x, y, cross_entropy) for n in ["0", "2"]}
    told = nn.CrossEntropyLoss()
    assert_blocks(product_blocks(model, told, told, (x, y), fisher="exact"), expected)


# Where it is not.


@every_bias
@every_sharing
@pytest.mark.parametrize("loss_name", ["mse", "ce", "bce-sum"])
@pytest.mark.parametrize("name", NOT_EXACT)
def test_equals_dense_kfac(name: str, loss_name: str, sharing: str, bias: bool) -> None:
    """A constant that is wrong by the number of positions, data or calls cannot hide where blocks are not exact."""
    torch.manual_seed(0)
    model, x = NOT_EXACT[name](bias)
    loss = LOSSES[loss_name]
    x, y = data_for(model, loss, x)
    plain = write_out(model)
    expected = {}
    for n, theirs in counterparts(plain).items():
        if name == "linear, twins" and n.endswith("second"):
            continue
        uses = [[t] for t in theirs] if "twins" not in name or "first" not in n else [[n, n.replace("first", "second")]]
        blocks = [kfac_block(plain, use, x, y, loss.loss_fn, sharing) for use in uses]
        expected[n] = torch.stack(blocks) if len(blocks) > 1 else blocks[0]
    actual = product_blocks(model, loss.told, loss.loss_fn, (x, y), fisher="exact", sharing=sharing)
    assert_blocks(actual, expected)
    assert any(relative_error(actual[n], b) < TOLERANCE for n, b in expected.items())


@every_sharing
def test_a_tied_table_has_the_partial_traces_of_its_two_uses(sharing: str) -> None:
    """Embedding and head: the sum of two Kronecker products, each from the oracle, the embedding's transposed."""
    torch.manual_seed(0)
    model = nn.Sequential(Language(), nn.Flatten(2), _Swap())
    x, y = torch.randint(7, (3, 4)), torch.randint(7, (3, 4))
    head = kfac_block(model, "0.head", x, y, cross_entropy, sharing).reshape(7, 4, 7, 4)
    table = kfac_block(model, "0.embedding", x, y, cross_entropy, sharing).reshape(4, 7, 4, 7).permute(1, 0, 3, 2)
    whole = head + table
    over_tokens, over_dim = torch.einsum("iaja->ij", whole), torch.einsum("iaib->ab", whole)
    expected = torch.kron(over_tokens, over_dim) / over_dim.trace()
    blocks = product_blocks(model, "cross_entropy", cross_entropy, (x, y), fisher="exact", sharing=sharing)
    assert relative_error(blocks["0.head"], expected) < TOLERANCE
    assert relative_error(blocks["0.body"], kfac_block(model, "0.body", x, y, cross_entropy, sharing)) < TOLERANCE


def test_joining_alike_products_is_their_sum() -> None:
    torch.manual_seed(0)
    A, B, G = (torch.cov(torch.randn(n, 9)) for n in (3, 3, 4))
    assert relative_error(dense_block(*join((A, G), (B, 2 * G))), torch.kron(G, A + 2 * B)) < 1e-12


# Monte Carlo.


def test_monte_carlo_error_falls_as_samples_to_the_minus_one_half() -> None:
    """From 10 to 10,000 samples: a bias would bend the line, a noise that does not average out flatten it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 10))
    x, y = torch.randn(4, 2, 4), torch.randint(10, (4,))
    exact = {n: kfac_block(model, n, x, y, cross_entropy) for n in ["0", "3"]}
    samples, errors = [10, 100, 1000, 10_000], []
    for k, repetitions in zip(samples, [48, 16, 4, 2], strict=True):
        squares = []
        for seed in range(repetitions):
            preconditioner = natgrad.Preconditioner(
                copy.deepcopy(model), "cross_entropy", mc_samples=k, seed=seed, damping=1.0, factor_decay=0.0
            )
            cross_entropy(preconditioner.model(x), y).backward()
            preconditioner.step()
            factors = preconditioner.factors()
            squares += [relative_error(dense_block(*factors[n]), exact[n]) ** 2 for n in exact]
        errors.append((sum(squares) / len(squares)) ** 0.5)
    points = torch.tensor([samples, errors]).log()
    centred = points - points.mean(1, keepdim=True)
    slope = float((centred[0] * centred[1]).sum() / centred[0].square().sum())
    assert abs(slope + 0.5) < 0.05, (slope, errors)
    assert errors[-1] < 0.02, errors


class _Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
