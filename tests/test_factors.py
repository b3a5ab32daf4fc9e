"""Factors against sums and means written out."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import natgrad
from cases import dense_block, every_sharing
from layer_modules import Language
from natgrad import factors
from natgrad.factors import Statistics, automatic_decay, join, resolve_sharing, share_known, update_average
from natgrad.layers.moments import SMALL, moment
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
some_examples = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


# The running average.


@some_examples
@hypothesis.given(decays=st.lists(st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.999]), min_size=1, max_size=12))
def test_average_is_the_weighted_mean_at_any_age(decays: list[float]) -> None:
    """Every factor weighs the product of the decays since: catches a bias towards the first, or towards zero."""
    news = [(random(3, 3, seed=i), random(2, 2, seed=100 + i)) for i in range(len(decays))]
    state: dict[str, Tensor] = {}
    weights: list[float] = []
    for (A, G), decay in zip(news, decays, strict=True):
        update_average(state, {"A": A.clone(), "G": G.clone()}, decay)
        weights = [weight * decay for weight in weights] + [1.0]
        for key, i in (("A", 0), ("G", 1)):
            mean = sum(w * new[i] for w, new in zip(weights, news, strict=False)) / sum(weights)
            assert torch.allclose(state[key], mean, rtol=0, atol=1e-5)  # the age is float32
    assert abs(float(state["age"]) / sum(weights) - 1) < 1e-6


def test_no_decay_keeps_the_latest_alone() -> None:
    """Bitwise, so that a training step with enough rows has no memory at all."""
    state: dict[str, Tensor] = {}
    for seed in range(3):
        A, G = random(3, 3, seed=seed) * 10.0**seed, random(2, 2, seed=seed)
        update_average(state, {"A": A.clone(), "G": G.clone()}, 0.0)
        assert torch.equal(state["A"], A)
        assert torch.equal(state["G"], G)


def test_average_keeps_its_dtype_and_leaves_what_it_was_given_alone() -> None:
    state: dict[str, Tensor] = {}
    update_average(state, {"A": random(2, 2).float(), "G": random(2, 2).float()}, 0.9)
    A, G = random(2, 2, seed=1), random(2, 2, seed=2)
    update_average(state, {"A": A, "G": G}, 0.9)
    assert state["A"].dtype == state["G"].dtype == torch.float32
    assert torch.equal(A, random(2, 2, seed=1))


@pytest.mark.parametrize(("rows", "share"), [(99, 0.99), (100, 1.0), (1, 0.01), (10_000, 1.0)])
def test_a_row_for_each_dimension_determines_a_factor(rows: int, share: float) -> None:
    assert share_known(rows, 100) == share
    assert (automatic_decay(share, averages=False) == 0) is (share == 1)


@hypothesis.given(share=st.floats(1e-4, 1))
def test_factors_of_few_rows_remember_as_many_as_others_where_gradients_are_averaged(share: float) -> None:
    """In updates 1 / (1 − decay), of so many rows each. Catches decays that forget what batches of eight tell."""
    assert share / (1 - automatic_decay(share, averages=True)) == pytest.approx(1 / (1 - factors.AVERAGED_DECAY))
    assert automatic_decay(share / 2, averages=False) >= factors.LONG_DECAY
    assert automatic_decay(1e-3, averages=False) == pytest.approx(automatic_decay(1e-3, averages=True))


# Sums over rows.

SIDE_BY_SIDE = st.sampled_from([None, 1, 3])


def dense(F: Tensor) -> Tensor:
    """Of a factor that may be kept as a diagonal."""
    return F if F.shape[-2] == F.shape[-1] else F.squeeze(-1).diag_embed()


def diagonal_of(F: Tensor) -> Tensor:
    return F.diagonal(dim1=-2, dim2=-1).diag_embed()


@every_sharing
@some_examples
@hypothesis.given(
    N=st.integers(1, 4), S=st.integers(1, 3), d=st.integers(1, 4), B=SIDE_BY_SIDE, bias=st.booleans(), diagonal=...
)
def test_moment_is_that_of_the_extended_rows(
    sharing: str, N: int, S: int, d: int, B: int | None, bias: bool, diagonal: bool
) -> None:
    """Catches a bias entry of 1 where S ones are summed, and blocks that mix."""
    rows = random(*[B] * (B is not None), N, S, d)
    extended = with_ones(rows) if bias else rows
    flat = extended.flatten(-3, -2) if sharing == "expand" else extended.sum(-2)
    total, weight, count = moment(rows, bias, sharing, diagonal)
    expected = flat.mT @ flat
    assert total.shape[-1] == (1 if diagonal else expected.shape[-1])
    assert torch.allclose(dense(total), diagonal_of(expected) if diagonal else expected)
    assert weight == (N * S if sharing == "expand" else N * S**2)
    assert count == (N * S if sharing == "expand" else N)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B", [None, 2])
def test_moment_of_wide_rows_is_that_of_all_their_blocks(bias: bool, B: int | None) -> None:
    """Some are computed, the others mirrored: catches one in the wrong place, or never filled."""
    rows = random(*[B] * (B is not None), 5, 1, 2 * SMALL + 89)
    total = moment(rows, bias, "expand", False).total
    flat = (with_ones(rows) if bias else rows).flatten(-3, -2)
    assert torch.allclose(total, flat.mT @ flat)


@every_sharing
@some_examples
@hypothesis.given(N=st.integers(1, 4), S=st.integers(1, 3), B=SIDE_BY_SIDE, bias=st.booleans())
def test_sums_follow_the_formulas_of_the_modules(sharing: str, N: int, S: int, B: int | None, bias: bool) -> None:
    """A = ΣA / n or ΣA / (N S²), G = R ΣG, over two calls of different sizes."""
    statistics, leading = Statistics(B), [B] * (B is not None)
    expected_A, expected_G, weight = 0, 0, 0
    for seed, data in ((0, N), (1, 2 * N)):
        x, g = random(*leading, data, S, 3, seed=seed), random(*leading, data, S, 2, seed=10 + seed)
        statistics.add_inputs(moment(x, bias, sharing, False), slice(None), 1.0)
        statistics.add_gradients(moment(g, False, sharing, False).total, slice(None), 0.5)
        x = with_ones(x) if bias else x
        rows_x, rows_g = (t.flatten(-3, -2) if sharing == "expand" else t.sum(-2) for t in (x, g))
        expected_A, expected_G = expected_A + rows_x.mT @ rows_x, expected_G + 0.5 * rows_g.mT @ rows_g
        weight += data * S if sharing == "expand" else data * S**2
    A, G = statistics.factors(0.25, torch.zeros(2, 2))
    assert torch.allclose(A, expected_A / weight)
    assert torch.allclose(G, 0.25 * expected_G)
    assert statistics.rows == 3 * N * (S if sharing == "expand" else 1)


def test_a_call_counts_for_the_blocks_that_took_part() -> None:
    """As in cross-attention, whose query sees other inputs than key and value; one block takes no part at all."""
    statistics = Statistics(4)
    query, other = random(5, 2, 3), random(5, 7, 3, seed=1)
    statistics.add_inputs(moment(query, True, "expand", False), slice(0, 1), 1.0)
    statistics.add_inputs(moment(other, True, "expand", False), slice(1, 3), 1.0)
    statistics.add_gradients(torch.ones(2, 2, 2), slice(1, 3), 1.0)
    A, G = statistics.factors(1.0, torch.zeros(4, 2, 2))
    means = [with_ones(x).flatten(0, 1) for x in (query, other, other)]
    means = [rows.T @ rows / len(rows) for rows in means]
    assert torch.allclose(A, torch.stack([*means, torch.zeros(4, 4)]))
    assert torch.equal(G, torch.tensor([0.0, 1, 1, 0])[:, None, None].expand(4, 2, 2))


@every_sharing
@pytest.mark.parametrize("diagonal", [False, True])
def test_half_precision_rows_are_summed_in_single_precision(sharing: str, diagonal: bool) -> None:
    """In bfloat16 a sum of ones stops at 256."""
    ones = torch.ones(3000, 2, 1, dtype=torch.bfloat16)
    total = moment(ones, True, sharing, diagonal).total
    assert total.dtype == torch.float32
    value = 6000.0 if sharing == "expand" else 12000.0
    assert torch.equal(total, torch.full((2, 1 if diagonal else 2), value, dtype=torch.float32))


def test_products_are_no_denormal_numbers() -> None:
    """Catches gradients that vanish on 24 layers, whose products took twenty times as long. What is no number stays."""
    rows = 10.0 ** torch.linspace(-30, 0, 300).reshape(1, 300, 1).expand(4, 300, 3)
    total = moment(rows.float(), False, "expand", diagonal=False).total
    tiny = moment((1e-20 * rows).float(), False, "expand", diagonal=False).total
    assert torch.equal(tiny, torch.zeros_like(tiny))
    assert torch.allclose(total, (rows.flatten(0, 1).T @ rows.flatten(0, 1)).float())
    assert moment(torch.full((1, 1, 2), torch.nan), False, "expand", diagonal=False).total.isnan().all()


def test_rows_that_stand_for_others_count_for_them() -> None:
    """Half of one call's data and all of another's: A is that of all data in expectation, and not of the rows seen."""
    half, other = random(4, 1, 3), random(6, 1, 3, seed=1)
    statistics, repeated = Statistics(None), Statistics(None)
    for x, weight, copies in ((half, 2.0, [half, half]), (other, 1.0, [other])):
        statistics.add_inputs(moment(x, False, "expand", False), slice(None), weight)
        repeated.add_inputs(moment(torch.cat(copies), False, "expand", False), slice(None), 1.0)
    zero = torch.zeros(2, 2)
    torch.testing.assert_close(statistics.factors(1.0, zero)[0], repeated.factors(1.0, zero)[0])
    assert (statistics.rows, repeated.rows) == (10, 14)


def test_without_gradients_the_given_factor_stands_for_theirs() -> None:
    statistics = Statistics(None)
    statistics.add_inputs(moment(random(4, 1, 3), False, "expand", False), slice(None), 1.0)
    zero = torch.zeros(2, 2)
    assert len(list(statistics.tensors())) == 1
    assert statistics.factors(1.0, zero)[1] is zero


# Two uses of one weight.


def semidefinite(d: int, seed: int, diagonal: bool = False) -> Tensor:
    rows = random(d + 2, d, seed=seed)
    return rows.square().sum(0)[:, None] if diagonal else rows.T @ rows


def partial_traces(block: Tensor, out: int) -> tuple[Tensor, Tensor]:
    """Over A and over G, of a block over row-major (out, in)."""
    split = block.unflatten(0, (out, -1)).unflatten(2, (out, -1))
    return torch.einsum("oipi->op", split), torch.einsum("oioj->ij", split)


@some_examples
@hypothesis.given(d=st.integers(1, 4), out=st.integers(1, 4), columns=st.tuples(*[st.booleans()] * 4))
def test_join_keeps_the_partial_traces(d: int, out: int, columns: tuple[bool, ...]) -> None:
    """Of factors dense and diagonal, in all combinations."""
    uses = [(semidefinite(d, seed, columns[seed]), semidefinite(out, 10 + seed, columns[2 + seed])) for seed in (0, 1)]
    total = sum(dense_block(*use) for use in uses)
    joined = partial_traces(dense_block(*join(*uses)), out)
    for actual, expected in zip(joined, partial_traces(total, out), strict=True):
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("same", ["A", "G"])
def test_join_is_the_sum_where_one_factor_is_the_same(same: str) -> None:
    A, G = semidefinite(3, 0), semidefinite(2, 1)
    other = (2.5 * A, semidefinite(2, 2)) if same == "A" else (semidefinite(3, 2), 2.5 * G)
    expected = dense_block(A, G) + dense_block(*other)
    assert relative_error(dense_block(*join((A, G), other)), expected) < 1e-12


def test_join_pads_the_use_without_a_bias() -> None:
    with_bias, without = (semidefinite(4, 0), semidefinite(2, 1)), (semidefinite(3, 2), semidefinite(2, 3))
    padded = torch.nn.functional.pad(without[0], (0, 1, 0, 1)), without[1]
    for actual, expected in zip(join(with_bias, without), join(with_bias, padded), strict=True):
        assert torch.equal(actual, expected)


def test_join_of_nothing_is_nothing() -> None:
    """Zero over zero would be spread to all parameters."""
    zero = torch.zeros(3, 3), torch.zeros(2, 2)
    assert all(torch.equal(F, torch.zeros_like(F)) for F in join(zero, zero))


# What a user may write as `sharing`.


def test_sharing_by_word_or_by_name() -> None:
    assert resolve_sharing("reduce", ["a", "b"]) == {"a": "reduce", "b": "reduce"}
    assert resolve_sharing({"b": "reduce"}, ["a", "b"]) == {"a": "expand", "b": "reduce"}


@pytest.mark.parametrize(
    ("sharing", "text"),
    [
        ("sum", r"`sharing` must be one of \('expand', 'reduce'\), not 'sum'"),
        ({"a": "sum"}, r"`sharing` must be one of \('expand', 'reduce'\), not 'sum'"),
        ({"c": "reduce"}, r"`sharing` names 'c', which is not a layer; the layers are a, b"),
    ],
)
def test_sharing_that_is_refused(sharing: str | dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        resolve_sharing(sharing, ["a", "b"])


@pytest.mark.filterwarnings("ignore:natgrad. layer 'body' received no data")
@pytest.mark.parametrize("first", ["table", "head"])
@pytest.mark.parametrize("bias", [False, True])
def test_factors_of_a_tied_weight_have_one_shape_whichever_use_ran(first: str, bias: bool) -> None:
    """Catches the diagonal of a table that is spread over the rows of a matrix, and a bias that is not there."""
    torch.manual_seed(0)
    model = Language(bias=bias)
    model.table_alone = False
    head = model.forward
    model.forward = lambda tokens: model.embedding(tokens) if model.table_alone else head(tokens)  # type: ignore[method-assign]
    preconditioner = natgrad.Preconditioner(
        model, "mse", factor_decay=0.9, damping=0.1, curvature_period=1, inverse_period=1, batch_fraction=1.0
    )
    tokens = torch.randint(7, (20, 5))
    for turn in range(4):
        model.zero_grad()
        model.table_alone = (turn % 2 == 0) == (first == "table")
        model(tokens).square().mean().backward()
        preconditioner.step()
        A, G = preconditioner.factors()["head"]
        assert (A.shape, G.shape) == ((4 + bias, 4 + bias), (7, 7))
        assert torch.allclose(G, G.mT)
        assert torch.linalg.eigvalsh(A).min() > -1e-6
