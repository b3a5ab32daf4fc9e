"""Factors against sums and means written out."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from natgrad.factors import Statistics, choose_decay, resolve_sharing, second_moment, update_average

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
        update_average(state, A.clone(), G.clone(), decay)
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
        update_average(state, A.clone(), G.clone(), 0.0)
        assert torch.equal(state["A"], A)
        assert torch.equal(state["G"], G)


def test_average_keeps_its_dtype_and_leaves_what_it_was_given_alone() -> None:
    state: dict[str, Tensor] = {}
    update_average(state, random(2, 2).float(), random(2, 2).float(), 0.9)
    A, G = random(2, 2, seed=1), random(2, 2, seed=2)
    update_average(state, A, G, 0.9)
    assert state["A"].dtype == state["G"].dtype == torch.float32
    assert torch.equal(A, random(2, 2, seed=1))


@pytest.mark.parametrize(("rows", "decay"), [(199, 0.95), (200, 0.0), (1, 0.95), (10_000, 0.0)])
def test_decay_is_zero_from_two_rows_for_each_dimension(rows: int, decay: float) -> None:
    assert choose_decay(rows, 100) == decay


# Sums over rows.


@some_examples
@hypothesis.given(n=st.integers(1, 6), d=st.integers(1, 4), bias=st.booleans())
def test_second_moment_is_that_of_the_extended_rows(n: int, d: int, bias: bool) -> None:
    rows = random(n, d)
    extended = with_ones(rows) if bias else rows
    assert torch.allclose(second_moment(rows, bias), extended.T @ extended)


@some_examples
@hypothesis.given(
    N=st.integers(1, 4), S=st.integers(1, 3), bias=st.booleans(), sharing=st.sampled_from(["expand", "reduce"])
)
def test_sums_follow_the_formulas_of_the_module(N: int, S: int, bias: bool, sharing: str) -> None:
    """A = ΣA / n or ΣA / (N S²), G = R ΣG, over two calls. Catches a bias entry of 1 where S ones are summed."""
    statistics = Statistics()
    expected_A, expected_G, weight = 0, 0, 0
    for seed, data in ((0, N), (1, 2 * N)):
        x, g = random(data, S, 3, seed=seed), random(data, S, 2, seed=10 + seed)
        statistics.add_inputs(x, bias, sharing)
        statistics.add_gradients(g, sharing, 0.5)
        x = with_ones(x) if bias else x
        rows_x, rows_g = (t.flatten(0, 1) if sharing == "expand" else t.sum(1) for t in (x, g))
        expected_A, expected_G = expected_A + rows_x.T @ rows_x, expected_G + 0.5 * rows_g.T @ rows_g
        weight += data * S if sharing == "expand" else data * S**2
    A, G = statistics.factors(scale=0.25)
    assert torch.allclose(A, expected_A / weight)
    assert torch.allclose(G, 0.25 * expected_G)
    assert statistics.rows == 3 * N * (S if sharing == "expand" else 1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_half_precision_rows_are_summed_in_single_precision(sharing: str) -> None:
    """In bfloat16 a sum of ones stops at 256."""
    ones = torch.ones(3000, 2, 1, dtype=torch.bfloat16)
    statistics = Statistics()
    statistics.add_inputs(ones, True, sharing)
    statistics.add_gradients(ones, sharing, 1.0)
    assert {t.dtype for t in statistics.tensors()} == {torch.float32}
    total = 6000.0 if sharing == "expand" else 12000.0
    assert torch.equal(statistics.A, torch.full((2, 2), total, dtype=torch.float32))
    assert statistics.G.item() == total


def test_without_gradients_there_is_no_factor_of_them() -> None:
    statistics = Statistics()
    statistics.add_inputs(random(4, 1, 3), False, "expand")
    assert statistics.factors(1.0)[1] is None
    assert len(list(statistics.tensors())) == 1


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
