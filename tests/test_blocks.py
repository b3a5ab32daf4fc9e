"""Blocks against dense linear algebra, and EKFAC against the best that its basis can do."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import natgrad
from natgrad.blocks import Block
from oracle import empirical_fisher_block, ggn_block, layer_params, relative_error

pytestmark = pytest.mark.usefixtures("float64")
either = pytest.mark.parametrize("ekfac", [False, True], ids=["K-FAC", "EKFAC"])


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 3), torch.randint(3, (6,))


def block(ekfac: bool, **options: Any) -> Block:
    model, x, y = problem()
    return natgrad.curvature(model, x, y, "cross_entropy", fisher="exact", ekfac=ekfac, **options)["0"]


@either
def test_block_is_one_symmetric_matrix_in_every_form(ekfac: bool) -> None:
    B = block(ekfac)
    dense, V = B.dense(), torch.randn(4, 4)
    eye = torch.eye(16)
    assert relative_error(dense, dense.T) < 1e-12
    assert torch.allclose(B.matvec(V).flatten(), dense @ V.flatten())
    assert torch.allclose(B.solve(V, 0.1).flatten(), torch.linalg.solve(dense + 0.1 * eye, V.flatten()))
    assert torch.allclose(B.solve(V).flatten(), torch.linalg.pinv(dense, rtol=1e-12, hermitian=True) @ V.flatten())
    assert torch.allclose(B.eigenvalues, torch.linalg.eigvalsh(dense))
    assert torch.allclose(B.trace(), dense.trace())
    assert torch.allclose(B.logdet(0.1), torch.logdet(dense + 0.1 * eye))
    assert B.ekfac is ekfac


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("layer", ["0", "2"])
def test_ekfac_is_the_nearest_matrix_with_its_basis(fisher: Any, layer: str) -> None:
    """Its eigenvalues are the diagonal of the exact block in the basis, so the trace is exact as well."""
    model, x, y = problem()
    B = natgrad.curvature(model, x, y, "cross_entropy", fisher=fisher, ekfac=True)[layer]
    params = layer_params(model, layer)
    exact = ggn_block(model, params, x, y, cross_entropy)
    if fisher == "empirical":
        exact = empirical_fisher_block(model, params, x, y, lambda f, y: cross_entropy(f, y, reduction="none"), 1 / 6)
    Q = torch.kron(B.bases[1], B.bases[0])
    assert relative_error(B.dense(), Q @ (Q.T @ exact @ Q).diagonal().diag() @ Q.T) < 1e-10
    assert torch.allclose(B.trace(), exact.trace())


@either
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_a_loader_is_its_data_together(ekfac: bool, fisher: Any, loss: Any) -> None:
    """With batches of unequal size, and shown by the progress bar that was asked for.

    Catches a loss module's batches of which only the last counts, and gradients divided by the data of their batch.
    """
    model, x, y = problem()
    seen = []
    loader = [(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])]
    split = natgrad.curvature(
        model, loader, loss=loss, fisher=fisher, ekfac=ekfac, progress=lambda it: (seen.append(b) or b for b in it)
    )
    whole = natgrad.curvature(model, x, y, loss, fisher=fisher, ekfac=ekfac)
    for name in whole:
        assert relative_error(split[name].dense(), whole[name].dense()) < 1e-12
    assert len(seen) == 3 * (1 + ekfac)


@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss()])
@pytest.mark.parametrize("fisher", ["mc", "empirical", "forward"])
def test_gradients_and_hooks_are_left_as_they_were(loss: Any, fisher: Any) -> None:
    model, x, y = problem()
    cross_entropy(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    natgrad.curvature(model, x, y, loss, fisher=fisher)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    hooked = [m for m in [*model.modules(), loss] if isinstance(m, nn.Module)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hooked)


def test_groups_are_blocks_on_the_diagonal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Flatten())
    x, y = torch.randn(5, 4, 2), torch.randn(5, 6)
    B = natgrad.curvature(model, x, y, "mse", fisher="exact")["0"]
    dense = B.dense()
    assert dense.shape == (30, 30)
    assert dense[:15, 15:].abs().max() == 0
    assert torch.allclose(dense[15:, 15:], torch.kron(B.G[1], B.A[1]))


def test_an_embedding_keeps_a_diagonal() -> None:
    torch.manual_seed(0)
    model, tokens, y = nn.Sequential(nn.Embedding(50, 3), nn.Linear(3, 2)), torch.randint(50, (20,)), torch.randn(20, 2)
    B = natgrad.curvature(model, tokens, y, "mse", fisher="exact", ekfac=True)["0"]
    assert B.A.shape == (50, 1)
    V = torch.randn(3, 50)
    assert torch.allclose(B.matvec(B.solve(V, 0.1)) + 0.1 * B.solve(V, 0.1), V)


def test_layer_translates_between_parameters_and_matrix() -> None:
    model, x, y = problem()
    cross_entropy(model(x), y).backward()
    B = natgrad.curvature(copy.deepcopy(model), x, y, "cross_entropy")["0"]
    gradient = B.layer.to_matrix([model[0].weight.grad, model[0].bias.grad])
    weight, bias = B.layer.from_matrix(B.solve(gradient, 1e-3))
    assert weight.shape == (4, 3)
    assert bias.shape == (4,)


def test_empirical_needs_a_loss_that_knows_the_targets() -> None:
    model, x, y = problem()
    with pytest.raises(ValueError, match="pass `loss` as a name or as a torch loss module"):
        natgrad.curvature(model, x, y, natgrad.likelihoods.Categorical(), fisher="empirical")
