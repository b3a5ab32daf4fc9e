"""Inverses against dense solves, and what becomes of factors that have none."""

import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad
from natgrad import inverses
from natgrad.damping import Damping
from natgrad.inverses import ALIASED, INVERSES, invert
from oracle import relative_error

pytestmark = pytest.mark.usefixtures("float64")
some_examples = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
every_inverse = pytest.mark.parametrize("inverse", INVERSES)
may_be_singular = pytest.mark.filterwarnings("ignore:natgrad. a factor . is singular at its damping:RuntimeWarning")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
NONE = Damping(0.0, 0.0, 0.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factor(size: int, rank: int, seed: int = 0) -> Tensor:
    rows = random(rank, size, seed=seed)
    return rows.T @ rows


def eye(size: int) -> Tensor:
    return torch.eye(size)


def solve(inverse: str, A: Tensor, G: Tensor, damping: Damping, V: Tensor) -> Tensor:
    kind = INVERSES[inverse]
    tensors = kind.factorize(A, G, damping)
    assert tuple(tensors) == kind.names
    return kind.solve(tensors, V)


def hilbert(size: int) -> Tensor:
    i = torch.arange(size)
    return (1.0 / (i[:, None] + i + 1.0)).float()


@every_inverse
@some_examples
@hypothesis.given(
    out=st.integers(1, 4),
    width=st.integers(1, 5),
    a=st.sampled_from([1e-2, 1.0, 10.0]),
    g=st.sampled_from([1e-2, 1.0, 10.0]),
    product=st.sampled_from([0.0, 0.1, 3.0]),
)
def test_solve_is_that_of_the_dense_block(
    inverse: str, out: int, width: int, a: float, g: float, product: float
) -> None:
    """(G + λ_G I) ⊗ (A + λ_A I) + δ I: catches A and G, or their dampings, exchanged, and a transposed V."""
    hypothesis.assume(inverse != "cholesky" or product == 0.0)
    A, G, V = factor(width, rank=2), factor(out, rank=3, seed=1), random(out, width, seed=2)
    given_A, given_G = A.clone(), G.clone()
    actual = solve(inverse, A, G, Damping(torch.tensor(a), g, product), V)
    block = torch.kron(G + g * eye(out), A + a * eye(width)) + product * eye(out * width)
    assert relative_error(actual, torch.linalg.solve(block, V.flatten()).reshape_as(V)) < 1e-10
    assert torch.equal(A, given_A)
    assert torch.equal(G, given_G)


@some_examples
@hypothesis.given(
    a=st.sampled_from([0.0, 0.1, 10.0]), g=st.sampled_from([0.0, 0.1, 10.0]), product=st.sampled_from([0.0, 0.1, 3.0])
)
def test_eigenvalues_of_ones_own_are_damped_as_those_of_the_product(a: float, g: float, product: float) -> None:
    """Q diag(s) Qᵀ + λ_G I ⊗ A + λ_A G ⊗ I + (λ_G λ_A + δ) I: catches a damping that follows s, or is left out."""
    kind, A, G, V = INVERSES["ekfac"], factor(4, rank=2), factor(3, rank=3, seed=1), random(3, 4, seed=2)
    tensors = kind.factorize(A, G, Damping(torch.tensor(a), g, product))
    s = random(3, 4, seed=3).square() + 0.1
    Q = torch.kron(tensors["G_basis"].contiguous(), tensors["A_basis"].contiguous())
    block = Q @ s.flatten().diag() @ Q.T
    block += torch.kron(g * eye(3), A) + torch.kron(G, a * eye(4)) + (g * a + product) * eye(12)
    actual = kind.solve({**tensors, "spectrum": s}, V)
    assert relative_error(actual, torch.linalg.solve(block, V.flatten()).reshape_as(V)) < 1e-10


@every_inverse
@every_dtype
def test_inverses_have_the_dtype_of_the_factors(inverse: str, dtype: torch.dtype) -> None:
    tensors = INVERSES[inverse].factorize(factor(3, 5).to(dtype), factor(2, 5).to(dtype), Damping(0.1, 0.1))
    assert {t.dtype for name, t in tensors.items() if name != "spectrum_age"} == {dtype}


# Cholesky where there is no inverse.


def test_what_fails_in_float32_is_done_in_float64_without_a_word() -> None:
    """The Hilbert matrix of order 9, rounded to float32, is definite by a hair."""
    assert torch.linalg.cholesky_ex(hilbert(9)).info > 0
    inverse = invert(hilbert(9), 0.0, "A")
    assert inverse.dtype == torch.float32
    assert relative_error(inverse.double(), torch.linalg.inv(hilbert(9).double())) < 1e-6


@pytest.mark.parametrize("blocks", [(), (2,)])
@pytest.mark.parametrize("size", [ALIASED - 1, ALIASED, 2 * ALIASED])
def test_sizes_that_caches_do_not_like_have_the_same_inverse(blocks: tuple[int, ...], size: int) -> None:
    """Rows and columns that are added for speed leave no trace, whatever the scale."""
    rows = 1e-6 * random(*blocks, 2 * size, size)
    F = rows.mT @ rows
    inverse = invert(F, 1e-12, "A")
    assert inverse.is_contiguous()
    assert relative_error(inverse, torch.linalg.inv(F + 1e-12 * eye(size))) < 1e-8


@pytest.fixture
def untold() -> None:
    inverses._tell_of_singular.cache_clear()


@pytest.mark.usefixtures("untold")
def test_singular_factors_are_told_of_once() -> None:
    """It was at every refresh: a filter that is changed, as torch does, makes Python show all warnings anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.constant_(model[0].bias, -100.0)
    optimizer = natgrad.KFAC(model, "cross_entropy", damping=0.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(4):
            optimizer.zero_grad()
            cross_entropy(model(torch.randn(16, 6)), torch.randint(3, (16,))).backward()
            optimizer.step()
    singular = sorted(str(one.message) for one in told if "singular" in str(one.message))
    assert [text[:19] for text in singular] == ["natgrad: a factor A", "natgrad: a factor G"]


@pytest.mark.usefixtures("untold")
def test_a_singular_factor_of_such_a_size_has_an_inverse() -> None:
    F = factor(ALIASED, rank=3).float()
    with pytest.warns(RuntimeWarning, match="factor A is singular"):
        inverse = invert(F, 0.0, "A")
    assert inverse.shape == F.shape
    assert inverse.isfinite().all()


@every_dtype
@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**20])
def test_a_singular_factor_warns_and_has_a_finite_inverse(dtype: torch.dtype, scale: float) -> None:
    """The jitter is relative: in float64 the inverse is right in the factor's range, whatever its unit is."""
    rows = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 1.0, 3.0, 1.0]])  # integers, so that A is singular in any dtype
    A, V = (scale * rows.T @ rows).to(dtype), (torch.tensor([[2.0, -1.0]]) @ rows).to(dtype)
    with pytest.warns(RuntimeWarning, match="factor A is singular at its damping, and some of its mean diagonal was"):
        inverse = invert(A, 0.0, "A")
    assert inverse.dtype == dtype
    assert inverse.isfinite().all()
    assert dtype == torch.float32 or relative_error(V @ inverse @ A, V) < 1e-6


@may_be_singular
def test_the_jitter_grows_until_it_is_enough() -> None:
    """Minus 10⁻⁴ of the mean diagonal needs more than that, and gets the next power of ten."""
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -3e-4]))
    mean = float(indefinite.diagonal().mean())
    inverse = invert(indefinite, 0.0, "G")
    assert torch.allclose(inverse, torch.linalg.inv(indefinite + 1e-3 * mean * eye(4)))


@every_dtype
@may_be_singular
def test_a_factor_of_dead_units_times_a_zero_gradient_is_zero(dtype: torch.dtype) -> None:
    """1 / 10⁻⁴⁶ is infinite in float32, and infinity times zero is not a number: the weights would be lost."""
    zero_A, zero_G, V = torch.zeros(3, 3, dtype=dtype), torch.zeros(2, 2, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    for A, G in ((zero_A, eye(2).to(dtype)), (eye(3).to(dtype), zero_G), (zero_A, zero_G)):
        assert torch.equal(solve("cholesky", A, G, NONE, V), V)
        assert torch.equal(solve("eigen", A, G, NONE, V), V)
        assert torch.equal(solve("ekfac", A, G, NONE, V), V)


def test_a_factor_beyond_repair_is_named() -> None:
    with pytest.raises(ArithmeticError, match="factor G cannot be inverted even with 100 times its mean diagonal"):
        invert(-eye(2), 0.0, "G")


# Eigendecompositions.


@every_dtype
def test_without_damping_eigen_is_the_pseudo_inverse(dtype: torch.dtype) -> None:
    """Catches a division by the rounding error of a zero eigenvalue."""
    A, G, V = factor(4, rank=2), factor(3, rank=2, seed=1), random(3, 4, seed=2)
    expected = (torch.linalg.pinv(torch.kron(G, A), hermitian=True) @ V.flatten()).reshape_as(V)
    actual = solve("eigen", A.to(dtype), G.to(dtype), NONE, V.to(dtype))
    assert relative_error(actual.double(), expected) < (1e-4 if dtype == torch.float32 else 1e-10)


def test_eigenvalues_below_zero_count_as_zero() -> None:
    """Rounding makes them, and minus one of them times another could undo the damping."""
    A, G = torch.diag(torch.tensor([1.0, -0.5])), torch.diag(torch.tensor([2.0, -0.5]))
    expected = torch.tensor([[1 / 2.1, 10.0], [10.0, 10.0]])
    assert torch.allclose(solve("eigen", A, G, Damping(0.0, 0.0, 0.1), torch.ones(2, 2)), expected)


def test_an_eigendecomposition_that_fails_is_done_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh

    def picky(F: Tensor) -> tuple[Tensor, Tensor]:
        if F.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(F)

    A, G, V = factor(3, 5).float(), factor(2, 5, seed=1).float(), random(2, 3).float()
    expected = solve("eigen", A, G, Damping(0.1, 0.1), V)
    monkeypatch.setattr(torch.linalg, "eigh", picky)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = solve("eigen", A, G, Damping(0.1, 0.1), V)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 1e-5
